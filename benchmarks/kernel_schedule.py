# ruff: noqa: E402
"""What square-root ALiBi costs in attention, beside splash attention, by the compiler's schedule.

    python benchmarks/kernel_schedule.py --output=docs/results/kernels.md

XLA's TPU compiler (`make pods`) compiles the kernels at the 130B's shape with and without the bias
and writes down the instructions of one grid step, which meets one block of queries of a group's
heads with one block of keys and has no loop inside. A core issues one bundle of instructions a
cycle, and its matrix units do 131,072 operations in one; a step takes the longer of the two. What
waits for memory is not in it. Nothing is run on a TPU.

The peer is splash attention of JAX, causal, with segment ids and no bias (a model with RoPE rotates
queries and keys besides), at the better of two block sizes; its steps are scaled to the same pairs.
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
KERNELS = {"forward": ("f.1", 2), "backward": ("b.2", 5)}
SPLASH = {"forward": "splash_mqa_fwd*", "backward": "splash_mqa_dkv*"}
SPLASH_BLOCKS = (512, 1024)
OPERATIONS_A_CYCLE = 131072  # of a core: four units of 128 x 128
TOPOLOGIES = ("v5p:2x2x1", "v5e:2x2x1")


_HEAD = f"""# The attention kernels by the compiler's schedule

One grid step of each kernel at the 130B's shape ({HEADS} heads a group, head size {DIM}, blocks of
{BLOCK}, bfloat16) on one core: the bundles that XLA's TPU compiler schedules, and what the matrix
products take at the peak of the matrix units. A step takes the longer of the two. Waiting for
memory is not in it, and nothing was run on a TPU.

Splash is JAX's splash attention with segment ids, no bias and its fused backward kernel, at the
better of blocks of {SPLASH_BLOCKS[0]} and {SPLASH_BLOCKS[1]}, for as many pairs; the last column is
what ours takes of that, with the bias. A model with RoPE also rotates its queries and keys, which
is not counted.

Made by `python benchmarks/kernel_schedule.py`, """


def abstract_arrays(topology: str):
    """(shape, type) -> an array of that on a chip of the topology."""
    from t5x_audio.planning import topology as topologies

    device = topologies.devices(topology)[0]
    import jax

    def array(shape, dtype="bfloat16"):
        place = jax.sharding.SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    return array


def compile_splash(topology: str, block: int) -> None:
    """Compiles forward and backward of splash attention, one group as there are many alike."""
    array = abstract_arrays(topology)
    import jax
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.CausalMask((LENGTH, LENGTH)) for _ in range(HEADS)])
    kernel = splash.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def total(query, key, value, segments):
        output = kernel(query, key, value, segment_ids=splash.SegmentIds(segments, segments))
        return output.astype("float32").sum()

    query, key, segments = array((HEADS, LENGTH, DIM)), array((LENGTH, DIM)), (LENGTH,)
    lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(query, key, key, array(segments, "int32"))
    lowered.compile()


def compile_kernels(topology: str, biased: bool) -> None:
    """Compiles forward and backward of ours."""
    array = abstract_arrays(topology)
    import jax
    import numpy as np

    from t5x_audio.backbone import flash_attention
    from t5x_audio.backbone.alibi import alibi_slopes

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


def bundles(folder: pathlib.Path, kernel: str) -> int:
    """Of a grid step."""
    (schedule,) = folder.glob(f"*-{kernel}-*-schedule-analysis_final_bundles.txt")
    return int(re.search(r"total scheduled bundles:\s+(\d+)", schedule.read_text())[1])


def measure(kernels: dict[str, str], *what: str) -> dict[str, int]:
    """`bundles` of every kernel, compiled in a process of its own, which dumps its schedules."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, __file__, "--compile", *what]
        subprocess.run(command, check=True, env=os.environ | {"LIBTPU_INIT_ARGS": dump})
        return {name: bundles(pathlib.Path(folder), kernel) for name, kernel in kernels.items()}


def splash(topology: str) -> dict[str, float]:
    """Cycles of splash attention for the pairs of a grid step of ours, at its better block size."""
    found = []
    for block in SPLASH_BLOCKS:
        steps = HEADS * (BLOCK / block) ** 2
        found.append(measure(SPLASH, topology, "splash", str(block)))
        found[-1] = {name: count * steps for name, count in found[-1].items()}
    return {name: min(row[name] for row in found) for name in SPLASH}


def section(topology: str) -> list[str]:
    """The table of one chip."""
    names = {name: kernel for name, (kernel, _) in KERNELS.items()}
    with_bias, without = (measure(names, topology, "ours", biased) for biased in ("1", "0"))
    peer = splash(topology)
    lines = [
        f"## {topology.partition(':')[0]}", "",
        "| kernel | bundles | matrix units, cycles | of their peak | without bias | bias costs |"
        " splash | of splash |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    sums = [0, 0, 0, 0]
    for name, (_, products) in KERNELS.items():
        busy = products * 2 * HEADS * BLOCK**2 * DIM // OPERATIONS_A_CYCLE
        row = (max(with_bias[name], busy), busy, max(without[name], busy), max(peer[name], busy))
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        lines.append(_line(name, *row))
    return [*lines, _line("together", *sums), ""]


def _line(name: str, took, busy, plain, peer) -> str:
    return (
        f"| {name} | {took:,} | {busy:,} | {busy / took:.0%} | {plain:,} | {took / plain - 1:.1%} "
        f"| {peer:,.0f} | {took / peer:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="docs/results/kernels.md")
    parser.add_argument("--compile", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.compile:
        topology, whose, option = flags.compile
        if whose == "ours":
            compile_kernels(topology, option == "1")
        else:
            compile_splash(topology, int(option))
        return
    tables = [line for topology in TOPOLOGIES for line in section(topology)]
    sys.path.append(f"{sys.prefix}/pods")  # for the version of libtpu
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    head = _HEAD + f"{datetime.date.today()}, {versions}.\n"
    pathlib.Path(flags.output).write_text("\n".join([head, *tables]))
    print(f"done: {flags.output}")


if __name__ == "__main__":
    main()
