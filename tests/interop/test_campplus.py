"""campplus.onnx in and out; the files are PyTorch's (tests/parity/make_campplus_golden.py)."""

import pathlib

import jax
import numpy as np
import onnx
import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.interop import assembly, campplus, campplus_graph
from t5x_audio.vocoder.campplus import CamPlusConfig

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
GOLDEN = np.load(FOLDER / "campplus.npz")
FOLDED, WHOLE = FOLDER / "campplus_folded.onnx", FOLDER / "campplus_whole.onnx"
SIZES = CamPlusConfig(
    num_mels=16, embedding=6, front_channels=4, channels=8, growth=4, bottleneck=8,
    block_layers=(2, 3), block_kernels=(3, 3), block_dilations=(1, 2),
)  # fmt: skip
NORMS = 12 + 1 + 2 * 5 + 2 + 1 + 1


@pytest.mark.parametrize(("path", "folded"), [(FOLDED, 12 + 1 + 5 + 1), (WHOLE, 0)])
def test_embeddings_are_those_of_the_reference(path, folded):
    """In a padded batch, each as the reference gives it alone."""
    model, report = campplus.load(path)
    assert model.config == SIZES
    assert report["folded_norms"] == folded
    features = [GOLDEN[f"features_{i}"] for i in range(4)]
    frames = np.array([len(f) for f in features])
    batch = np.zeros((4, 250, 16), np.float32)
    for row, one in zip(batch, features, strict=True):
        row[: len(one)] = one
    graphdef, state = nnx.split(model)
    got = jax.jit(lambda *args: nnx.merge(graphdef, state).embed_features(*args))(batch, frames)
    want = np.stack([GOLDEN[f"embedding_{i}"] for i in range(4)])
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want[0] - want[1]).max() > 0.01


@pytest.mark.parametrize("path", [FOLDED, WHOLE])
def test_a_file_comes_back(path, tmp_path):
    config, arrays, folded = campplus_graph.read(path)
    model, report = campplus.load(path)
    assert report["tensors"] == len(arrays)
    assert report["parameters"] == sum(array.size for array in arrays.values())
    back = tmp_path / "new" / "campplus.onnx"
    campplus.save(model, back)
    onnx.checker.check_model(onnx.load(back), full_check=True)
    again, arrays_again, folded_again = campplus_graph.read(back)
    assert (again, folded_again) == (config, folded)
    assert arrays.keys() == arrays_again.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, arrays_again[name], err_msg=name)
    with pytest.raises(UserError, match="is there already"):
        campplus.save(model, back)


def test_a_trained_model_goes_out_whole_and_without_its_speakers(tmp_path):
    model = CamPlusConfig(**vars(SIZES) | {"num_speakers": 3}).make(nnx.Rngs(0))
    report = campplus.save(model, tmp_path / "campplus.onnx")
    read, read_report = campplus.load(tmp_path / "campplus.onnx")
    assert read.config == SIZES and read_report == report | {"folded_norms": 0}
    arrays = assembly.arrays_of(model)
    for name, array in assembly.arrays_of(read).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    assert campplus.fingerprint(read) == campplus.fingerprint(model)
    read.dense_norm.var[...] += 1.0
    assert campplus.fingerprint(read) != campplus.fingerprint(model)


def changed(change, tmp_path) -> pathlib.Path:
    model = onnx.load(WHOLE)
    change(model.graph)
    onnx.save(model, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def node(graph, name):
    return next(n for n in graph.node if name in n.name)


def initializer(graph, name, array):
    old = next(t for t in graph.initializer if t.name == name)
    old.CopyFrom(onnx.numpy_helper.from_array(array, name))


def set_attribute(graph, place, name, value):
    attributes = node(graph, place).attribute
    old = next(a for a in attributes if a.name == name)
    old.CopyFrom(onnx.helper.make_attribute(name, value))


def test_all_differences_are_named_at_once(tmp_path):
    def change(graph):
        set_attribute(graph, "tdnnd2/cam_layer/linear_local/Conv", "dilations", [3])
        set_attribute(graph, "/out_nonlinear/batchnorm/BatchNormalization", "epsilon", 1e-3)
        initializer(graph, "head.bn1.bias", np.zeros(5, np.float32))
        graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "other"))

    with pytest.raises(UserError) as caught:
        campplus.load(changed(change, tmp_path))
    message = str(caught.value)
    for part in (
        "head.bn1.bias has (5,), not (4,)",
        "xvector.block1.tdnnd2.cam_layer.linear_local has dilations [3], not [1]",
        "xvector.out_nonlinear.batchnorm has epsilon 1.0e-03, not 1.0e-05",
        "has other (3,) besides",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: setattr(node(graph, "transit1/nonlinear/relu"), "op_type", "Elu"), "Relu"),
        (lambda graph: graph.node.remove(graph.node[-1]), "lacks xvector.dense.nonlinear"),
        (
            lambda graph: initializer(graph, "head.conv1.weight", np.zeros((4, 1, 5, 3), "f")),
            r"head.conv1.weight has \(4, 1, 5, 3\), not \(4, 1, 3, 3\)",
        ),
        (
            lambda graph: graph.node.remove(node(graph, "head/conv1/Conv")),
            "11 convolutions in two dimensions",
        ),
        (
            lambda graph: set_attribute(graph, "tdnnd1/cam_layer/AveragePool", "strides", [50]),
            "pools other than 100 frames",
        ),
    ],
)
def test_another_graph_is_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        campplus.load(changed(change, tmp_path))


def test_what_is_no_campplus(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        campplus.load(tmp_path / "nowhere.onnx")
    (tmp_path / "torn.onnx").write_bytes(WHOLE.read_bytes()[:5000])
    with pytest.raises(UserError, match="no whole ONNX file"):
        campplus.load(tmp_path / "torn.onnx")
