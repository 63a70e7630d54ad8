"""The job that packs a model's weights, or those of a whole run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio import launch, quantize
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.quantization.packed_model import (
    LANGUAGE_MODEL,
    PackedConfig,
    PackedParam,
    packed_model,
)
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig
from t5x_audio.training import checkpoints
from tests.toy_vocoder import FLOW, HIFT

CONFIG = TransformerConfig(
    num_layers=2, embed=64, mlp=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=50,
    dtype="float32", init_std=0.3,
)  # fmt: skip


@pytest.fixture
def source(tmp_path):
    checkpoints.save_model(tmp_path / "old", {"model": CONFIG}, {"model": CONFIG.make(nnx.Rngs(1))})
    return tmp_path / "old"


@pytest.mark.parametrize(
    ("bits", "group", "bytes_each"), [(8, None, 1.1), (4, 16, 0.8), (3, None, 0.5)]
)
def test_a_model(source, tmp_path, bits, group, bytes_each):
    """The job's checkpoint is the packed model, in so many bytes a packed weight."""
    arguments = {"source": str(source), "model_dir": str(tmp_path / "new")}
    done = quantize.run(**arguments, bits=bits, group=group)
    assert quantize.run(**arguments, bits=bits, group=group) == done  # finished already
    loaded = checkpoints.load_model(tmp_path / "new")
    assert isinstance(loaded.layers.query, PackedParam)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)))
    assert loaded.embedding.get_raw_value().bits == 8
    want = packed_model(
        checkpoints.load_model(source), PackedConfig(CONFIG, bits, group, LANGUAGE_MODEL)
    )
    np.testing.assert_allclose(loaded(tokens), want(tokens), rtol=1e-5, atol=1e-5)
    kept = done["parameters"] - done["packed"]
    assert 0 < done["packed"] < done["parameters"]
    assert done["bytes_after"] - 4 * kept < bytes_each * done["packed"]
    with pytest.raises(UserError, match="bits"):
        quantize.run(**arguments, bits=2)


def test_8_bits_say_nearly_the_same(source, tmp_path):
    quantize.run(source=str(source), model_dir=str(tmp_path / "new"), bits=8)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (4, 16)))
    old, new = (checkpoints.load_model(place)(tokens) for place in (source, tmp_path / "new"))
    assert jnp.square(old - new).mean() < 0.06**2 * jnp.square(old).mean()


def test_a_run(tmp_path, capsys):
    """Of a vocoder: both parts, by the names they have in a run; the rest is told what it lacks."""
    run = tmp_path / "run"
    checkpoints.save_model(run / "flow", {"model": FLOW}, {"model": FLOW.make(nnx.Rngs(0))})
    generator = {"generator": HIFT.make(nnx.Rngs(0))}
    checkpoints.save_model(run / "hift", {"generator": HIFT}, generator)
    (run / "vocabulary").mkdir()
    (run / "vocabulary" / "vocabulary.json").write_text("{}")
    arguments = [f"--source={run}", f"--model_dir={tmp_path / 'packed'}", "--bits=8", "--json"]
    assert launch.launch("t5x_audio.quantize", "", arguments, add_flags=quantize._add_flags) == 0
    flow = checkpoints.load_model(tmp_path / "packed" / "flow")
    assert isinstance(flow.project.kernel, PackedParam)
    hift = checkpoints.load_model(tmp_path / "packed" / "hift", "generator")
    mel = jnp.full((1, 6, 6), -2.0)
    old = checkpoints.load_model(run / "hift", "generator")
    assert jnp.abs(hift.f0_predictor(mel) - old.f0_predictor(mel)).max() < 0.5
    assert (tmp_path / "packed" / "vocabulary" / "vocabulary.json").read_text() == "{}"


def test_faults(source, tmp_path):
    arguments = {"source": str(source), "model_dir": str(tmp_path / "new")}
    with pytest.raises(UserError, match="5 bits: weights are packed to 8, 4, 3, 2"):
        quantize.run(**arguments, bits=5)
    with pytest.raises(UserError, match="group=10"):
        quantize.run(**arguments, bits=4, group=10)
    with pytest.raises(UserError, match="neither a model directory nor a run"):
        quantize.run(**arguments | {"source": str(tmp_path / "nowhere")}, bits=4)
    with pytest.raises(UserError, match="is the source"):
        quantize.run(**arguments | {"model_dir": str(source)}, bits=4)
    quantize.run(**arguments, bits=4)
    with pytest.raises(UserError, match="packed already, to 4 bits"):
        quantize.run(source=str(tmp_path / "new"), model_dir=str(tmp_path / "more"), bits=2)
    broken = CONFIG.make(nnx.Rngs(1))
    broken.layers.query[...] = broken.layers.query[...] * np.nan
    config = dataclasses.replace(CONFIG)
    checkpoints.save_model(tmp_path / "nan", {"model": config}, {"model": broken})
    with pytest.raises(UserError, match="layers/query: the weight has values that are not finite"):
        quantize.run(source=str(tmp_path / "nan"), model_dir=str(tmp_path / "x"), bits=4)
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_with_counters(tmp_path):
    """What is no parameter goes along: the codebook with its counts, and a scalar."""
    config = SemanticTokenizerConfig(16, 2, 32, 1, 4, 0, text_size=0)
    model = config.make(nnx.Rngs(0))
    checkpoints.save_model(tmp_path / "old", {"model": config}, {"model": model})
    quantize.run(source=str(tmp_path / "old"), model_dir=str(tmp_path / "new"), bits=8)
    loaded = checkpoints.load_model(tmp_path / "new")
    assert loaded.quantizer.steps[...].shape == ()
    np.testing.assert_array_equal(loaded.quantizer.codes[...], model.quantizer.codes[...])
    audio = 0.1 * np.random.default_rng(0).normal(size=(1, 16000)).astype(np.float32)
    codes, lengths = loaded.encode(jnp.asarray(audio), jnp.array([16000]))
    assert codes.shape[1] >= int(lengths[0]) > 0
