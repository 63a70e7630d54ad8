"""The folder of an evaluation: what is finished is not done again, what is half done goes on.

`settings.json` says what the rest was made with; when that is another now, the rest is dropped.
`results.json` has the figures and, written last, says that they are whole; `results.md` has them
as tables.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_audio.errors import UserError

RESULTS, TABLES, SETTINGS = "results.json", "results.md", "settings.json"


def finished(folder: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results, if they are there and were made with these settings."""
    try:
        results = json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError):
        return None
    return results if results.get("settings") == settings else None


def begin(folder: pathlib.Path, settings: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Makes the folder; drops the results and `parts` (files, folders) that other settings made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / SETTINGS
        if not kept.exists() or json.loads(kept.read_text()) != settings:
            for name in (RESULTS, *parts):
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            write(kept, json.dumps(settings))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); give another folder") from error


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_rows(path: pathlib.Path) -> dict[str, dict]:
    """Rows of JSON lines by id; a last line that was cut short is taken off the file."""
    if not path.exists():
        return {}
    rows, whole = {}, ""
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        whole += line
        row = json.loads(line)
        rows[row["id"]] = row
    write(path, whole)
    return rows
