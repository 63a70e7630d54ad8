r"""Gives a language model rows for new tokens, so that a text model can learn audio.

    python -m t5x_audio.extend_vocabulary --source=models/smollm2 --rows=5120 \
        --model_dir=models/smollm2_audio

The new rows of the embedding and the new columns of the head lie around the mean of the old ones,
at a tenth of their spread: apart from each other, yet never likelier than what the model knows
(Hewitt 2021, "Initializing new word embeddings for pretrained language models"). All other weights
stay as they are, so text is answered as before.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from t5x_audio import launch
from t5x_audio.errors import UserError

_SPREAD = 0.1
_AXES = {"embedding": 0, "head": 1}  # of the vocabulary


def run(
    *, source: str, model_dir: str, rows: int, multiple_of: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Writes the model of `source` with a larger vocabulary to `model_dir`.

    Args:
      source: model directory of a backbone.
      model_dir: where the new model goes.
      rows: new tokens; their ids follow the old ones.
      multiple_of: more rows are added until this divides the vocabulary, as a mesh may want.
      seed: of the new rows.

    Returns:
      model_dir, vocab_size and parameters.

    Raises:
      UserError: no backbone there, nothing to add, or a finished model of other sizes.
    """
    import numpy as np
    from tqdm import tqdm

    from t5x_audio.backbone.transformer import TransformerConfig
    from t5x_audio.interop import hugging_face
    from t5x_audio.training import checkpoints

    if rows < 1 or multiple_of < 1:
        raise UserError(f"--rows={rows}, multiple_of={multiple_of}: both are 1 or more")
    old = checkpoints.load_config(source)
    if not isinstance(old, TransformerConfig):
        raise UserError(f"{source}: holds a {type(old).__name__}, not a backbone")
    vocab_size = -(-(old.vocab_size + rows) // multiple_of) * multiple_of
    config = dataclasses.replace(old, vocab_size=vocab_size)
    output = Path(model_dir)
    if checkpoints.checkpoint_steps(output):
        checkpoints.require_same_configs(output, {"model": config})
        print(f"{output}: finished already", file=sys.stderr)
        return {"model_dir": model_dir, "vocab_size": vocab_size}
    shapes = hugging_face.stack_shapes(config)
    with (
        tqdm(total=len(shapes), unit="array", desc="extend") as progress,
        checkpoints.leaving_nothing_behind(output),
    ):
        arrays = {}
        for parameter, shape in shapes.items():
            arrays[parameter] = checkpoints.open_array(source, f"params/{parameter}")
            if parameter in _AXES:
                draws = np.random.default_rng((seed, _AXES[parameter]))
                arrays[parameter] = _extended(arrays[parameter], shape, _AXES[parameter], draws)
            arrays[parameter] = _counted(arrays[parameter], progress)
        checkpoints.save_parts(output, config, arrays)
    launch.save_operative_config(output)
    summary = {"vocab_size": vocab_size, "parameters": hugging_face.count(config)}
    return {"model_dir": model_dir} | summary


def _counted(array, progress):
    """`array`, whose last part moves the progress."""

    def read(start: int):
        part = array.read(start)
        progress.update(start + len(part) == array.shape[0])
        return part

    return dataclasses.replace(array, read=read)


def _extended(array, shape: tuple[int, ...], axis: int, rng):
    """`array` with new rows along `axis`, as one part."""

    def read(start: int):
        return _with_rows(array.whole(), shape[axis], axis, rng)

    return dataclasses.replace(array, shape=shape, rows=shape[0], read=read)


def _with_rows(values, count: int, axis: int, rng):
    """`values` and new rows up to `count` of them along `axis`, in the same type."""
    import numpy as np

    known = np.moveaxis(values, axis, 0)
    wide = known.astype(np.float32)
    mean, spread = wide.mean(0, dtype=np.float64), wide.std(0, dtype=np.float64)
    drawn = rng.standard_normal((count - len(known), known.shape[1]), np.float32)
    new = (mean + _SPREAD * spread * drawn).astype(values.dtype)
    return np.moveaxis(np.concatenate([known, new]), 0, axis)


def _add_flags(parser) -> None:
    parser.add_argument("--source", help="model directory of the model to extend", required=True)
    parser.add_argument("--rows", type=int, help="how many tokens are new", required=True)
    parser.add_argument("--multiple_of", type=int, help="divides the new vocabulary; default 1")


if __name__ == "__main__":
    launch.main("t5x_audio.extend_vocabulary", description=__doc__, add_flags=_add_flags)
