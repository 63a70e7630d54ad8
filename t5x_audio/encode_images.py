"""Turns images with texts into soft tokens, by a frozen encoder, for pretraining.

    python -m t5x_audio.encode_images --gin_file=gin/runs/encode_images.gin \
        --manifest=pairs.jsonl --name=pairs --run_dir=runs/step1

The corpus is `<run_dir>/images/<name>`, from which `t5x_audio.cache_tasks` makes the task
`image_text`. What a manifest's line looks like: t5x_audio/data/images.py. Documents with an image
that cannot be read are left out and listed, with the reason, in the corpus's quarantine.jsonl. A
large collection is many manifests, each with a name and, if you like, a machine of its own.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable

from t5x_audio import launch
from t5x_audio.errors import UserError

QUARANTINE_FILE = "quarantine.jsonl"


def run(
    *,
    run_dir: str,
    name: str,
    manifest: str,
    encoder: Callable,
    batch_size: int = 32,
    max_images: int = 8,
    validation: float = 0.02,
    test: float = 0.02,
    num_shards: int = 1,
) -> dict:
    """Writes the corpus `name` of a run; a finished one of this encoder is left as it is.

    Args:
      run_dir: the run.
      name: of the corpus.
      manifest: JSONL file of documents.
      encoder: uint8 [N, image_size, image_size, 3] -> float [N, k, width], with the members of
        `tokenizers.image_encoder.FrozenImageEncoder`.
      batch_size: images that are encoded together.
      max_images: documents of more are left out.
      validation, test: shares of the splits where the manifest names none.
      num_shards: files a split.

    Returns:
      Figures for the closing line.

    Raises:
      UserError: a bad line, nothing that can be used, or a finished corpus of another encoder.
    """
    from tqdm import tqdm

    from t5x_audio.data import corpus, images, records

    if not 0 <= validation + test < 1 or min(validation, test) < 0:
        raise UserError(f"validation={validation}, test={test}: shares that leave something over")
    directory = os.path.join(run_dir, "images", name)
    summary = images.read_summary(directory)
    if summary is not None:
        if summary["encoder"] != encoder.name:
            raise UserError(
                f"{directory}: made with encoder {summary['encoder']}, not {encoder.name}; delete "
                "it or give another --name"
            )
        print(f"{directory}: finished already", file=sys.stderr)
        return _figures(directory, summary)
    documents = images.read_manifest(manifest, validation, test)
    shutil.rmtree(directory, ignore_errors=True)
    refused, counts, soft, record = [], {}, 0, None
    with contextlib.ExitStack() as stack:
        writers = {}
        with tqdm(documents, unit="document") as progress:
            encoded = images.encode(progress, encoder, batch_size, max_images, refused)
            for split, record in encoded:
                if split not in writers:
                    writer = records.RecordWriter(directory, split, num_shards)
                    writers[split] = stack.enter_context(writer)
                writers[split].write(record)
                counts[split] = counts.get(split, 0) + 1
                soft += len(record["soft_embeddings"])
    if record is None:
        raise UserError(f"{manifest}: no document can be used ({refused[0]['reason']})")
    lines = "".join(json.dumps(row) + "\n" for row in refused)
    corpus.write_text(os.path.join(directory, QUARANTINE_FILE), lines)
    summary = {
        "source": manifest,
        "splits": counts,
        "documents": sum(counts.values()),
        "images": soft // record["per_image"],
        "left_out": len(refused),
        "soft_tokens_per_image": record["per_image"],
        "soft_width": record["soft_embeddings"].shape[1],
        "encoder": encoder.name,
    }
    text = json.dumps(summary, indent=1) + "\n"
    corpus.write_text(os.path.join(directory, images.SUMMARY_FILE), text)
    return _figures(directory, summary)


def _figures(directory: str, summary: dict) -> dict:
    names = ("documents", "images", "left_out", "soft_tokens_per_image", "soft_width", "encoder")
    return {"corpus": directory} | {name: summary[name] for name in names}


def _add_flags(parser) -> None:
    parser.add_argument("--run_dir", help="the run that the images are for", required=True)
    parser.add_argument("--name", help="of the corpus", required=True)
    parser.add_argument("--manifest", help="JSONL file of documents", required=True)
    parser.add_argument("--batch_size", type=int, help="images encoded together; default 32")
    parser.add_argument("--max_images", type=int, help="of a document; default 8")
    parser.add_argument("--validation", type=float, help="share of a split; default 0.02")
    parser.add_argument("--test", type=float, help="share of a split; default 0.02")
    parser.add_argument("--num_shards", type=int, help="files a split; default 1")


if __name__ == "__main__":
    launch.main("t5x_audio.encode_images", description=__doc__, add_flags=_add_flags)
