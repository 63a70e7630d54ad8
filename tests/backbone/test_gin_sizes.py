"""Every size file makes a backbone that fits the vocabulary it states."""

import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import gin
from benchmarks.sizes import backbone, macros
from t5x_audio.backbone.mesh import MESH_AXES

FILES = sorted(
    path.stem
    for path in pathlib.Path("gin/models").glob("*.gin")
    if "BACKBONE_LAYERS =" in path.read_text()
)
PUBLISHED = {"step1_130b": 131_946_590_208, "step1_3b": 3_529_706_496}


@pytest.mark.parametrize("size", FILES)
def test_vocabulary_and_parameters(size):
    values = macros(size)
    rows = sum(
        values[name]
        for name in (
            "SEQUENCES_TEXT_SIZE",
            "TOKENIZERS_LINGUISTIC_SIZE",
            "TOKENIZERS_SEMANTIC_SIZE",
            "SEQUENCES_NUM_SPECIALS",
        )
    )
    multiple = values["SEQUENCES_MULTIPLE_OF"]
    config = backbone(values)
    assert config.vocab_size == -(-rows // multiple) * multiple
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    count = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == PUBLISHED.get(size, count)


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("fsdp", [16, 128])  # of v5p-256 and of 8x8x16
def test_published_sizes_divide_over_v5p(size, fsdp):
    gin.clear_config()
    gin.parse_config_file("gin/hardware/v5p.gin")
    rules = gin.get_configurable("partitioning.ShardingRules")()
    gin.clear_config()
    assert rules.mlp == ("data", "sequence", "tensor")  # it is the file's table
    mesh = jax.sharding.AbstractMesh((1, 8, fsdp, 1, 1), MESH_AXES)
    config = backbone(macros(size))
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    rules.shardings(nnx.state(model, nnx.Param), mesh)


def test_published_sizes_are_there():
    assert set(PUBLISHED) <= set(FILES)
