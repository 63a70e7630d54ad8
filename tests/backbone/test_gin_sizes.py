"""Every size file makes a backbone that fits the vocabulary it states."""

import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.sizes import backbone, macros

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


def test_published_sizes_are_there():
    assert set(PUBLISHED) <= set(FILES)
