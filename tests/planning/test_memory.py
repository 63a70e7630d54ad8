"""The split of a step's memory: shards of the state, stacks by the pass that writes them."""

import types

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_audio.planning import hlo, memory

LOOP = """\
%condition{0} (c: (s32[], f32[4,8])) -> pred[] {{
  %c = (s32[], f32[4,8]{{1,0}}) parameter(0)
  %limit = s32[] constant(4)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}}

%body{0} (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %s = (s32[], f32[4,8]{{1,0}}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %stack = f32[4,8]{{1,0}} get-tuple-element(%s), index=1
  %row = f32[1,8]{{1,0}} constant({{...}})
  %written = f32[4,8]{{1,0}} dynamic-update-slice(%stack, %row, %n, %n), \
metadata={{op_name="jit(step)/{1}/while/body/dynamic_update_slice"}}
  ROOT %t = (s32[], f32[4,8]{{1,0}}) tuple(%n, %written)
}}
"""
MAIN = """\
ENTRY %main (t: (s32[], f32[4,8])) -> f32[] {
  %t = (s32[], f32[4,8]{1,0}) parameter(0)
  %w1 = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition1, body=%body1
  %w2 = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition2, body=%body2
  ROOT %end = f32[] constant(0)
}
"""


def test_split():
    devices = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def leaf(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices, spec))

    template = types.SimpleNamespace(
        params={"a": leaf((8, 16), P("fsdp"))},
        opt_state=[leaf((8, 16), P("fsdp")), leaf((8, 16), P(None, "fsdp"))],
        step=leaf((), P(), jnp.int32),
        variables={"key": jax.eval_shape(lambda: jax.random.key(0))},
    )
    batch = {"tokens": leaf((16, 8), P(("data", "fsdp")), jnp.int32)}
    stats = types.SimpleNamespace(
        temp_size_in_bytes=1000, argument_size_in_bytes=500, output_size_in_bytes=460,
        alias_size_in_bytes=450, generated_code_size_in_bytes=40,
    )  # fmt: skip
    compiled = types.SimpleNamespace(memory_analysis=lambda: stats)
    text = "\n".join([LOOP.format(1, "jvp()"), LOOP.format(2, "transpose(jvp())"), MAIN])
    found = memory.split(compiled, hlo.Module(text), template, batch)
    assert found == memory.Memory(
        parameters=128, optimizer=256, other_state=4, batch=64, activations=128, gradients=128,
        temporaries=1000 - 256, code=40, total=500 + 10 + 1000 + 40,
    )  # fmt: skip
