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
    from t5x_audio.training import checkpoints, staging

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
    stored = checkpoints.array_types(source)
    types = {name: stored[f"params/{name}"] for name in shapes}
    rng = np.random.default_rng(seed)
    with staging.staged_model(output, config, shapes, types) as arrays:
        for parameter, array in tqdm(arrays.items(), unit="array", desc="extend"):
            values = checkpoints.read_array(source, f"params/{parameter}")
            if parameter in _AXES:
                _extend(array, values, _AXES[parameter], rng)
            else:
                array[...] = values
    launch.save_operative_config(output)
    summary = {"vocab_size": vocab_size, "parameters": hugging_face.count(config)}
    return {"model_dir": model_dir} | summary


def _extend(array, values, axis: int, rng) -> None:
    """Fills `array` with `values` and new rows along `axis` in the type of `array`."""
    import numpy as np

    wide = np.moveaxis(values, axis, 0).astype(np.float32)
    known, rows = len(wide), array.shape[axis] - len(wide)
    mean, spread = wide.mean(0, dtype=np.float64), wide.std(0, dtype=np.float64)
    new = mean + _SPREAD * spread * rng.standard_normal((rows, wide.shape[1]), np.float32)
    target = np.moveaxis(array, axis, 0)
    target[:known] = np.moveaxis(values, axis, 0)
    target[known:] = new.astype(array.dtype)


def _add_flags(parser) -> None:
    parser.add_argument("--source", help="model directory of the model to extend", required=True)
    parser.add_argument("--rows", type=int, help="how many tokens are new", required=True)
    parser.add_argument("--multiple_of", type=int, help="divides the new vocabulary; default 1")


if __name__ == "__main__":
    launch.main("t5x_audio.extend_vocabulary", description=__doc__, add_flags=_add_flags)
