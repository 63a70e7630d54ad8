"""Floating-point operations of a function, counted in its jaxpr.

XLA's own cost analysis counts the body of a loop once; here a scan's body is multiplied by its
length, so the count holds for scanned layers. Counted are matrix products and convolutions (two
operations per multiply-add), as is the convention for model FLOPs; element-wise work, which costs
memory traffic rather than arithmetic, is not. What rematerialisation computes again is in the
jaxpr of a gradient and so is counted: these are hardware FLOPs of the step as it is run.
"""

import math

import jax
from jax.extend import core


def count_flops(function, *args, **kwargs) -> int:
    """FLOPs of matrix products and convolutions in one call of `function`.

    Args:
      function: any traceable function.
      *args, **kwargs: its arguments, or ShapeDtypeStructs in their place.

    All devices of a mesh are counted. A `while` loop, whose length is unknown, is counted once; of
    a `cond` the dearest branch counts.
    What a Pallas kernel does is not seen.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args, **kwargs).jaxpr, None)


def model_flops_per_token(params) -> int:
    """6 N: what a training step has to compute for a token of a language model.

    The convention behind every MFU of this project (PaLM, arXiv 2204.02311, appendix B): two
    operations for each weight forward and four backward. N leaves out the embedding's table, whose
    rows are looked up, unless it is the head too. Attention's own products and what
    rematerialisation computes again are left out.

    Args:
      params: a tree of arrays or ShapeDtypeStructs; table and head have these names.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    tied = not any("head" in name.split("/") for name in leaves)
    counted = (n for name, n in leaves.items() if tied or "embedding" not in name.split("/"))
    return 6 * sum(counted)


class StepFlops:
    """FLOPs of a jitted training step by the shapes of its batch and its phase, counted once."""

    def __init__(self, step):
        """`step`: the jitted function of (state, batch)."""
        self._step, self._known = step, {}

    def __call__(self, state, batch, branch: int | None = None) -> int:
        """FLOPs of `step(state, batch)`; nothing is run, and the trace serves the call too.

        Args:
          state, batch: of the step.
          branch: which branch its `cond` takes (see `Learner.branch`); None = the dearest.
        """
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if (shapes, branch) not in self._known:
            jaxpr = self._step.trace(state, batch).jaxpr.jaxpr
            self._known[shapes, branch] = _jaxpr_flops(jaxpr, branch)
        return self._known[shapes, branch]


def _jaxpr_flops(jaxpr, branch: int | None) -> int:
    return sum(_equation_flops(equation, branch) for equation in jaxpr.eqns)


def _equation_flops(equation, branch: int | None) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name == "scan":
        return params["length"] * _jaxpr_flops(params["jaxpr"].jaxpr, branch)
    if name == "cond":
        costs = [_jaxpr_flops(one.jaxpr, branch) for one in params["branches"]]
        return max(costs) if branch is None else costs[branch]
    inside = sum(_jaxpr_flops(inner, branch) for inner in _inner_jaxprs(params))
    # Its shapes are those of one device's share.
    return params["mesh"].size * inside if name == "shard_map" else inside


def _dot_flops(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    outputs = math.prod(equation.outvars[0].aval.shape)
    return 2 * outputs * math.prod(left[axis] for axis in contracted)


def _convolution_flops(equation) -> int:
    """Products with padding and with the zeros of a dilated input are counted like all others."""
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    outputs = math.prod(equation.outvars[0].aval.shape)
    per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    dilation = math.prod(equation.params["lhs_dilation"])
    groups = equation.params["batch_group_count"]
    return 2 * outputs * per_output // (dilation * groups)


def _inner_jaxprs(params):
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
