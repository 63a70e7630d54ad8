"""The speech tokenizers' published files in and out: the same tensors back, every fault named."""

import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import yaml
from flax import nnx

from t5x_audio import convert
from t5x_audio.errors import UserError
from t5x_audio.interop import assembly, paraformer, speech_tokenizer, torch_file
from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig
from t5x_audio.training import checkpoints

ENCODER = SanmConfig(num_layers=3, width=16, num_heads=2, mlp_dim=24, context="chunk")
LINGUISTIC = LinguisticTokenizerConfig(
    ENCODER, codebook_size=8, text_size=11, num_supervision_layers=1
)
SEMANTIC = SemanticTokenizerConfig(
    width=16, num_heads=2, mlp_dim=24, num_layers=2, codebook_size=8,
    num_supervision_layers=1, text_size=5,
)  # fmt: skip
AUDIO = np.random.default_rng(0).normal(size=(1, 16000)).astype(np.float32) * 0.1


def random_model(config):
    """Every parameter and variable random, none as a fresh model has it."""
    model = config.make(nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, nnx.RngState):
            noise = rng.normal(size=variable.shape).astype(np.float32)
            variable[...] = jnp.abs(noise) + 0.1 if variable.ndim == 1 else 0.3 * noise
    if config is LINGUISTIC:  # centres among what the encoder gives
        model.codebook[...] = model.encode_frames(AUDIO, jnp.asarray([16000]))[0][0, :8]
    return model


@pytest.fixture
def published(tmp_path):
    """Files as others publish them, made of models of ours; the decoder's tensors are added."""
    folder, file = tmp_path / "paraformer", tmp_path / "speech_tokenizer_v1.onnx"
    paraformer.save(random_model(LINGUISTIC), folder)
    arrays = torch_file.read_torch_file(folder / "model.pt")
    torch_file.write_torch_file(
        folder / "model.pt", arrays | {"decoder.embed.0.weight": np.ones((3, 2), np.float32)}
    )
    values = yaml.safe_load((folder / "config.yaml").read_text()) | {"decoder": "SANMDecoder"}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "tokens.json").write_text("[]")
    speech_tokenizer.save(random_model(SEMANTIC), file)
    return folder, file


def import_both(published, model_dir):
    folder, file = map(str, published)
    return convert.run(
        from_paraformer=folder,
        codebook=f"{folder}/linguistic_tokenizer.npy",
        from_speech_tokenizer=file,
        model_dir=str(model_dir),
    )


def codes(model):
    encoded, counts = jax.jit(lambda x, n: model.encode(x, n))(AUDIO, jnp.asarray([16000]))
    return np.asarray(encoded[0, : int(counts[0])])


def test_there_and_back(published, tmp_path):
    folder, file = published
    result = import_both(published, tmp_path / "run")
    assert result["linguistic_tokenizer_tensors"] == 13 * 3 + 2
    assert result["linguistic_tokenizer_not_used"] == 1
    assert result["semantic_tensors"] == 2 * 15 + 6
    assert import_both(published, tmp_path / "run") == result  # and again: it is there already
    back = tmp_path / "back"
    convert.run(
        model_dir=str(tmp_path / "run"),
        to_paraformer=str(back),
        to_speech_tokenizer=str(back / "tokenizer.onnx"),
    )
    for name in ("am.mvn", "config.yaml", "tokens.json", "linguistic_tokenizer.npy"):
        assert (back / name).read_bytes() == (folder / name).read_bytes(), name
    there, here = (torch_file.read_torch_file(place / "model.pt") for place in (folder, back))
    assert there.keys() - here.keys() == {"decoder.embed.0.weight"}
    for name, array in here.items():
        np.testing.assert_array_equal(array, there[name], err_msg=name)
    assert (back / "tokenizer.onnx").read_bytes() == file.read_bytes()


def test_imported_models_give_the_codes(published, tmp_path):
    """A run finds the tokenizers; supervision and heads are gone, the codes are the same."""
    import_both(published, tmp_path / "run")
    for name, config in (("linguistic_tokenizer", LINGUISTIC), ("semantic", SEMANTIC)):
        model = checkpoints.load_model(tmp_path / "run" / name)
        assert model.config.text_size == 0 and model.config.num_supervision_layers == 0
        want = codes(random_model(config))
        np.testing.assert_array_equal(codes(model), want)
        assert len(set(want.tolist())) > 1


def test_one_alone(published, tmp_path):
    convert.run(from_speech_tokenizer=str(published[1]), model_dir=str(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["semantic"]
    with pytest.raises(UserError, match="linguistic_tokenizer: not a model directory"):
        convert.run(model_dir=str(tmp_path / "run"), to_paraformer=str(tmp_path / "out"))


def test_what_was_trained_on_is_exported_as_it_is(published, tmp_path):
    """New statistics: the kept am.mvn no longer holds."""
    import_both(published, tmp_path / "run")
    place = tmp_path / "run" / "linguistic_tokenizer"
    model = checkpoints.load_model(place)
    model.mean[...] = model.mean[...] + 1.0
    checkpoints.save_model(place, {"model": model.config}, {"model": model})
    convert.run(model_dir=str(tmp_path / "run"), to_paraformer=str(tmp_path / "back"))
    shift, _ = paraformer.read_cmvn(tmp_path / "back" / "am.mvn", 560)
    np.testing.assert_array_equal(shift, -np.asarray(model.mean[...]))
    again, _ = paraformer.load(
        tmp_path / "back", pathlib.Path(tmp_path / "back" / "linguistic_tokenizer.npy")
    )
    for name, array in assembly.arrays_of(again).items():
        np.testing.assert_array_equal(array, assembly.arrays_of(model)[name], err_msg=name)


def test_cmvn_scales_come_back_exactly(tmp_path):
    scale = np.exp(np.random.default_rng(0).uniform(-6, 4, 5000)).astype(np.float32)
    path = tmp_path / "am.mvn"
    paraformer.write_cmvn(path, -scale, scale)
    shift, read = paraformer.read_cmvn(path, 5000)
    np.testing.assert_array_equal(read, scale)
    np.testing.assert_array_equal(shift, -scale)
    np.testing.assert_array_equal(paraformer._scale(paraformer._variance(scale, path)), scale)


WEIGHT = "encoder.encoders.1.feed_forward.w_1.weight"


def without_weight(folder):
    arrays = torch_file.read_torch_file(folder / "model.pt")
    del arrays[WEIGHT]
    torch_file.write_torch_file(folder / "model.pt", arrays)


def another_shape(folder):
    arrays = torch_file.read_torch_file(folder / "model.pt")
    torch_file.write_torch_file(folder / "model.pt", arrays | {WEIGHT: arrays[WEIGHT][:-1]})


def one_more(folder):
    arrays = torch_file.read_torch_file(folder / "model.pt")
    extra = {"encoder.encoders.2.norm1.weight": np.ones(16, np.float32)}
    torch_file.write_torch_file(folder / "model.pt", arrays | extra)


def no_encoder(folder):
    torch_file.write_torch_file(folder / "model.pt", {"x": np.ones(2, np.float32)})


def another_front_end(folder):
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("lfr_m: 7", "lfr_m: 5"))


def short_statistics(folder):
    path = folder / "am.mvn"
    path.write_text(path.read_text().replace("<Rescale>", "<Other>"))


def narrow_codebook(folder):
    np.save(folder / "linguistic_tokenizer.npy", np.zeros((8, 15), np.float32))


def cut(folder):
    path = folder / "model.pt"
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without_weight, f"model.pt: lacks {WEIGHT}; "),
        (another_shape, rf"{WEIGHT} has shape \(23, 16\), its configuration says \(24, 16\)"),
        (one_more, "has encoder.encoders.2.norm1.weight, which this model has not"),
        (no_encoder, "no encoder"),
        (another_front_end, "frontend_conf.lfr_m is 5, only 7 is known"),
        (short_statistics, "am.mvn: <Rescale> has 0 values, 560 are wanted"),
        (narrow_codebook, r"has shape \(8, 15\), centres \[K, 16\] are wanted"),
        (cut, "model.pt: not a whole PyTorch file"),
        (lambda folder: (folder / "am.mvn").unlink(), "am.mvn: no such file"),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), "config.yaml: unreadable"),
    ],
)
def test_faults_of_a_paraformer_are_named(published, tmp_path, harm, message):
    harm(published[0])
    with pytest.raises(UserError, match=message):
        import_both(published, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def change(file, edit):
    model = onnx.load(file)
    edit(model.graph)
    onnx.save(model, file)


def initializer(graph, name):
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def drop_bias(graph):
    """The query's bias: what follows takes the product itself."""
    node = next(node for node in graph.node if node.name == "/blocks.1/attn/query/Add")
    product, sum_ = node.input[1], node.output[0]
    graph.node.remove(node)
    for other in graph.node:
        other.input[:] = [product if name == sum_ else name for name in other.input]


def narrow(graph):
    tensor = initializer(graph, "encoders.blocks.0.mlp_ln.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(15, np.float32), tensor.name))


def drop_attention(graph):
    graph.node.remove(next(node for node in graph.node if node.op_type == "Softmax"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_bias, "lacks blocks.1.query.bias"),
        (narrow, r"blocks.0.mlp_norm.weight has shape \(15,\), its configuration says \(16,\)"),
        (
            lambda graph: graph.initializer.append(
                onnx.numpy_helper.from_array(np.ones((3, 3), np.float32), "more")
            ),
            r"has more \(3, 3\), which no speech tokenizer needs",
        ),
        (drop_attention, "has 2 convolutions, 1 attentions and 13 products"),
    ],
)
def test_faults_of_a_graph_are_named(published, tmp_path, edit, message):
    change(published[1], edit)
    with pytest.raises(UserError, match=message):
        import_both(published, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_do_not_matter(published, tmp_path):
    """A graph whose matrices and nodes have no names gives the same model."""

    def rename(graph):
        names = {tensor.name: f"onnx::{i}" for i, tensor in enumerate(graph.initializer)}
        for tensor in graph.initializer:
            tensor.name = names[tensor.name]
        for node in graph.node:
            node.name = ""
            node.input[:] = [names.get(name, name) for name in node.input]

    before, _ = speech_tokenizer.load(published[1])
    change(published[1], rename)
    after, _ = speech_tokenizer.load(published[1])
    for name, array in assembly.arrays_of(after).items():
        np.testing.assert_array_equal(array, assembly.arrays_of(before)[name], err_msg=name)


def test_a_file_that_is_no_graph(published, tmp_path):
    published[1].write_bytes(os.urandom(500))
    with pytest.raises(UserError, match="no whole ONNX file"):
        import_both(published, tmp_path / "run")
    published[1].unlink()
    with pytest.raises(UserError, match="no such file"):
        import_both(published, tmp_path / "run")


def test_nothing_is_written_over(published, tmp_path):
    import_both(published, tmp_path / "run")
    shutil.copytree(published[0], tmp_path / "out")
    with pytest.raises(UserError, match=r"holds model.pt already"):
        convert.run(model_dir=str(tmp_path / "run"), to_paraformer=str(tmp_path / "out"))
    with pytest.raises(UserError, match="is there already"):
        convert.run(model_dir=str(tmp_path / "run"), to_speech_tokenizer=str(published[1]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "give --from_hf=FOLDER"),
        ({"from_paraformer": "a"}, "go together"),
        ({"codebook": "a", "from_speech_tokenizer": "b"}, "go together"),
        ({"from_speech_tokenizer": "b", "to_paraformer": "c"}, "give --from_hf=FOLDER"),
        ({"from_hf": "a", "from_speech_tokenizer": "b"}, "give --from_hf=FOLDER"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        convert.run(model_dir=str(tmp_path), **flags)
