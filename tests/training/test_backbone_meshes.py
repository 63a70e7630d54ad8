"""The backbone under its objectives gives the same loss and gradients on every mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.objectives.language_modeling import LanguageModeling
from t5x_audio.objectives.preference import MaskedDpo
from t5x_audio.training import partitioning
from t5x_audio.training.partitioning import MeshShape, ShardingRules

CONFIG = TransformerConfig(
    num_layers=2, embed=16, mlp=32, num_heads=8, num_kv_heads=4, head_dim=4, vocab_size=64,
    init_std=0.3, dtype="float32", remat="products", attention_block=8,
)  # fmt: skip
# Weights over all devices on two axes, as gin/hardware/v5p.gin has them.
WIDE = ShardingRules(
    vocab=("data", "tensor"), mlp=("data", "tensor"), heads=("data", "tensor"),
)  # fmt: skip
MESHES = {
    "data": (MeshShape(data=8), ShardingRules()),
    "fsdp": (MeshShape(data=1, fsdp=8), ShardingRules()),
    "tensor": (MeshShape(data=1, fsdp=2, tensor=4), ShardingRules()),
    "three": (MeshShape(data=2, fsdp=2, tensor=2), WIDE),
    "two_axes": (MeshShape(data=2, fsdp=4), WIDE),
    "slices": (MeshShape(replica=2, data=1, fsdp=4), ShardingRules()),
    "sequence": (MeshShape(data=1, fsdp=2, sequence=4), ShardingRules(mlp="sequence")),
    "sequence_and_heads": (MeshShape(data=1, fsdp=1, tensor=2, sequence=4), ShardingRules()),
    "odd_sequence": (MeshShape(data=1, fsdp=2, sequence=3), ShardingRules()),
    "uneven_vocabulary": (MeshShape(data=2, fsdp=1, tensor=4), ShardingRules(vocab=None)),
}


def batch():
    """Packed rows with padding: two segments each."""
    rng = np.random.default_rng(0)
    shape = (8, 24)
    lengths = rng.integers(6, 10, (8, 1))
    place = np.arange(24)[None]
    segments = np.where(place < lengths, 1, np.where(place < 21, 2, 0))
    return {
        "tokens": rng.integers(0, 64, shape),
        "targets": rng.integers(0, 64, shape),
        "weights": (segments > 0) * rng.uniform(0.5, 1.0, shape),
        "segment_ids": segments,
        "positions": np.where(segments == 2, place - lengths, place),
    }


def language_modeling(model, batch):
    return LanguageModeling(z_loss=1e-2)(model, batch, jax.random.key(0), train=True)


def with_images(model, batch):
    """Some tokens are embeddings, which lie with their rows."""
    rng = np.random.default_rng(1)
    soft = {"soft_embeddings": rng.standard_normal((8, 6, 3)).astype(np.float16)}
    soft["soft_index"] = rng.integers(-6, 6, (8, 24)).clip(-1).astype(np.int32)
    return language_modeling(model, batch | jax.tree.map(jnp.asarray, soft))


def preference(model, batch):
    """Of every row over the row behind it, by a model over itself with half of its weights."""
    graphdef, state = nnx.split(model)
    reference = nnx.merge(graphdef, jax.tree.map(lambda x: jax.lax.stop_gradient(0.5 * x), state))
    pairs = {f"chosen_{name}": x for name, x in batch.items()}
    pairs |= {f"rejected_{name}": jnp.roll(x, 1, 0) for name, x in batch.items()}
    return MaskedDpo()(model, reference, pairs, None, train=True)


def loss_and_gradients(objective, shape, rules, devices=None):
    mesh = shape.make(devices)
    config = dataclasses.replace(CONFIG, soft_width=3 if objective is with_images else 0)
    graphdef, params = nnx.split(config.make(nnx.Rngs(0)))

    def loss(params, batch):
        return objective(nnx.merge(graphdef, params), batch)

    shardings = rules.shardings(params, mesh)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=(None, shardings))
    with jax.set_mesh(mesh):
        params = jax.tree.map(jax.device_put, params, shardings)
        placed = partitioning.place_batch(
            jax.tree.map(lambda x: x.astype(np.float32 if x.dtype == float else np.int32), batch()),
            mesh,
        )
        (value, metrics), gradients = run(params, placed)
    return jax.device_get((value, metrics, gradients))


def check_meshes(objective):
    want = loss_and_gradients(objective, MeshShape(data=1), ShardingRules(), jax.devices()[:1])
    assert jnp.isfinite(want[0]) and want[0] > 0.1
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(want[2]))
    for name, (shape, rules) in MESHES.items():
        used = math.prod(dataclasses.astuple(shape)[:5])
        got = loss_and_gradients(objective, shape, rules, jax.devices()[:used])
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest, err_msg=name)


def language_modeling_on_8_devices():
    check_meshes(language_modeling)


def with_images_on_8_devices():
    check_meshes(with_images)


def preference_on_8_devices():
    check_meshes(preference)


@pytest.mark.parametrize("objective", ["language_modeling", "with_images", "preference"])
def test_every_mesh_agrees_with_one_device(on_devices, objective):
    on_devices(8, f"{objective}_on_8_devices")
