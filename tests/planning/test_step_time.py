"""The model of a step's time on small programs, against sums done by hand."""

import types

import pytest

from t5x_audio.planning import chips, collectives, hlo, step_time

CHIP = chips.chip("v5e")
DEVICES = [types.SimpleNamespace(coords=(i, 0, 0), slice_index=0) for i in range(4)]
TORUS = collectives.Torus.of(DEVICES)  # a line of four: one link
COMPUTATIONS = """\
%product_of (a: bf16[512,1024], b: bf16[1024,256]) -> f32[512,256] {
  %a = bf16[512,1024]{1,0} parameter(0)
  %b = bf16[1024,256]{1,0} parameter(1)
  ROOT %c = f32[512,256]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (r: f32[4096]) -> f32[1024] {
  %r = f32[4096]{0} parameter(0)
  %sum = f32[4096]{0} all-reduce(%r), replica_groups={{0,1,2,3}}
  ROOT %part = f32[1024]{0} slice(%sum)
}

%gather_in (g: f32[1024]) -> f32[4096] {
  %g = f32[1024]{0} parameter(0)
  ROOT %all = f32[4096]{0} all-gather(%g), replica_groups={{0,1,2,3}}, \
frontend_attributes={chain_id="7"}
}

%update (u: f32[8,1024], v: f32[1,1024], w: f32[64,1024], i: s32[]) -> f32[8,1024] {
  %u = f32[8,1024]{1,0} parameter(0)
  %v = f32[1,1024]{1,0} parameter(1)
  %w = f32[64,1024]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %one = f32[1,1024]{1,0} dynamic-slice(%w, %i, %i)
  %sum.1 = f32[1,1024]{1,0} add(%v, %one)
  ROOT %updated = f32[8,1024]{1,0} dynamic-update-slice(%u, %sum.1, %i, %i)
}

%relaid (q: f32[64,1024]) -> f32[64,1024] {
  %q = f32[64,1024]{1,0} parameter(0)
  ROOT %same = f32[64,1024]{1,0} copy(%q)
}

%row_of (l: f32[64,1024], j: s32[]) -> f32[1,1024] {
  %l = f32[64,1024]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %alias = f32[64,1024]{1,0} fusion(%l), kind=kLoop, \
output_to_operand_aliasing={{}: (0, {})}, calls=%relaid
  ROOT %found = f32[1,1024]{1,0} dynamic-slice(%alias, %j, %j)
}

%nested (m: f32[64,1024], k: s32[]) -> f32[1,1024] {
  %m = f32[64,1024]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %seen = f32[64,1024]{1,0} bitcast(%m)
  %inner = f32[1,1024]{1,0} fusion(%seen, %k), kind=kLoop, calls=%row_of
  ROOT %double = f32[1,1024]{1,0} add(%inner, %inner)
}

%condition (c: (s32[], f32[1024])) -> pred[] {
  %c = (s32[], f32[1024]{0}) parameter(0)
  %limit = s32[] constant(10)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

%body (s: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %s = (s32[], f32[1024]{0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %v1 = f32[1024]{0} get-tuple-element(%s), index=1
  %inc = s32[] constant(1)
  %next = s32[] add(%n, %inc)
  %ar = f32[1024]{0} all-reduce(%v1), replica_groups={{0,1,2,3}}
  ROOT %t = (s32[], f32[1024]{0}) tuple(%next, %ar)
}
"""
PRODUCT = (
    "%p{0} = f32[512,256]{{1,0}} fusion(%x, %y), kind=kOutput, calls=%product_of, "
    'backend_config={{"estimated_cycles":"300000"}}'
)
CYCLES = 300000 / CHIP.clock
FLOPS = 2 * 512 * 1024 * 256


def program(*lines):
    body = "\n  ".join(
        [
            "%x = bf16[512,1024]{1,0:T(8,128)S(1)} parameter(0)",
            "%y = bf16[1024,256]{1,0:T(8,128)S(1)} parameter(1)",
            "%z = f32[1024]{0} parameter(2)",
            "%zero = s32[] constant(0)",
            *lines,
            "ROOT %end = () tuple()",
        ]
    )
    head = "ENTRY %main (x: bf16[512,1024], y: bf16[1024,256], z: f32[1024]) -> () {\n  "
    return hlo.Module(f"{COMPUTATIONS}\n{head}{body}\n}}\n")


def step(module, model="hybrid"):
    return step_time.StepTime(module, CHIP, TORUS, model).step()


def gather_seconds(size):
    return size * 3 / 4 / CHIP.link_bandwidth + 3e-6


def test_products_by_cycles_and_by_peak():
    module = program(PRODUCT.format(1), PRODUCT.format(2))
    found = step(module)
    assert found.products == found.compute == found.seconds == pytest.approx(2 * CYCLES)
    assert found.product_flops == 2 * FLOPS
    roofline = step(module, "roofline").seconds
    assert roofline == pytest.approx(
        2 * max(FLOPS / (0.92 * 197e12), 512 * 256 * 4 / 0.85 / 8.1e11)
    )


def test_kernels_and_everything_else():
    module = program(
        '%k = f32[1024]{0} custom-call(%z), backend_config={"cost_estimate":{"flops":"985000"}}',
        "%e = f32[1024]{0} add(%z, %z)",
        "%b = f32[32,32]{1,0} bitcast(%e)",
    )
    found = step(module)
    assert found.kernels == pytest.approx(985000 / 0.5 / 197e12) and found.kernel_flops == 985000
    assert found.rest == pytest.approx(3 * 4096 / 0.85 / 8.1e11)


def test_a_loop_is_its_body_times_its_trips():
    loop = (
        "%t0 = (s32[], f32[1024]{0}) tuple(%zero, %z)",
        "%w = (s32[], f32[1024]{0}) while(%t0), condition=%condition, body=%body",
    )
    found = step(program(*loop))
    use = found.uses["all-reduce", "sync"]
    assert (use.count, use.bytes) == (10, 10 * 4096)
    assert use.exposed == use.seconds == pytest.approx(20 * gather_seconds(4096))
    assert found.seconds == pytest.approx(use.exposed + found.rest)


PERMUTE = (
    "%start = (f32[1024]{0}, f32[1024]{0}, u32[], u32[]) collective-permute-start(%z), "
    "source_target_pairs={{0,1},{1,2},{2,3}}"
)


def test_what_computation_hides_is_not_exposed():
    done = "%done = f32[1024]{0} collective-permute-done(%start)"
    took = 4096 / CHIP.link_bandwidth + 1e-6
    found = step(program(PERMUTE, PRODUCT.format(1), done))
    assert found.uses["collective-permute", "async"].seconds == pytest.approx(took)
    assert found.seconds == pytest.approx(CYCLES) and found.exposed == 0
    found = step(program(PERMUTE, done, PRODUCT.format(1)))
    assert found.exposed == pytest.approx(took)
    assert found.seconds == pytest.approx(CYCLES + took)


def test_collectives_on_the_same_links_queue():
    second = PERMUTE.replace("%start", "%other")
    found = step(
        program(
            PERMUTE, second, "%done = f32[1024]{0} collective-permute-done(%start)",
            "%done2 = f32[1024]{0} collective-permute-done(%other)",
        )
    )  # fmt: skip
    assert found.seconds == pytest.approx(2 * (4096 / CHIP.link_bandwidth + 1e-6))


def test_an_all_reduce_that_is_sliced_is_a_reduce_scatter():
    wide = "%wide = f32[4096]{0} broadcast(%zero)"
    fusion = "%rs = f32[1024]{0} fusion(%wide), kind=kCustom, calls=%all-reduce-scatter.1"
    found = step(program(wide, fusion))
    use = found.uses["reduce-scatter", "sync"]
    assert (use.count, use.bytes) == (1, 16384)
    assert use.exposed == pytest.approx(gather_seconds(16384))


def test_a_collective_carried_by_fusions():
    start = "%async-collective-start = (f32[1024]{0}) fusion(%z), kind=kCustom, calls=%gather_in"
    carry = "%fusion.9 = (f32[1024]{0}) fusion(%z), kind=kCustom, calls=%gather_in"
    done = "%async-collective-done = f32[4096]{0} fusion(%z), kind=kCustom, calls=%gather_in"
    found = step(program(start, carry, PRODUCT.format(1), done))
    use = found.uses["all-gather", "async"]
    assert use.count == 1 and use.seconds == pytest.approx(gather_seconds(16384))
    assert found.exposed == 0


@pytest.mark.parametrize(
    "lines",
    [
        (
            "%start = ((f32[1024]{0}), f32[4096]{0}) call-start(%z), to_apply=%gather_in",
            "%done = f32[4096]{0} call-done(%start)",
        ),
        (
            "%start.0 = ((), (), (s32[8]{0})) custom-call-start(), "
            "called_computations={%gather_in}",
            "%start = ((f32[1024]{0}), f32[4096]{0}) custom-call-update(%start.0, %z)",
            "%done = f32[4096]{0} custom-call-done(%start)",
        ),
    ],
)
def test_a_sparse_core_gathers_beside_the_products(lines):
    *begins, done = lines
    hidden = step(program(*begins, PRODUCT.format(1), done))
    use = hidden.uses["all-gather", "async"]
    assert use.count == 1 and use.seconds == pytest.approx(gather_seconds(16384))
    assert hidden.exposed == 0 and hidden.rest == 0
    assert step(program(*begins, done)).exposed == pytest.approx(gather_seconds(16384))


def test_traffic_counts_slices_and_updates():
    module = program(
        "%acc = f32[8,1024]{1,0} broadcast(%zero)",
        "%all = f32[64,1024]{1,0} broadcast(%zero)",
        "%row = f32[1,1024]{1,0} bitcast(%z)",
        "%f = f32[8,1024]{1,0} fusion(%acc, %row, %all, %zero), kind=kLoop, calls=%update",
        "%s = f32[1,1024]{1,0} dynamic-slice(%all, %zero, %zero)",
        "%d = f32[8,1024]{1,0} dynamic-update-slice(%acc, %row, %zero, %zero)",
        "%vmem = f32[1024]{0:T(1024)S(1)} add(%z, %z)",
        "%deep = f32[1,1024]{1,0} fusion(%all, %zero), kind=kOutput, calls=%nested",
    )
    entry, row = module.entry, 4096

    def traffic(name):
        return step_time.hbm_traffic(module, entry.instructions[name], entry)

    # The update is read and written, the other row and the slice are read; the index is 4 bytes.
    assert traffic("f") == 2 * row + row + row + 4
    assert traffic("s") == traffic("d") == 2 * row
    assert traffic("vmem") == 2 * row
    # Inside of a fusion in a fusion, behind a bitcast and an alias: still a slice.
    assert traffic("deep") == row + row + 4
