"""Which activations of a layer are kept for the backward pass; all others are computed again.

What a policy keeps, a layer and token, in numbers of the model's width E (Step-1 at 130B: 24 KiB
each; its feed-forward is 2.54 E wide, its keys and values E / 6):

    full         the layer's input                              E    computes the forward pass again
    attention    and what attention returns                    2 E   attention's scores no more
    projections  and query, key, value                         3.2 E
    residual     and the sum behind attention                  4.2 E norms and the feed-forward only
    products     and both inner products of the feed-forward   8.3 E (without the sum) norms, SwiGLU
                                                                     and attention's projection
    all_products all of these                                  9.3 E no matrix product again
    offload      as `all_products`, the feed-forward's in the memory of the host
    none         everything, also what is cheap to compute

The names are given where the values are made, by `named`.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name as named

__all__ = ["POLICIES", "named", "remat"]

_ATTENTION = ("mixed", "log_sum")
_PROJECTIONS = (*_ATTENTION, "query", "key", "value")
_RESIDUAL = (*_PROJECTIONS, "residual")
_INNER = ("gate", "up")
_NAMES = {
    "full": (),
    "attention": _ATTENTION,
    "projections": _PROJECTIONS,
    "residual": _RESIDUAL,
    "products": (*_PROJECTIONS, *_INNER),
    "all_products": (*_RESIDUAL, *_INNER),
}
POLICIES = ("none", *_NAMES, "offload")


def remat(function, policy: str):
    """`function`, which computes again in its backward pass what `policy` does not keep."""
    if policy == "none":
        return function
    if policy == "offload":
        rule = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(_RESIDUAL),
            names_which_can_be_offloaded=list(_INNER),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        rule = jax.checkpoint_policies.save_only_these_names(*_NAMES[policy])
    return functools.partial(jax.checkpoint, policy=rule)(function)
