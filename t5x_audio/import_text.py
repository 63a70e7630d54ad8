"""Brings text for pretraining into a run, from files, folders or a TFDS builder.

    python -m t5x_audio.import_text --files=books.jsonl --name=books --run_dir=runs/step1
    python -m t5x_audio.import_text --tfds=c4/en --name=c4 --run_dir=runs/step1

The task `text` reads it, cut into pieces of the context's length. What a file looks like:
t5x_audio/data/documents.py.
"""

import os
import shutil
import sys

from t5x_audio import launch
from t5x_audio.errors import UserError


def run(
    *,
    run_dir: str,
    name: str,
    files: list[str] | None = None,
    tfds: str | None = None,
    data_dir: str | None = None,
    normalize: bool = False,
    validation: float = 0.02,
    test: float = 0.02,
    num_shards: int = 1,
) -> dict:
    """Writes the collection `name` of a run; a finished one is left as it is.

    Args:
      run_dir: the run.
      name: of the collection.
      files: .jsonl files, text files, and folders of them.
      tfds: name of a TFDS builder, in place of files.
      data_dir: of TFDS.
      normalize: whether to turn it into lower-case words as they are said, English only: what a
        small vocabulary of one's own knows.
      validation, test: shares of the splits where the source names none.
      num_shards: files a split.

    Returns:
      Figures for the closing line.

    Raises:
      UserError: both or none of files and tfds, or a file or line that cannot be read.
    """
    import tqdm

    from t5x_audio.data import documents, text_normalization

    if bool(files) == bool(tfds):
        raise UserError("import_text: give one of --files=FILE and --tfds=NAME")
    if not 0 <= validation + test < 1 or min(validation, test) < 0:
        raise UserError(f"validation={validation}, test={test}: shares that leave something over")
    directory = os.path.join(run_dir, "texts", name)
    summary = documents.read_summary(directory)
    if summary is not None:
        print(f"{directory}: finished already", file=sys.stderr)
    else:
        found = documents.read_files(files) if files else documents.read_tfds(tfds, data_dir)
        found = tqdm.tqdm(found, unit=" documents")
        if normalize:
            found = (
                document._replace(text=text_normalization.normalize(document.text))
                for document in found
            )
        shutil.rmtree(directory, ignore_errors=True)
        try:
            summary = documents.write(directory, found, validation, test, num_shards)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    figures = {key: summary[key] for key in ("documents", "characters")}
    return {"texts": directory} | figures


def _add_flags(parser) -> None:
    parser.add_argument("--run_dir", help="the run that the text is for", required=True)
    parser.add_argument("--name", help="of the collection", required=True)
    parser.add_argument("--files", action="append", help="file or folder of text (repeatable)")
    parser.add_argument("--tfds", help="name of a TFDS builder, e.g. c4/en")
    parser.add_argument("--data_dir", help="of TFDS; default ~/tensorflow_datasets")
    parser.add_argument(
        "--normalize", action="store_true", default=None, help="lower-case words, as they are said"
    )
    parser.add_argument("--validation", type=float, help="share of a split; default 0.02")
    parser.add_argument("--test", type=float, help="share of a split; default 0.02")
    parser.add_argument("--num_shards", type=int, help="files a split; default 1")


if __name__ == "__main__":
    launch.main("t5x_audio.import_text", description=__doc__, add_flags=_add_flags)
