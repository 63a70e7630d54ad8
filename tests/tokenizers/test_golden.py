"""Published files encode as their references: vectors of tests/parity/make_tokenizer_golden.py."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio import convert
from t5x_audio.interop import assembly
from t5x_audio.tokenizers import batching
from t5x_audio.training import checkpoints

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "tokenizers.npz")
SAMPLES = GOLDEN["samples"].astype(np.float32) / 32768
LENGTHS = GOLDEN["lengths"].tolist()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Both files, written by PyTorch, imported as into a run."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("model.pt", "am.mvn", "config.yaml", "linguistic_tokenizer.npy"):
        (folder / name).write_bytes(GOLDEN[f"linguistic/{name}"].tobytes())
    graph = "speech_tokenizer_v1.onnx"
    (folder / graph).write_bytes(GOLDEN[f"semantic/{graph}"].tobytes())
    result = convert.run(
        from_paraformer=str(folder),
        codebook=str(folder / "linguistic_tokenizer.npy"),
        from_speech_tokenizer=str(folder / graph),
        model_dir=str(folder / "run"),
    )
    assert result["linguistic_tokenizer_not_used"] > 0  # predictor and decoder
    return folder / "run"


def within(got, want):
    """1e-4 of the largest value, the tolerance of the comparisons at full size."""
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_linguistic_chunk_by_chunk(run_dir):
    """FunASR's streaming encoder at lengths that end anywhere, all in one padded batch."""
    model = checkpoints.load_model(run_dir / "linguistic_tokenizer")
    waveforms = [SAMPLES[:length] for length in LENGTHS]
    hidden = batching.BucketedEncoder(model, "encode_frames")(waveforms)
    codes = batching.BucketedEncoder(model)(waveforms)
    for length, frames, found in zip(LENGTHS, hidden, codes, strict=True):
        within(frames, GOLDEN[f"linguistic/chunks{length}"])
        np.testing.assert_array_equal(found, GOLDEN[f"linguistic/codes{length}"])
    assert len(set(codes[-1].tolist())) > 5


def test_linguistic_step_by_step(run_dir):
    """The step that a stream calls, on FunASR's features."""
    model = checkpoints.load_model(run_dir / "linguistic_tokenizer")
    features = GOLDEN["linguistic/features"]
    want = GOLDEN[f"linguistic/chunks{LENGTHS[-1]}"]
    step = jax.jit(lambda chunk, n, state: model.encoder.step(chunk, n, state))
    state, outputs = model.encoder.initial_state(1), []
    for start in range(0, len(want), 4):
        chunk = features[start : start + 4]
        padded = np.pad(chunk, ((0, 4 - len(chunk)), (0, 0)))[None]
        out, state = step(jnp.asarray(padded), jnp.asarray([len(chunk)]), state)
        outputs.append(out[0, : len(chunk)])
    within(np.concatenate(outputs)[: len(want)], want)


def test_linguistic_full_context(run_dir):
    """FunASR's offline encoder."""
    model = checkpoints.load_model(run_dir / "linguistic_tokenizer")
    encoder = dataclasses.replace(model.config.encoder, context="full")
    config = dataclasses.replace(model.config, encoder=encoder)
    offline = assembly.build(config, assembly.arrays_of(model))
    features = GOLDEN["linguistic/features"]
    got = offline.encoder(jnp.asarray(features[None]), jnp.asarray([len(features)]))
    within(np.asarray(got[0]), GOLDEN["linguistic/whole"])


def test_semantic(run_dir):
    """S3Tokenizer's features and onnxruntime's codes of different lengths in one padded batch."""
    model = checkpoints.load_model(run_dir / "semantic")
    codes = batching.BucketedEncoder(model)([SAMPLES[:length] for length in LENGTHS])
    batch = np.zeros((len(LENGTHS), len(SAMPLES)), np.float32)
    for row, length in enumerate(LENGTHS):
        batch[row, :length] = SAMPLES[:length]
    hidden, counts = jax.jit(lambda x, n: model.hidden(*model.features(x, n)))(
        jnp.asarray(batch), jnp.asarray(LENGTHS)
    )
    for row, length in enumerate(LENGTHS):
        within(np.asarray(hidden[row, : int(counts[row])]), GOLDEN[f"semantic/hidden{length}"])
        np.testing.assert_array_equal(codes[row], GOLDEN[f"semantic/codes{length}"])
    assert len(set(codes[-1].tolist())) > 5
