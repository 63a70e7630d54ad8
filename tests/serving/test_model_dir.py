import dataclasses
import shutil

import numpy as np
import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.serving.assistant import SpokenAssistant
from t5x_audio.serving.model_dir import PARTS, RunDirectory
from t5x_audio.serving.voice import answer_voice
from t5x_audio.training import checkpoints
from tests.toy_vocoder import HIFT_FRAMES, PAIRED_FLOW


@pytest.fixture
def copy(run_dir, tmp_path):
    """A run directory that a test may change."""
    root = shutil.copytree(run_dir, tmp_path / "run")
    RunDirectory(root).speaker_embedding.unlink(missing_ok=True)  # made by whoever asked first
    return root


def test_whole_run_passes(run_dir):
    vocabulary = RunDirectory(run_dir).check()
    assert vocabulary.linguistic_size == 16


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        RunDirectory(tmp_path / "nothing").check()


@pytest.mark.parametrize("part", PARTS)
def test_missing_part_names_its_stage(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(UserError, match=f"has no {part}/; run its stage {PARTS[part]}"):
        RunDirectory(copy).check()


def test_backbone_of_another_size(copy):
    config = dataclasses.replace(checkpoints.load_config(copy / "merged"), vocab_size=64)
    checkpoints.write_configs(copy / "merged", {"model": config})
    with pytest.raises(UserError, match="merged: vocab_size is 64 but the vocabulary .* needs 208"):
        RunDirectory(copy).check()


def test_a_vocoder_of_paired_codes_answers(copy):
    """Its flow and the HiFT at its rate are told by their configurations."""
    flow = dataclasses.replace(PAIRED_FLOW, codebook=40, linguistic_size=16, speaker_dim=256)
    hift = HIFT_FRAMES
    for folder, name, config in (("flow", "model", flow), ("hift", "generator", hift)):
        shutil.rmtree(copy / folder)
        model = nnx.jit(lambda config=config: config.make(nnx.Rngs(0)))()
        checkpoints.save_model(copy / folder, {name: config}, {name: model})
    assistant = SpokenAssistant.load(copy)
    codes = np.array([1, 2, 20, 21, 22] * 3)
    assert assistant.speak(codes).shape == (3 * 1920,)
    wrong = dataclasses.replace(flow, linguistic_size=15)
    checkpoints.write_configs(copy / "flow", {"model": wrong})
    with pytest.raises(UserError, match="flow: linguistic_size is 15 but .* needs 16"):
        RunDirectory(copy).check()


def test_fingerprint_follows_the_weights(run_dir, copy):
    before = RunDirectory(run_dir).fingerprint()
    assert RunDirectory(copy).fingerprint() == before
    model = checkpoints.load_model(copy / "merged")
    checkpoints.save_model(copy / "merged", {"model": model.config}, {"model": model})
    assert RunDirectory(copy).fingerprint() != before


def test_voice_is_the_answers_mean_and_is_kept(copy):
    root = RunDirectory(copy)
    voice = answer_voice(root)
    with np.load(root.speaker_embeddings) as archive:
        answers = [i for i, key in enumerate(archive["keys"]) if "-answer-" in key]
        mean = archive["embeddings"][answers].mean(0)
    np.testing.assert_allclose(voice, mean / np.linalg.norm(mean), rtol=1e-5)
    shutil.rmtree(copy / "tokens")
    np.testing.assert_array_equal(answer_voice(root), voice)


def test_voice_that_cannot_be_made(copy):
    (copy / "tokens" / "speaker_embeddings.npz").unlink()
    with pytest.raises(UserError, match="run the stage train_flow"):
        answer_voice(RunDirectory(copy))


def test_damaged_voice(copy):
    root = RunDirectory(copy)
    root.speaker_embedding.write_bytes(b"not an archive")
    with pytest.raises(UserError, match="speaker_embedding.npz: is damaged"):
        answer_voice(root)
