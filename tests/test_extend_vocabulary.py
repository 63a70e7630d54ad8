"""More rows for a vocabulary: text as before, new tokens apart from each other."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio import extend_vocabulary
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.training import checkpoints


def small(tied):
    return TransformerConfig(
        num_layers=2, embed=16, mlp=24, num_heads=4, num_kv_heads=2, head_dim=4, vocab_size=50,
        tied_head=tied, dtype="float32", init_std=0.3,
    )  # fmt: skip


@pytest.mark.parametrize(("tied", "soft_width"), [(False, 0), (True, 0), (False, 3)])
def test_what_the_model_says_of_text_stays(tmp_path, tied, soft_width):
    config = dataclasses.replace(small(tied), soft_width=soft_width)
    old = config.make(nnx.Rngs(1))
    checkpoints.save_model(tmp_path / "old", {"model": config}, {"model": old})
    arguments = dict(source=str(tmp_path / "old"), model_dir=str(tmp_path / "new"))
    done = extend_vocabulary.run(**arguments, rows=71, multiple_of=16)
    assert done["vocab_size"] == 128
    extend_vocabulary.run(**arguments, rows=71, multiple_of=16)  # finished already
    new = checkpoints.load_model(tmp_path / "new")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (4, 64)))
    logits, wider = old(tokens), new(tokens)
    np.testing.assert_allclose(wider[..., :50], logits, rtol=1e-5, atol=1e-5)
    assert (wider.argmax(-1) == logits.argmax(-1)).all()
    # Neither equal to each other nor far from what there was.
    rows = np.asarray(new.embedding[50:])
    assert len(np.unique(rows, axis=0)) == 78
    assert np.abs(rows - np.asarray(old.embedding[...]).mean(0)).max() < 0.3


def test_faults(tmp_path):
    config = small(False)
    model = {"model": config.make(nnx.Rngs(0))}
    checkpoints.save_model(tmp_path / "old", {"model": config}, model)
    arguments = dict(source=str(tmp_path / "old"), model_dir=str(tmp_path / "new"))
    with pytest.raises(UserError, match="--rows=0"):
        extend_vocabulary.run(**arguments, rows=0)
    extend_vocabulary.run(**arguments, rows=5)
    with pytest.raises(UserError, match="vocab_size"):
        extend_vocabulary.run(**arguments, rows=6)
    with pytest.raises(UserError, match="nowhere"):
        extend_vocabulary.run(**arguments | {"source": str(tmp_path / "nowhere")}, rows=6)
