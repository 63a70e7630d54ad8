# ruff: noqa: E402
"""What square-root ALiBi costs in the flash-attention kernels, by the compiler's own schedule.

    python benchmarks/kernel_schedule.py --output=docs/results/kernels.md

XLA's TPU compiler (`make pods`) compiles the kernels at the 130B's shape with and without the bias
and writes down the instructions of one grid step, which meets one block of queries of a group's
heads with one block of keys and has no loop inside. A core issues one bundle of instructions a
cycle, and its matrix units do 131,072 operations in one; a step takes the longer of the two. What
waits for memory is not in it. Nothing is run on a TPU.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

GROUPS, HEADS, LENGTH, DIM = 8, 12, 4096, 128
BLOCK = 512  # queries and keys that meet in a grid step
# name -> (what the compiler calls it, its matrix products)
KERNELS = {
    "forward": ("f.1", 2),
    "queries' gradient": ("b.2", 3),
    "keys' and values' gradient": ("b.3", 4),
}
OPERATIONS_A_CYCLE = 131072  # of a core: four units of 128 x 128
TOPOLOGIES = ("v5p:2x2x1", "v5e:2x2x1")


_HEAD = f"""# The attention kernels by the compiler's schedule

One grid step of each kernel at the 130B's shape ({HEADS} heads a group, head size {DIM}, blocks of
{BLOCK}, bfloat16) on one core: the bundles that XLA's TPU compiler schedules, and what the matrix
products take at the peak of the matrix units. A step takes the longer of the two. Waiting for
memory is not in it, and nothing was run on a TPU. What the bias adds to a training step is the last
cell of a table times attention's share of the step (pods.md).

Made by `python benchmarks/kernel_schedule.py`, """


def compile_kernels(topology: str, biased: bool, folder: str) -> None:
    """Compiles forward and backward; the compiler writes its schedules into the folder."""
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    from t5x_audio.planning import topology as topologies

    device = topologies.devices(topology)[0]
    import jax
    import numpy as np

    from t5x_audio.backbone import flash_attention
    from t5x_audio.backbone.alibi import alibi_slopes

    def array(shape, dtype="bfloat16"):
        place = jax.sharding.SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    query = array((1, GROUPS, HEADS, LENGTH, DIM))
    key, segments = array((1, GROUPS, LENGTH, DIM)), array((1, LENGTH), "int32")
    row = array((1, GROUPS, HEADS, LENGTH), "float32")
    slopes = np.float32(alibi_slopes(GROUPS * HEADS)).reshape(GROUPS, HEADS) if biased else None

    def f(query, key, value, segments):
        return flash_attention.forward(
            query, key, value, (segments, segments), slopes, block_size=BLOCK
        )

    def b(query, key, value, segments, *saved):
        places = (segments, segments)
        return flash_attention.backward(query, key, value, places, *saved, slopes, block_size=BLOCK)

    jax.jit(f).lower(query, key, key, segments).compile()
    jax.jit(b).lower(query, key, key, segments, row, row, query).compile()


def cycles(folder: pathlib.Path, kernel: str, products: int) -> tuple[int, int]:
    """(bundles of a grid step, cycles of its products at the peak of the matrix units)."""
    (schedule,) = folder.glob(f"*-{kernel}-*-schedule-analysis_final_bundles.txt")
    bundles = int(re.search(r"total scheduled bundles:\s+(\d+)", schedule.read_text())[1])
    return bundles, products * 2 * HEADS * BLOCK**2 * DIM // OPERATIONS_A_CYCLE


def measure(topology: str, biased: bool) -> dict[str, tuple[int, int]]:
    """`cycles` of every kernel, compiled in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--compile", topology, str(int(biased)), folder]
        subprocess.run(command, check=True)
        folder = pathlib.Path(folder)
        return {name: cycles(folder, *kernel) for name, kernel in KERNELS.items()}


def section(topology: str) -> list[str]:
    """The table of one chip."""
    with_bias, without = (measure(topology, biased) for biased in (True, False))
    lines = [
        f"## {topology.partition(':')[0]}", "",
        "| kernel | bundles | matrix units, cycles | of their peak | without bias | costs |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    sums = [0, 0, 0]
    rows = {name: (with_bias[name], without[name]) for name in KERNELS}
    for name, ((bundles, busy), (plain, _)) in rows.items():
        took, took_plain = max(bundles, busy), max(plain, busy)
        sums = [a + b for a, b in zip(sums, (took, took_plain, busy), strict=True)]
        lines.append(
            f"| {name} | {bundles:,} | {busy:,} | {busy / took:.0%} | {plain:,} | "
            f"{took / took_plain - 1:.1%} |"
        )
    took, took_plain, busy = sums
    lines.append(
        f"| together, cycles | {took:,} | {busy:,} | {busy / took:.0%} | {took_plain:,} | "
        f"{took / took_plain - 1:.1%} |"
    )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="docs/results/kernels.md")
    parser.add_argument("--compile", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.compile:
        topology, biased, folder = flags.compile
        compile_kernels(topology, biased == "1", folder)
        return
    tables = [line for topology in TOPOLOGIES for line in section(topology)]
    sys.path.append(f"{sys.prefix}/pods")  # for the version of libtpu
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    head = _HEAD + f"{datetime.date.today()}, {versions}.\n"
    pathlib.Path(flags.output).write_text("\n".join([head, *tables]))
    print(f"done: {flags.output}")


if __name__ == "__main__":
    main()
