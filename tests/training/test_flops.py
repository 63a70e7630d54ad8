"""FLOP counts against hand counts."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.training.flops import StepFlops, count_flops, model_flops_per_token


def test_matrix_product():
    assert count_flops(jnp.matmul, jnp.ones((3, 5)), jnp.ones((5, 7))) == 2 * 3 * 5 * 7


def test_batched_product_and_nested_jit():
    function = jax.jit(lambda a, b: jax.jit(jnp.einsum, static_argnums=0)("bij,bjk->bik", a, b))
    assert count_flops(function, jnp.ones((4, 3, 5)), jnp.ones((4, 5, 7))) == 4 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("unroll", [1, 4])
def test_scan_is_multiplied_by_its_length(unroll):
    weights = jnp.ones((8, 6, 6))

    def stack(x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights, unroll=unroll)[0]

    assert count_flops(stack, jnp.ones((2, 6))) == 8 * 2 * 2 * 6 * 6


def test_gradient_costs_twice_the_forward_more():
    x, w = jnp.ones((4, 16)), jnp.ones((16, 32))

    def loss(w, x):
        return (x @ w).sum()

    forward = count_flops(loss, w, x)
    assert count_flops(jax.grad(loss, argnums=(0, 1)), w, x) >= 2 * forward
    remat = jax.grad(jax.checkpoint(lambda w, x: (jnp.tanh(x @ w) @ w.T).sum()), argnums=(0, 1))
    plain = jax.grad(lambda w, x: (jnp.tanh(x @ w) @ w.T).sum(), argnums=(0, 1))
    assert count_flops(remat, w, x) > count_flops(plain, w, x)


def test_convolution():
    def convolve(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    x, k = jnp.ones((2, 21, 3)), jnp.ones((5, 3, 8))
    frames = (21 - 5) // 2 + 1
    assert count_flops(convolve, x, k) == 2 * (2 * frames * 8) * (5 * 3)


def test_the_dearest_branch_counts():
    def choose(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x, lambda x: x, x)

    assert count_flops(choose, True, jnp.ones((6, 6))) == 2 * 6**3


def test_the_branch_of_a_step():
    @jax.jit
    def step(state, batch):
        return jax.lax.cond(state > 0, lambda x: x @ x, lambda x: x, batch)

    count = StepFlops(step)
    costs = [count(1, jnp.ones((6, 6)), branch) for branch in (0, 1, None)]
    assert costs == [0, 2 * 6**3, 2 * 6**3]


def test_a_step_is_counted_once_a_shape_and_traced_once():
    traced = []

    @jax.jit
    def step(state, batch):
        traced.append(batch["x"].shape)
        return state @ batch["x"]

    count, state = StepFlops(step), jnp.ones((3, 5))
    for columns in (7, 2, 7):
        batch = {"x": jnp.ones((5, columns))}
        assert count(state, batch) == 2 * 3 * 5 * columns
        step(state, batch)
    assert traced == [(5, 7), (5, 2)]


def run_on_4_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, None), out_specs=spec)
    assert count_flops(product, jnp.ones((8, 5)), jnp.ones((5, 7))) == 2 * 8 * 5 * 7


def test_all_devices_count(on_devices):
    on_devices(4, "run_on_4_devices")


@pytest.mark.parametrize("tied", [False, True])
def test_model_flops_are_six_for_each_weight_that_multiplies(tied):
    config = TransformerConfig(
        num_layers=3, embed=8, mlp=20, num_heads=4, num_kv_heads=2, head_dim=4, vocab_size=50,
        tied_head=tied,
    )  # fmt: skip
    params = nnx.eval_shape(lambda: nnx.state(config.make(nnx.Rngs(0)), nnx.Param))
    layer = 8 * 4 * (4 + 2 + 2 + 4) + 3 * 8 * 20 + 2 * 8
    assert model_flops_per_token({"model": params}) == 6 * (3 * layer + 8 + 8 * 50)
