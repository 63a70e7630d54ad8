import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from flax import nnx
from jax.sharding import PartitionSpec as P

from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.training import checkpoints, learner, optimizers, partitioning

RULES = partitioning.ShardingRules()


def mesh_of(**sizes):
    return jax.sharding.AbstractMesh(
        tuple(sizes.get(axis, 1) for axis in partitioning.MESH_AXES), partitioning.MESH_AXES
    )


def test_spec_follows_the_table():
    mesh = mesh_of(fsdp=2, tensor=4)
    assert RULES.spec(("vocab", "embed"), (16, 6), mesh) == P("tensor", "fsdp")
    assert RULES.spec(("layers", "heads", None), (3, 8, 5), mesh) == P(None, "tensor", None)
    both = partitioning.ShardingRules(embed=("fsdp", "data"))
    assert both.spec(("embed",), (8,), mesh) == P(("fsdp", "data"))


@pytest.mark.parametrize(
    ("rules", "axes", "shape", "line"),
    [
        (RULES, ("mlp", "heads"), (8, 8), "w: its axes mlp and heads both map to mesh axis tensor"),
        (RULES, ("mlp",), (6,), "w: axis mlp of size 6 does not divide over tensor = 4"),
        (
            partitioning.ShardingRules(embed=("fsdp", "tensor")),
            ("embed",),
            (12,),
            "w: axis embed of size 12 does not divide over fsdp x tensor = 8",
        ),
        (
            partitioning.ShardingRules(mlp="model"),
            ("mlp",),
            (8,),
            "rule mlp -> model: the mesh has no such axis",
        ),
    ],
)
def test_what_cannot_be_sharded_is_one_line(rules, axes, shape, line):
    with pytest.raises(UserError) as caught:
        rules.spec(axes, shape, mesh_of(fsdp=2, tensor=4), "w")
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_axes_a_model_got_wrong_are_defects():
    with pytest.raises(ValueError, match="no logical axis 'breadth'"):
        RULES.spec(("breadth",), (8,), mesh_of())
    with pytest.raises(ValueError, match="don't fit shape"):
        RULES.spec(("embed", "mlp"), (8,), mesh_of())


def test_mesh_shape_counts_devices():
    one = jax.devices()[:1]
    assert dict(partitioning.MeshShape().make(one).shape)["data"] == 1
    with pytest.raises(UserError, match="data=2 x tensor=2 needs 4 devices but there are 1"):
        partitioning.MeshShape(data=2, tensor=2).make(one)
    with pytest.raises(UserError, match="does not divide 1 devices"):
        partitioning.MeshShape(tensor=3).make(one)


def make_learner():
    return learner.GradientLearner(
        toy_run.MlpConfig(dropout=0.0),
        toy_run.NextToken(),
        optimizers.AdamW(peak_lr=1e-2, schedule="constant"),
    )


def test_moments_shard_like_their_parameters_and_the_rest_is_replicated():
    abstract = jax.eval_shape(make_learner().init, jax.random.key(0))
    mesh = partitioning.MeshShape().make(jax.devices()[:1])
    shardings = RULES.shardings(abstract, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract)
    adam = next(s for s in shardings.opt_state["model"] if hasattr(s, "mu"))
    for tree in (shardings.params["model"], adam.mu, adam.nu):
        assert jax.tree.leaves(tree["table"])[0].spec == P("tensor", "fsdp")
    assert jax.tree.leaves(adam.count)[0].spec == P()
    assert jax.tree.leaves(shardings.variables["model"]["norm"]["mean"])[0].spec == P()


@pytest.mark.parametrize("kind", [optimizers.AdamW, optimizers.Adafactor, optimizers.Muon])
def test_every_optimiser_shards_over_a_mesh(kind):
    backbone = TransformerConfig(
        num_layers=2, embed=256, mlp=512, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=512
    )
    rule = kind(peak_lr=1e-2, schedule="constant")
    made = learner.GradientLearner(backbone, toy_run.NextToken(), rule)
    abstract, mesh = jax.eval_shape(made.init, jax.random.key(0)), mesh_of(fsdp=4, tensor=2)

    def held(leaf, sharding):
        return np.prod(sharding.shard_shape(leaf.shape))

    sizes = jax.tree.map(held, abstract.opt_state, RULES.shardings(abstract, mesh).opt_state)
    whole = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    # The moments of matrices lie over all devices; what is replicated is small.
    assert sum(jax.tree.leaves(sizes)) < (0.05 if kind is optimizers.Adafactor else 0.3) * whole


def test_batch_that_does_not_divide_is_named():
    mesh = partitioning.MeshShape().make(jax.devices()[:1])
    placed = partitioning.place_batch({"x": np.ones((3, 2))}, mesh)
    assert placed["x"].sharding.spec == P(partitioning.BATCH_AXES)


def run_on_8_devices():
    """In a process of its own: a step on a mesh of 8 devices is a step on one device."""
    batch = next(toy_run.Counting(toy_run.Data()))
    toy, results = make_learner(), {}

    def step(state, batch):
        rng, variables = jax.random.key(1), state.variables["model"]
        loss = lambda p: toy._loss(p, variables, state, batch, rng, True)[0]  # noqa: E731
        return jax.value_and_grad(loss)(state.params["model"]), toy.step(state, batch, rng)[0]

    meshes = {
        "one": (partitioning.MeshShape(), jax.devices()[:1]),
        "data x fsdp x tensor": (partitioning.MeshShape(data=2, fsdp=2, tensor=2), None),
    }
    for name, (shape, devices) in meshes.items():
        mesh = shape.make(devices)
        with jax.set_mesh(mesh):
            abstract = jax.eval_shape(toy.init, jax.random.key(0))
            shardings = RULES.shardings(abstract, mesh)
            state = jax.jit(toy.init, out_shardings=shardings)(jax.random.key(0))
            placed = partitioning.place_batch(batch, mesh)
            (loss, gradient), after = jax.jit(step)(state, placed)
            results[name] = jax.device_get((loss, gradient, after.params, after.variables))
    table = state.params["model"]["table"][...]
    assert table.addressable_shards[0].data.shape == (6, 4)
    for name, result in results.items():
        for a, b in zip(jax.tree.leaves(results["one"]), jax.tree.leaves(result), strict=True):
            if jax.dtypes.issubdtype(a.dtype, np.floating):
                np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    with pytest.raises(UserError, match="batch field tokens: 6 examples do not divide over the 8"):
        mesh = partitioning.MeshShape().make()
        partitioning.place_batch({"tokens": np.ones((6, 2))}, mesh)
    check_restore_on_another_mesh(toy, state)


def check_restore_on_another_mesh(toy, state):
    with tempfile.TemporaryDirectory() as folder:
        run = checkpoints.RunCheckpoints(folder, toy.model_configs)
        run.save(state)
        run.wait()
        mesh = partitioning.MeshShape(fsdp=4, tensor=1).make()
        abstract = jax.eval_shape(lambda: state)
        shardings = RULES.shardings(abstract, mesh)
        restored, _ = run.restore(partitioning.with_shardings(abstract, shardings))
        kernel = restored.params["model"]["up"]["kernel"][...]
        assert kernel.addressable_shards[0].data.shape == (2, 16)
        a, b = checkpoints.named_arrays(state), checkpoints.named_arrays(restored)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        run.close()


def test_sharded_steps_equal_one_device_and_restore_elsewhere(on_devices):
    on_devices(8, "run_on_8_devices")


def test_stacked_axes_and_missing_metadata():
    state = nnx.State({"a": nnx.Param(jnp.ones((2, 4)), logical_axes=("layers", "mlp"))})
    mesh = partitioning.MeshShape().make(jax.devices()[:1])
    (sharding,) = jax.tree.leaves(RULES.shardings(state, mesh))
    assert sharding.spec == P(None, "tensor")
    (sharding,) = jax.tree.leaves(RULES.shardings({"x": jnp.ones(3)}, mesh))
    assert sharding.spec == P()
