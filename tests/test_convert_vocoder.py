"""CosyVoice's vocoder files in and out; parity with its modules is in tests/parity."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from t5x_audio import convert
from t5x_audio.errors import UserError
from t5x_audio.interop import (
    assembly,
    campplus,
    campplus_graph,
    cosyvoice_flow,
    cosyvoice_hift,
    stepaudio2_flow,
    torch_file,
)
from t5x_audio.training import checkpoints
from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.dit import DitConfig
from t5x_audio.vocoder.flow import FlowConfig
from t5x_audio.vocoder.hift import HIFT_24K, HiftConfig
from t5x_audio.vocoder.paired_flow import PairedFlowConfig
from t5x_audio.vocoder.unet import UnetConfig
from t5x_audio.vocoder.upsampling_conformer import UpsamplingConformerConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"
FLOW = FlowConfig(
    codebook=20, num_mels=8, speaker_dim=6, regulator_layers=2,
    encoder=ConformerConfig(width=16, num_layers=2, num_heads=2, mlp_dim=24),
    estimator=UnetConfig((16, 24), 3, 2, 1, 64),
)  # fmt: skip
PAIRED = PairedFlowConfig(
    codebook=20, linguistic_size=8, num_mels=8, speaker_dim=6,
    encoder=UpsamplingConformerConfig(FLOW.encoder, 3, 2, 2),
    estimator=DitConfig(16, 3, 2, 8, 24),
)  # fmt: skip


def random_model(config):
    """Every parameter another random array, drawn by numpy: nothing to compile."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    return nnx.merge(
        graph, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), state)
    )


@pytest.mark.parametrize(("config", "form"), [(FLOW, cosyvoice_flow), (PAIRED, stepaudio2_flow)])
def test_a_flow_comes_back_and_its_sizes_are_read_off_the_file(tmp_path, config, form):
    # What the file does not say.
    told = {"linguistic_size": 8} if config is PAIRED else {}
    model = random_model(config)
    file = tmp_path / "flow.pt"
    form.save(model, file)
    run = str(tmp_path / "run")
    report = convert.run(model_dir=run, from_flow=str(file))
    count = sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert report["flow_parameters"] == count
    assert convert.run(model_dir=run, from_flow=str(file)) == report  # there already
    read = checkpoints.load_model(f"{run}/flow")
    assert dataclasses.replace(read.config, **told) == config
    for name, array in assembly.arrays_of(model).items():
        np.testing.assert_array_equal(assembly.arrays_of(read)[name], array, err_msg=name)
    convert.run(model_dir=run, to_flow=str(tmp_path / "back.pt"))
    assert (tmp_path / "back.pt").read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        convert.run(model_dir=run, to_flow=str(file))


def test_hift_comes_back(tmp_path):
    file, run = tmp_path / "hift.pt", str(tmp_path / "run")
    cosyvoice_hift.save(random_model(HIFT_24K), file)
    assert convert.run(model_dir=run, from_hift=str(file))["hift_tensors"] > 300
    convert.run(model_dir=run, to_hift=str(tmp_path / "back.pt"))
    assert (tmp_path / "back.pt").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("config", [HiftConfig(), HIFT_24K], ids=["22k", "24k"])
def test_the_form_of_hift_is_told_by_its_tensors(config):
    names = [tensor.name for tensor in cosyvoice_hift.tensors(config)]
    assert cosyvoice_hift.published(names) == config


def test_campplus_comes_back_and_embeds_the_clips_of_its_run(tmp_path):
    file, run = tmp_path / "campplus.onnx", str(tmp_path / "run")
    with open(GOLDEN / "campplus_folded.onnx", "rb") as source:
        file.write_bytes(source.read())
    report = convert.run(model_dir=run, from_campplus=str(file))
    assert report["speaker_encoder_tensors"] == 152
    assert report["speaker_encoder_folded_norms"] == 19
    assert convert.run(model_dir=run, from_campplus=str(file)) == report  # there already
    back = convert.run(model_dir=run, to_campplus=str(tmp_path / "back.onnx"))
    assert back["campplus_file"] == str(tmp_path / "back.onnx")
    _, there, _ = campplus_graph.read(file)
    _, again, folded = campplus_graph.read(tmp_path / "back.onnx")
    assert folded == 19 and there.keys() == again.keys()
    assert all(np.array_equal(there[name], again[name]) for name in there)
    embed = campplus.clip_embedder(run)
    assert embed.describe() == f"campplus {campplus.fingerprint(campplus.load(file)[0])}"
    samples = np.random.default_rng(0).normal(0.0, 0.1, 9000).astype(np.float32)
    assert embed([samples]).shape == (1, 6)
    with pytest.raises(UserError, match="not a model directory"):
        campplus.clip_embedder(str(tmp_path)).describe()


def test_what_a_file_cannot_say_is_refused(tmp_path):
    for change, message in (
        ({"residual_std": 0.2}, "residual_std is 0.2"),
        ({"mel_mean": 1.0}, "mel_mean is 1.0"),
        ({"encoder": ConformerConfig(16, 1, 2, 8, 9)}, "convolution_kernel"),
        ({"estimator": UnetConfig((16,), 1, 1, 2, 8)}, "head_dim is 8"),
    ):
        with pytest.raises(UserError, match=message):
            cosyvoice_flow.require_published_form(FlowConfig(**change))
    small = {"base_channels": 16, "f0_channels": 8}
    for config, message in (
        (HiftConfig(filters_source=True, **small), "filters_source is True"),
        (dataclasses.replace(HIFT_24K, source_phase="samples", **small), "source_phase is samples"),
    ):
        with pytest.raises(UserError, match=message):
            cosyvoice_hift.save(random_model(config), tmp_path / "hift.pt")


def test_wrong_files_are_named_and_nothing_is_left(tmp_path):
    cosyvoice_flow.save(random_model(FLOW), tmp_path / "flow.pt")
    arrays = dict(torch_file.read_torch_file(tmp_path / "flow.pt"))
    wrong = tmp_path / "wrong.pt"
    for name, array, message in (
        ("encoder.after_norm.bias", None, "lacks encoder.after_norm.bias"),
        ("encoder.after_norm.bias", np.zeros(3, np.float32), "has shape"),
        ("other", np.zeros(3, np.float32), "has other"),
        ("input_embedding.weight", None, "no flow of CosyVoice-1"),
    ):
        changed = {key: value for key, value in arrays.items() if key != name}
        torch_file.write_torch_file(wrong, changed | ({} if array is None else {name: array}))
        with pytest.raises(UserError, match=message):
            convert.run(model_dir=str(tmp_path / "run"), from_flow=str(wrong))
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="lacks"):
        convert.run(model_dir=str(tmp_path / "run"), from_hift=str(tmp_path / "flow.pt"))
    with pytest.raises(UserError, match="nowhere.pt"):
        convert.run(model_dir=str(tmp_path / "run"), from_flow=str(tmp_path / "nowhere.pt"))
