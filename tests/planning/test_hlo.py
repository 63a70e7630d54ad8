"""Reading optimised HLO: a program of known structure, and products counted one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.planning import hlo

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_computation (param_0: bf16[8,16], param_1: bf16[16,4]) -> f32[8,4] {
  %param_0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[16,4]{1,0} parameter(1)
  ROOT %convolution.1 = f32[8,4]{1,0} convolution(%param_0, %param_1), dim_labels=bf_io->bf
}

%cond (arg: (s32[], bf16[8,16])) -> pred[] {
  %arg = (s32[]{:T(128)}, /*index=1*/bf16[8,16]{1,0}) parameter(0)
  %limit = s32[] constant(12)
  %gte = s32[] get-tuple-element(%arg), index=0
  ROOT %lt = pred[] compare(%gte, %limit), direction=LT
}

%body (arg.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %gte.1 = s32[] get-tuple-element(%arg.1), index=0
  %gte.2 = bf16[8,16]{1,0} get-tuple-element(%arg.1), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%gte.1, %two)
  %weights = bf16[16,4]{1,0} constant({...})
  %product = f32[8,4]{1,0} fusion(%gte.2, %weights), kind=kOutput, calls=%fused_computation, \
metadata={op_name="a, b{c"}, backend_config={"window_config":{"estimated_cycles":"52"}}
  ROOT %tuple = (s32[], bf16[8,16]{1,0}) tuple(%next, %gte.2)
}

%left (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}

ENTRY %main (x: bf16[8,16], y: f32[3,5], z: f32[5,7]) -> f32[3,7] {
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %y = f32[3,5]{1,0} parameter(1)
  %z = f32[5,7]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,16]{1,0}) tuple(%zero, %x)
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%start), condition=%cond, body=%body
  %kernel = (bf16[8,16]{1,0}, f32[8]{0}) custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"640","transcendentals":"32",\
"bytes_accessed":"99"}}}
  %called = f32[4]{0} call(%y), to_apply=%left
  ROOT %dot = f32[3,7]{1,0} dot(%y, %z), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.Module(PROGRAM)


def test_structure(module):
    assert module.entry.name == "main" and len(module.computations) == 5
    assert module.entry.root.name == "dot"
    assert [p.name for p in module.entry.parameters] == ["x", "y", "z"]
    loop = module.entry.instructions["while.1"]
    assert loop.operands == ("start",)
    assert loop.results == (hlo.Array("s32", ()), hlo.Array("bf16", (8, 16)))
    assert loop.result_bytes == loop.hbm_bytes == 4 + 256
    x, y = (module.entry.instructions[name] for name in "xy")
    assert (x.result_bytes, x.hbm_bytes, y.hbm_bytes) == (256, 0, 60)
    product = module.computations["body"].instructions["product"]
    assert product.attribute("kind") == "kOutput" and product.estimated_cycles == 52
    assert product.attribute("nothing") is None
    assert module.operand_bytes(product, module.computations["body"]) == 256 + 128
    kernel = module.entry.instructions["kernel"]
    assert kernel.cost_estimate == {"flops": 640, "transcendentals": 32, "bytes_accessed": 99}


def test_loops_are_multiplied_by_their_own_step(module):
    assert module.trip_count(module.entry.instructions["while.1"]) == 6
    times = {instruction.name: count for instruction, _, count in module.executed()}
    assert times["product"] == 6 and times["dot"] == 1 and times["p"] == 1
    assert "convolution.1" not in times and "lt" not in times
    flops = sum(n * module.product_flops(i, c) for i, c, n in module.executed())
    assert flops == 6 * 2 * 8 * 16 * 4 + 2 * 3 * 5 * 7


def test_a_loop_that_may_end_early_counts_to_its_limit():
    text = PROGRAM.replace("ROOT %lt = pred[] compare(", "%lt = pred[] compare(")
    assert text != PROGRAM
    head, found, tail = text.partition("%lt = pred[] compare(")
    line, end, rest = tail.partition("\n")
    more = "  %live = pred[] parameter(1)\n  ROOT %both = pred[] and(%lt, %live)\n"
    module = hlo.Module(head + found + line + end + more + rest)
    assert module.trip_count(module.entry.instructions["while.1"]) == 6


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Module("nothing of the kind")


@settings(max_examples=300)
@given(
    left=st.integers(1, 9), taps=st.integers(1, 9), stride=st.integers(1, 4),
    before=st.integers(-3, 8), after=st.integers(0, 8), left_dilation=st.integers(1, 4),
    right_dilation=st.integers(1, 4),
)  # fmt: skip
def test_products_with_padding_are_not_counted(
    left, taps, stride, before, after, left_dilation, right_dilation
):
    width = (left - 1) * left_dilation + 1 + before + after
    outputs = (width - (taps - 1) * right_dilation - 1) // stride + 1
    if outputs < 1:
        return
    text = PROGRAM.replace(
        "ROOT %dot = f32[3,7]{1,0} dot(%y, %z), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        f"%l = f32[2,{left},3]{{2,1,0}} parameter(3)\n"
        f"  %r = f32[{taps},3,5]{{2,1,0}} parameter(4)\n"
        f"  ROOT %conv = f32[2,{outputs},5]{{2,1,0}} convolution(%l, %r), "
        f"window={{size={taps} stride={stride} pad={before}_{after} lhs_dilate={left_dilation} "
        f"rhs_dilate={right_dilation}}}, dim_labels=b0f_0io->b0f",
    )
    module = hlo.Module(text)
    pairs = 0
    for output in range(outputs):
        for tap in range(taps):
            place = output * stride + tap * right_dilation - before
            pairs += 0 <= place <= (left - 1) * left_dilation and place % left_dilation == 0
    entry = module.entry
    assert module.product_flops(entry.instructions["conv"], entry) == 2 * 2 * 3 * 5 * pairs
