"""The semantic tokenizer against S3Tokenizer and onnxruntime, at the published size.

S3Tokenizer is the independent implementation of `speech_tokenizer_v1.onnx`, written against the
published file. Its module with random weights is exported by PyTorch, which names matrices
`onnx::MatMul_123` as the published file does; the graph runs in onnxruntime and is imported by
`interop.speech_tokenizer`. What we export is read by S3Tokenizer's own reader.
"""

import importlib
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch

from t5x_audio.interop import speech_tokenizer
from t5x_audio.tokenizers import batching

# It loads audio files with torchaudio, which is not needed here.
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
s3tokenizer = importlib.import_module("s3tokenizer")
s3_model = importlib.import_module("s3tokenizer.model")
del sys.modules["torchaudio"]

SIZES = {"n_audio_state": 1280, "n_audio_head": 20, "n_audio_layer": 6, "n_codebook_size": 4096}
KIND = "speech_tokenizer_v1_25hz"


def features(samples) -> torch.Tensor:
    """Whisper's log-mel [128, T] by S3Tokenizer."""
    return s3tokenizer.log_mel_spectrogram(torch.tensor(samples))


@torch.no_grad()
def hidden(model, batch: list[torch.Tensor]) -> list[np.ndarray]:
    """What is quantised, [M, width] of each log-mel [128, T], all in one padded batch."""
    encoded, lengths = model.encoder(*s3tokenizer.padding(batch))
    return [row[:length].numpy() for row, length in zip(encoded, lengths, strict=True)]


@torch.no_grad()
def reference(speech):
    """S3Tokenizer's module with random weights and codes among its features for this speech."""
    torch.manual_seed(0)
    model = s3_model.S3Tokenizer(KIND, s3_model.ModelConfig(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        if "ln" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    # So that the features differ from frame to frame as those of a trained encoder do.
    for convolution in (model.encoder.conv1, model.encoder.conv2):
        convolution.weight.mul_(4.0)
    model.encoder.positional_embedding.add_(
        0.02 * torch.randn_like(model.encoder.positional_embedding)
    )
    frames = torch.tensor(np.concatenate(hidden(model, [features(x) for x in speech])))
    frames = torch.nn.functional.normalize(frames, dim=-1)
    chosen = frames[torch.randint(len(frames), (SIZES["n_codebook_size"],))]
    codes = chosen + 0.5 * frames.std(0) * torch.randn(chosen.shape)
    model.quantizer._codebook.embed.copy_(codes)
    return model


class Exported(torch.nn.Module):
    """The published graph's signature: (feats, feats_length) -> indices."""

    def __init__(self, model):
        super().__init__()
        self.encoder, self.codebook = model.encoder, model.quantizer._codebook.embed

    def forward(self, feats, feats_length):
        x, _ = self.encoder(feats, feats_length)
        x = torch.nn.functional.normalize(x, p=2.0, dim=-1)
        embed = self.codebook.t()
        distance = -(
            x.pow(2).sum(-1, keepdim=True) - 2 * x @ embed + embed.pow(2).sum(0, keepdim=True)
        )
        return distance.max(dim=-1).indices


def valid_frames(lengths):
    """S3Tokenizer's `make_non_pad_mask` without a number that tracing would keep for good."""
    return torch.arange(lengths.max())[None] < lengths[:, None]


@mock.patch.object(s3_model, "make_non_pad_mask", valid_frames)
def export(model, path) -> None:
    """Writes an ONNX file as PyTorch's exporter of the published file's time did."""
    arguments = torch.zeros(1, 128, 200), torch.tensor([200], dtype=torch.int32)
    torch.onnx.export(
        Exported(model),
        arguments,
        path,
        input_names=["feats", "feats_length"],
        output_names=["indices"],
        dynamic_axes={
            "feats": {0: "b", 2: "t"},
            "feats_length": {0: "b"},
            "indices": {0: "b", 1: "n"},
        },
        opset_version=14,
        dynamo=False,
    )


def codes_of(session, mel) -> np.ndarray:
    """Codes [M] of a log-mel [128, T], as Step-Audio asks for them."""
    lengths = np.array([mel.shape[1]], np.int32)
    inputs = [value.name for value in session.get_inputs()]
    return session.run(None, {inputs[0]: mel[None].numpy(), inputs[1]: lengths})[0].reshape(-1)


def run_file(path) -> onnxruntime.InferenceSession:
    """onnxruntime on a file."""
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def published(tmp_path_factory, speech):
    """(S3Tokenizer's module, its ONNX file, onnxruntime on it, our import)."""
    folder = tmp_path_factory.mktemp("onnx")
    model = reference(speech)
    path = folder / "speech_tokenizer_v1.onnx"
    export(model, path)
    ours, report = speech_tokenizer.load(path)
    assert report["tensors"] == len(model.state_dict())
    return model, path, run_file(path), ours


def compare_codes(ours, got, want, mel) -> int:
    """Codes must be the same; where not, the two must be equally near. How many were not."""
    differing = np.flatnonzero(got != want)
    if len(differing):
        encoded, _ = ours.hidden(jnp.asarray(mel.T[None].numpy()), jnp.asarray([mel.shape[1]]))
        units = np.asarray(encoded[0], np.float64)[differing]
        units /= np.linalg.norm(units, axis=-1, keepdims=True)
        table = np.asarray(ours.quantizer.codes[...], np.float64)
        near = [np.linalg.norm(units - table[codes[differing]], axis=-1) for codes in (got, want)]
        np.testing.assert_allclose(near[0], near[1], atol=1e-5)
    return len(differing)


def test_features_before_the_quantiser(published, speech):
    """Two lengths in one padded batch: within 1e-4 of PyTorch, relative to the largest."""
    model, _, _, ours = published
    batch = [features(speech[0]), features(speech[1][:31003])]
    mels, lengths = s3tokenizer.padding(batch)
    got, counts = jax.jit(lambda x, n: ours.hidden(x, n))(
        jnp.asarray(mels.numpy().swapaxes(1, 2)), jnp.asarray(lengths.numpy())
    )
    for row, want in enumerate(hidden(model, batch)):
        assert int(counts[row]) == len(want)
        difference = np.abs(np.asarray(got[row, : len(want)]) - want).max() / np.abs(want).max()
        print(f"{len(want)} frames, largest difference {difference:.1e}")
        assert difference < 1e-4


def test_codes_of_a_batch(published, speech):
    """From the waveform: batches of different lengths, each as onnxruntime alone has it."""
    _, _, session, ours = published
    waveforms = [speech[0], speech[1], speech[0][:20000], speech[1][5000:5480], speech[0][:1601]]
    encoder = batching.BucketedEncoder(ours)
    differing = total = 0
    for waveform, got in zip(waveforms, encoder(waveforms), strict=True):
        mel = features(waveform)
        want = codes_of(session, mel)
        assert got.shape == want.shape
        differing += compare_codes(ours, got, want, mel)
        total += len(want)
    print(f"{total} codes, {differing} on a tie within float32")
    assert differing <= total / 200


def test_pieces_of_30_seconds(published, speech):
    """40 s are cut at 30 s, each piece tokenised alone, as in Step-Audio's `get_vq06_code`."""
    _, _, session, ours = published
    waveform = np.concatenate([*speech, *speech, *speech, *speech, *speech])[:640_300]
    pieces = [waveform[:480_000], waveform[480_000:]]
    mels = [features(piece) for piece in pieces]
    want = [codes_of(session, mel) for mel in mels]
    (got,) = batching.BucketedEncoder(ours)([waveform])
    assert [len(codes) for codes in want] == [750, len(got) - 750]
    parts = zip((got[:750], got[750:]), want, mels, strict=True)
    differing = sum(compare_codes(ours, *part) for part in parts)
    print(f"{len(got)} codes, {len(set(got))} different, {differing} on a tie within float32")
    assert differing <= len(got) / 200


def test_export_is_read_by_others(published, speech, tmp_path):
    """S3Tokenizer's reader takes every weight from our file, the same; onnxruntime runs it."""
    model, _, session, ours = published
    path = tmp_path / f"{KIND}.onnx"
    speech_tokenizer.save(ours, path)
    fresh = s3_model.S3Tokenizer(KIND, s3_model.ModelConfig(**SIZES))
    fresh.init_from_onnx(str(path))
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    again = run_file(path)
    mel = features(speech[0])
    assert compare_codes(ours, codes_of(again, mel), codes_of(session, mel), mel) <= 1
    # A padded batch in one call.
    batch = [mel, features(speech[1][:31003])]
    mels, lengths = s3tokenizer.padding(batch)
    indices = again.run(None, {"feats": mels.numpy(), "feats_length": lengths.numpy()})[0]
    for row, one in zip(indices, batch, strict=True):
        alone = codes_of(session, one)
        assert compare_codes(ours, row[: len(alone)], alone, one) <= 1
