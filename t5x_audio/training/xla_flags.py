"""Named sets of flags for XLA's TPU compiler: what they do, for which chips, and why.

A hardware file of gin chooses sets by name (`train.run.xla_flags`); `plan` compiles with the same.
They go into LIBTPU_INIT_ARGS, which libtpu reads when JAX looks for devices, so before that.
What the environment says already stays, and wins. Sources: benchmarks/xla_flags_library.py and
configs/tpu of MaxText.

Left out on purpose: `xla_tpu_enable_async_collective_fusion_fuse_all_gather` on v5p, published with
MaxText's recipes, since libtpu 0.0.52 refuses it there as "not supported ... incorrect results".
"""

import dataclasses
import os
from collections.abc import Sequence

from t5x_audio.errors import UserError

VARIABLE = "LIBTPU_INIT_ARGS"


@dataclasses.dataclass(frozen=True)
class FlagSet:
    """Flags that belong together.

    Attributes:
      chips: on which they may be set.
      why: what they are for.
      flags: name -> value.
    """

    chips: tuple[str, ...]
    why: str
    flags: dict[str, str]


def _all(value: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, value)


SETS = {
    "sparse_core_collectives": FlagSet(
        ("v5p", "v6e", "tpu7x"),
        "Gathers, scatters and reductions run on the SparseCores, beside the matrix products. "
        "Without them every collective of FSDP stops a v5p. Excludes continuation fusion.",
        _all(
            "true",
            "xla_enable_async_all_gather",
            "xla_tpu_enable_sparse_core_collective_offload_all_gather",
            "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
            "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather",
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
            "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter",
            "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
            "xla_tpu_enable_all_gather_offload_tracing",
            "xla_tpu_enable_reduce_scatter_offload_tracing",
            "xla_tpu_enable_all_reduce_offload_tracing",
            "xla_tpu_use_tc_device_shape_on_sc",
            "xla_sc_disable_megacore_partitioning",
        )
        | _all(
            "false",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
            "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter",
            "xla_sc_enable_instruction_fusion",
            "xla_sc_disjoint_spmem",
        ),
    ),
    "continuation_fusion": FlagSet(
        ("v4", "v5e"),
        "Gathers of weights go on in pieces inside the matrix products before them.",
        _all(
            "true",
            "xla_tpu_enable_async_collective_fusion",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
            "xla_tpu_enable_async_collective_fusion_multiple_steps",
            "xla_tpu_overlap_compute_collective_tc",
            "xla_enable_async_all_gather",
        ),
    ),
    "data_parallel_overlap": FlagSet(
        ("v4", "v5e", "v5p", "v6e"),
        "Gradients that all replicas sum travel while the backward pass goes on.",
        _all(
            "true",
            "xla_tpu_enable_data_parallel_all_reduce_opt",
            "xla_tpu_data_parallel_opt_different_sized_ops",
        ),
    ),
}


def apply(names: Sequence[str], chip: str | None = None) -> None:
    """Puts the flags of the named sets into the environment.

    Args:
      names: of SETS; a later set wins.
      chip: for which a program is compiled, if that is known.

    Raises:
      UserError: no such set, or one that is not for this chip.
    """
    flags: dict[str, str] = {}
    for name in names:
        if name not in SETS:
            raise UserError(f"xla_flags: {name!r} is none of {', '.join(SETS)}")
        if chip is not None and chip not in SETS[name].chips:
            raise UserError(f"xla_flags: {name} is for {', '.join(SETS[name].chips)}, not {chip}")
        flags |= SETS[name].flags
    given = os.environ.get(VARIABLE, "").split()
    said = {flag.lstrip("-").partition("=")[0] for flag in given}
    given += [f"--{name}={value}" for name, value in flags.items() if name not in said]
    if given:
        os.environ[VARIABLE] = " ".join(given)
