"""Model files carried inside installed wheels: found without importing the wheel, and verified.

Importing such a package could run anything and often needs libraries we do not install, so only
its place is looked up; the file's SHA-256 is compared with the pinned one before it is used.
"""

import hashlib
import importlib.util
import pathlib

from t5x_audio.errors import UserError


def find_model_file(package: str, relative: str, sha256: str, requirement: str) -> pathlib.Path:
    """Finds a file inside an installed top-level package and checks its content.

    Args:
      package: import name, e.g. 'resemblyzer'.
      relative: the file's path inside the package, with '/'.
      sha256: expected digest, hexadecimal.
      requirement: what to give to pip when it is missing, e.g. '--no-deps resemblyzer==0.1.4'.

    Returns:
      The file's path.

    Raises:
      UserError: the package or file is missing, or the content is another.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package {package} is not installed; run: pip install {requirement}")
    path = pathlib.Path(spec.submodule_search_locations[0], *relative.split("/"))
    verify(path, sha256, requirement)
    return path


def verify(path: str | pathlib.Path, sha256: str, requirement: str) -> None:
    """Raises UserError unless the file is there and has the SHA-256; see `find_model_file`."""
    mend = f"run: pip install --force-reinstall {requirement}"
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    if digest != sha256:
        raise UserError(
            f"{path}: unexpected content (sha256 {digest[:12]}..., not {sha256[:12]}...); {mend}"
        )
