"""CAM++ at its published size against FunASR's module in float64, its ONNX files and onnxruntime.

Random weights and statistics; the files are exported as the published one is: by PyTorch, batch
norms folded into the convolutions before them, which leaves those weights without a name.
"""

import dataclasses
import warnings

import jax
import numpy as np
import onnxruntime
import pytest
import torch
from flax import nnx
from funasr.models.campplus import utils as funasr_campplus
from funasr.models.campplus.model import CAMPPlus

from t5x_audio.errors import UserError
from t5x_audio.interop import campplus, campplus_graph
from t5x_audio.vocoder.campplus import CamPlus

FORMS = {
    "folded": {"opset_version": 11},
    "whole": {"opset_version": 13, "training": torch.onnx.TrainingMode.PRESERVE},
    "constants unfolded": {"opset_version": 11, "do_constant_folding": False},
}


@torch.no_grad()
def reference() -> CAMPPlus:
    """FunASR's module with random weights and statistics."""
    torch.manual_seed(0)
    model = CAMPPlus().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.0, 0.3)
        elif isinstance(module, torch.nn.Conv2d):
            # So that embeddings depend on what is heard, as those of a trained network do.
            module.weight.mul_(2.5)
    for name, parameter in model.named_parameters():
        if "cam_layer" in name and name.endswith("bias"):
            parameter.normal_(0.0, 0.3)
    return model


def export(model: CAMPPlus, path, **form) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(1, 345, 80),), path, input_names=["input"], dynamo=False,
            output_names=["output"], dynamic_axes={"input": {0: "b", 1: "t"}, "output": {0: "b"}},
            **form,
        )  # fmt: skip


@dataclasses.dataclass
class Pair:
    """`files` by form; `theirs` in float64; `ours` from the folded file."""

    files: dict
    state: dict
    theirs: CAMPPlus
    ours: CamPlus


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    model, folder = reference(), tmp_path_factory.mktemp("campplus")
    files = {name: folder / f"{name}.onnx" for name in FORMS}
    for name, form in FORMS.items():
        export(model, files[name], **form)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours, report = campplus.load(files["folded"])
    assert report["folded_norms"] == 66
    return Pair(files, state, model.double(), ours)


@jax.jit
def embed_features(state, features, frames):
    model = nnx.merge(STATIC["graphdef"], state)
    return model.embed_features(features, frames)


STATIC = {}


@torch.no_grad()
def features_of(speech) -> list[np.ndarray]:
    """FunASR's features float32 [F, 80] of utterances of several lengths."""
    whole, other = speech
    waveforms = [whole, other[:31003], whole[20000:26000], other[:1200], other[-40000:]]
    return [funasr_campplus.extract_feature([torch.tensor(w)])[0][0].numpy() for w in waveforms]


def padded(features) -> tuple[np.ndarray, np.ndarray]:
    frames = np.array([len(f) for f in features], np.int32)
    batch = np.full((len(features), frames.max() + 11, 80), 7.0, np.float32)
    for row, one in zip(batch, features, strict=True):
        row[: len(one)] = one
    return batch * (np.arange(batch.shape[1]) < frames[:, None])[..., None], frames


def relative(got, want) -> float:
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


@torch.no_grad()
def test_features(pair, speech):
    """Kaldi's log-mels less their mean; speech in [-1, 1], so that the floor is as published."""
    quiet = speech[0] * 1e-3
    for samples in (speech[0], speech[1][:31003], quiet):
        want = funasr_campplus.extract_feature([torch.tensor(samples)])[0][0].numpy()
        got, frames = jax.jit(pair.ours.features)(samples[None])
        assert int(frames[0]) == len(want)
        print(f"features, largest difference {np.abs(got[0] - want).max():.1e}")
        assert np.abs(got[0] - want).max() < 5e-3
        assert np.abs(got[0] - want).mean() < 2e-5


@torch.no_grad()
def test_embeddings_of_a_padded_batch(pair, speech):
    """Each utterance as the reference gives it alone, from both kinds of file."""
    features = features_of(speech)
    want = np.stack(
        [pair.theirs(torch.tensor(f, dtype=torch.float64)[None])[0].numpy() for f in features]
    )
    batch, frames = padded(features)
    for form in ("folded", "whole"):
        model = pair.ours if form == "folded" else campplus.load(pair.files[form])[0]
        STATIC["graphdef"], state = nnx.split(model)
        got = np.asarray(embed_features(state, batch, frames))
        for row, count in enumerate(frames):
            difference = relative(got[row], want[row])
            print(f"{form}: {count} frames, largest difference {difference:.1e}")
            assert difference < 1e-4
    spread = relative(want[0], want[1])
    print(f"two utterances differ by {spread:.2f}")
    assert spread > 0.01


@torch.no_grad()
def test_from_the_waveform(pair, speech):
    want = np.stack(
        [
            pair.theirs(funasr_campplus.extract_feature([torch.tensor(w)])[0].double())[0].numpy()
            for w in speech
        ]
    )
    want /= np.linalg.norm(want, axis=-1, keepdims=True)
    got = pair.ours.embed_batch(speech)
    cosines = (got * want).sum(-1)
    print(f"cosines with the reference: 1 - {1 - cosines.min():.1e}")
    assert cosines.min() > 1 - 1e-5


@pytest.mark.parametrize("form", ["whole", "constants unfolded"])
def test_every_tensor_of_a_file_with_all_norms(pair, form):
    """By the reference's own names."""
    config, arrays, folded = campplus_graph.read(pair.files[form])
    assert folded == 0
    wanted = {n: t.numpy() for n, t in pair.state.items() if "num_batches" not in n}
    assert arrays.keys() == wanted.keys() == {t.name for t in campplus.tensors(config)}
    assert all(np.array_equal(arrays[name], array) for name, array in wanted.items())


@pytest.mark.parametrize("form", ["folded", "whole"])
def test_what_is_written_runs_and_is_read_again(pair, form, speech, tmp_path):
    model, report = campplus.load(pair.files[form])
    path = tmp_path / "campplus.onnx"
    campplus.save(model, path)
    again, folded = campplus.load(path)
    assert folded == report and campplus.fingerprint(again) == campplus.fingerprint(model)
    written, published = (
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for file in (path, pair.files[form])
    )
    assert [value.name for value in written.get_inputs()] == ["input"]
    for features in features_of(speech):
        want = published.run(["output"], {"input": features[None]})[0]
        got = written.run(["output"], {"input": features[None]})[0]
        assert got.shape == want.shape == (1, 192)
        assert relative(got, want) < 1e-4


@torch.no_grad()
def test_another_network_is_named(tmp_path):
    model = CAMPPlus(config_str="batchnorm-prelu").eval()
    export(model, tmp_path / "other.onnx", opset_version=11)
    with pytest.raises(UserError, match="Relu nodes"):
        campplus.load(tmp_path / "other.onnx")
