"""Weighted average of the weights of several models of one size.

Step-Audio-AQAA merges its two supervised models and the preference-optimised one 5 : 5 : 1
(arXiv:2506.08967, equation 3): W = (5 W_sft1 + 5 W_sft2 + 1 W_dpo) / 11. Averages are taken in
float64 and kept in each parameter's own type; what isn't a parameter comes from the last model.

    python -m t5x_audio.merge --gin_file=gin/runs/merge.gin --gin.RUN_DIR=runs/demo
"""

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from t5x_audio import launch
from t5x_audio.errors import UserError


def run(
    *,
    models: Sequence[str],
    weights: Sequence[float],
    model_dir: str | None = None,
    run_dir: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Writes the average of `models` to `model_dir` (default `run_dir`/`name`).

    Args:
      models: model directories; relative ones are relative to `run_dir` if that's given.
      weights: one for each; they're divided by their sum.
      model_dir, run_dir, name: where the merged model goes.

    Returns:
      model_dir, the number of models and of parameters.

    Raises:
      UserError: missing models, models of different sizes, or weights that don't fit.
    """
    if not models or len(models) != len(weights):
        raise UserError(
            f"merge: {len(models)} models but {len(weights)} weights; give one for each"
        )
    total = math.fsum(weights)
    if not math.isfinite(total) or total <= 0:
        raise UserError(f"merge: weights {tuple(weights)} have no positive sum")

    import jax
    import numpy as np
    from flax import nnx

    from t5x_audio.training import checkpoints, progress

    output = progress.run_directory(model_dir, run_dir, name)
    if checkpoints.checkpoint_steps(output) and (output / "model.json").exists():
        print(f"{output}: finished already", file=sys.stderr)
        return {"model_dir": str(output), "models": len(models)}
    sum_of_params = None
    for model, weight in zip(models, weights, strict=True):
        directory = os.path.join(run_dir or "", model)
        config = checkpoints.load_config(directory)
        params, variables = nnx.split(checkpoints.load_model(directory), nnx.Param, ...)[1:]
        share = jax.tree.map(lambda x, w=weight: np.asarray(x, np.float64) * (w / total), params)
        if sum_of_params is None:
            first, shapes, sum_of_params = directory, _shapes(params), share
        else:
            _require_same_sizes(first, shapes, directory, _shapes(params))
            sum_of_params = jax.tree.map(np.add, sum_of_params, share)
    merged = jax.tree.map(lambda mean, like: mean.astype(like.dtype), sum_of_params, params)
    checkpoints.save_states(output, {"model": config}, {"model": (merged, variables)})
    launch.save_operative_config(output)
    size = sum(x.size for x in jax.tree.leaves(merged))
    return {"model_dir": str(output), "models": len(models), "parameters": size}


def _shapes(params) -> dict[str, tuple[int, ...]]:
    from t5x_audio.training import checkpoints

    return {name: tuple(x.shape) for name, x in checkpoints.named_arrays(params).items()}


def _require_same_sizes(first: str, expected: dict, directory: str, shapes: dict) -> None:
    for name in expected | shapes:
        if expected.get(name) != shapes.get(name):
            raise UserError(
                f"{directory}: {name} is {shapes.get(name, 'absent')} but {expected.get(name)} in "
                f"{first}; only models of one size can be merged"
            )


if __name__ == "__main__":
    launch.main("t5x_audio.merge", description=__doc__)
