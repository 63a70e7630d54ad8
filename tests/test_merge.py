import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio import merge
from t5x_audio.errors import UserError
from t5x_audio.training import checkpoints


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    inputs: int = 3
    outputs: int = 2

    def make(self, rngs):
        return nnx.Linear(self.inputs, self.outputs, rngs=rngs)


def save(folder, seed, config=None):
    config = config or LinearConfig()
    model = config.make(nnx.Rngs(seed))
    checkpoints.save_model(folder, {"model": config}, {"model": model})
    return np.asarray(model.kernel[...], np.float64)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, [save(folder / name, seed) for seed, name in enumerate(("a", "b", "c"))]


def test_five_five_one(three, tmp_path):
    folder, kernels = three
    result = merge.run(
        models=("a", "b", "c"), weights=(5, 5, 1), run_dir=str(folder), model_dir=str(tmp_path)
    )
    assert result["models"] == 3 and result["parameters"] == 8
    merged = checkpoints.load_model(tmp_path).kernel[...]
    a, b, c = kernels
    expected = ((5 * a + 5 * b + c) / 11).astype(np.float32)
    np.testing.assert_array_equal(merged, expected)
    assert merged.dtype == jax.numpy.float32


@settings(max_examples=4, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=3))
def test_a_model_merged_with_itself_is_itself(three, tmp_path_factory, weights):
    folder, kernels = three
    out = tmp_path_factory.mktemp("out")
    models = [str(folder / "a")] * len(weights)
    merge.run(models=models, weights=weights, model_dir=str(out))
    np.testing.assert_allclose(
        checkpoints.load_model(out).kernel[...], kernels[0], rtol=1e-6, atol=1e-7
    )


def test_finished_merge_is_kept(three, tmp_path, capsys):
    folder, _ = three
    for _ in range(2):
        merge.run(models=[str(folder / "a")], weights=[1], run_dir=str(tmp_path), name="merged")
    assert "finished already" in capsys.readouterr().err


def test_what_cannot_be_merged_is_one_line(three, tmp_path):
    folder, _ = three
    save(tmp_path / "wide", 0, LinearConfig(outputs=4))
    out = str(tmp_path / "out")
    models = [str(folder / "a"), str(tmp_path / "wide")]
    with pytest.raises(UserError, match=r"wide: bias is \(4,\) but \(2,\) in .*/a; only"):
        merge.run(models=models, weights=(1, 1), model_dir=out)
    with pytest.raises(UserError, match="2 models but 1 weights"):
        merge.run(models=models, weights=(1,), model_dir=out)
    with pytest.raises(UserError, match="no positive sum"):
        merge.run(models=models, weights=(1, -1), model_dir=out)
    with pytest.raises(UserError, match="nothing: not a model directory"):
        merge.run(models=[str(tmp_path / "nothing")], weights=(1,), model_dir=out)
