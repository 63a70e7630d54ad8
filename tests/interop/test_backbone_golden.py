"""Imported checkpoints answer as their peers: vectors of tests/parity/make_backbone_golden.py."""

import dataclasses
import pathlib

import numpy as np
import pytest
from flax import nnx

from t5x_audio import convert
from t5x_audio.backbone.decoding import Decoder, Sampling
from t5x_audio.training import checkpoints

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "backbone.npz")
FAMILIES = sorted({name.partition("/")[0] for name in GOLDEN.files})


def test_every_family_is_there():
    assert FAMILIES == ["llama", "llama_tied", "qwen2", "qwen3", "step1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens(tmp_path, family):
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).write_bytes(GOLDEN[f"{family}/{name}"].tobytes())
    convert.run(from_hf=str(tmp_path / "hf"), model_dir=str(tmp_path / "ours"))
    loaded = checkpoints.load_model(tmp_path / "ours")
    config = dataclasses.replace(loaded.config, dtype="float32", remat="none")
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))),
                      nnx.state(loaded))  # fmt: skip
    rows = [GOLDEN[f"{family}/tokens{i}"] for i in range(2)]
    greedy = Decoder(model, stop_ids=()).generate(
        rows, sampling=Sampling(temperature=0.0), max_new_tokens=40, block=8
    )
    for i, row in enumerate(rows):
        want = GOLDEN[f"{family}/logits{i}"]
        got = model(row[None].astype(np.int32))[0]
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
        np.testing.assert_array_equal(greedy[i], GOLDEN[f"{family}/greedy{i}"])
