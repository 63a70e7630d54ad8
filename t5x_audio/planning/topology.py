"""Devices of a pod that is not there, for XLA's TPU compiler.

`libtpu` brings compiler and topologies and needs no TPU; without a device nothing can be run. Where
it is installed JAX looks for a TPU of this machine, so `make pods` keeps it in a folder of its own.
"""

import importlib.util
import os
import re
import sys

from t5x_audio.errors import UserError
from t5x_audio.planning import chips

# Chips of a host, without which a v4 comes apart into single cores.
_V4_HOST = (2, 2, 1)


# libtpu asks the machine what it is, and may be loaded only once, unless told otherwise.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def _find_compiler() -> None:
    """Makes libtpu importable: installed, or where `make pods` puts it, out of JAX's sight."""
    beside = os.path.join(sys.prefix, "pods")
    if importlib.util.find_spec("libtpu") is None and beside not in sys.path:
        sys.path.append(beside)
        importlib.invalidate_caches()
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing: `make pods`, or pip install libtpu")


def devices(topology: str, slices: int = 1) -> list:
    """Compile-only devices of e.g. 'v5p:8x8x16', in the order of the topology.

    Raises:
      UserError: no such chip or shape, or libtpu is not installed.
    """
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){1,2})", topology)
    if not found:
        raise UserError(f"--topology={topology}: write CHIP:AxB or CHIP:AxBxC, e.g. v5p:8x8x16")
    chip = chips.chip(found[1])
    _find_compiler()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    # With libtpu installed JAX would look for a TPU of this machine, and fail.
    jax.config.update("jax_platforms", "cpu")
    # What is compiled for a device that is not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    options = {"num_slices": slices} if slices > 1 else {}
    if chip.platform == "v4":
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": _V4_HOST}
    try:
        made = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # of the C API: no class of its own
        first = str(error).strip().splitlines()[0][:160]
        raise UserError(f"--topology={topology}: no such shape ({first})") from error
    return list(made.devices)
