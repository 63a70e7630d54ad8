# ruff: noqa: E402
"""The backbone at 100 million parameters beside its peers, in one run on this machine.

    .venv-parity/bin/python benchmarks/backbone.py

- A training step beside the same Step-1 in PyTorch eager, as benchmarks/lm_step.py measures it.
- Greedy decoding with the cache beside `generate` of transformers: a Llama of the same sizes, since
  transformers has no Step-1. Both start from the same checkpoint, through `convert`, and must write
  the same tokens, else nothing is reported. They take turns; the median counts. The clock starts
  when every program is compiled and includes the prompts.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from flax import nnx

from benchmarks import lm_step
from t5x_audio import convert
from t5x_audio.backbone.decoding import Decoder, Sampling
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.training import checkpoints
from t5x_audio.training.host_memory import keep_freed_memory

CONFIG = TransformerConfig(
    num_layers=12, embed=768, mlp=2048, num_heads=12, num_kv_heads=4, head_dim=64,
    vocab_size=16384, dtype="float32", remat="none", scan_unroll=12,
)  # fmt: skip
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01


def training(flags) -> dict:
    """Seconds a step of both, medians."""
    from benchmarks import torch_step1

    batch = lm_step.packed_batch(CONFIG.vocab_size, flags.rows, flags.length)
    ours = lm_step.Ours(CONFIG, batch)
    peer = torch_step1.Trainer(
        CONFIG, ours.weights(), batch, LEARNING_RATE, WEIGHT_DECAY, flags.threads
    )
    losses = [(ours.step(), peer.step()) for _ in range(2)]
    if not np.allclose(*zip(*losses, strict=True), rtol=2e-3):
        sys.exit(f"error: the two models differ, losses {losses}: there is nothing to compare")
    times = lm_step.measure({"jax": ours, "torch": peer}, flags.steps)
    flops = lm_step.model_flops(CONFIG, flags.rows, flags.length)
    return {
        "tokens": flags.rows * flags.length,
        "jax_seconds": times["jax"]["seconds"],
        "torch_seconds": times["torch"]["seconds"],
        "jax_gflops": flops / times["jax"]["seconds"] / 1e9,
        "ratio": times["torch"]["seconds"] / times["jax"]["seconds"],
    }


def _loaded(folder: str):
    """The imported model, computing in float32 as its peer does."""
    state = nnx.state(checkpoints.load_model(folder))
    config = dataclasses.replace(checkpoints.load_config(folder), dtype="float32", remat="none")
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))), state)


def decoding(flags, batch: int) -> dict:
    """Tokens a second of both."""
    import torch
    import transformers

    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, positions="rope")
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.embed, intermediate_size=config.mlp, head_dim=config.head_dim,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_eps, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(f"{folder}/hf")
        convert.run(from_hf=f"{folder}/hf", model_dir=f"{folder}/ours")
        decoder = Decoder(_loaded(f"{folder}/ours"), stop_ids=())
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, flags.prompt))

    def ours():
        options = dict(sampling=Sampling(temperature=0.0), max_new_tokens=flags.tokens)
        return np.stack(decoder.generate(prompts.tolist(), **options))

    def theirs():
        with torch.inference_mode():
            written = peer.generate(
                torch.from_numpy(prompts), do_sample=False, max_new_tokens=flags.tokens,
                min_new_tokens=flags.tokens, use_cache=True,
                attention_mask=torch.ones(prompts.shape, dtype=torch.long),
            )  # fmt: skip
        return written.numpy()[:, flags.prompt :]

    if not np.array_equal(ours(), theirs()):
        sys.exit("error: the two models write different tokens: there is nothing to compare")
    seconds = {"jax": [], "transformers": []}
    for _ in range(flags.repeats):
        for name, write in (("jax", ours), ("transformers", theirs)):
            begun = time.perf_counter()
            write()
            seconds[name].append(time.perf_counter() - begun)
    ours_took, theirs_took = (statistics.median(found) for found in seconds.values())
    return {
        "batch": batch,
        "jax_tokens_per_second": batch * flags.tokens / ours_took,
        "transformers_tokens_per_second": batch * flags.tokens / theirs_took,
        "ratio": theirs_took / ours_took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=4, help="of a training batch")
    parser.add_argument("--length", type=int, default=512, help="of its rows, in tokens")
    parser.add_argument("--steps", type=int, default=8, help="timed training steps of each")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows decoded")
    parser.add_argument("--repeats", type=int, default=5, help="timed answers of each")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; XLA takes all cores")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    keep_freed_memory()
    report = {"training": training(flags)}
    report["decoding"] = [decoding(flags, batch) for batch in flags.batches]
    print(json.dumps(report) if flags.json else _table(report))


def _table(report) -> str:
    step = report["training"]
    lines = [
        f"training, {step['tokens']} tokens a step: jax {step['jax_seconds']:.2f} s "
        f"({step['jax_gflops']:.0f} GFLOP/s), torch {step['torch_seconds']:.2f} s; "
        f"{step['ratio']:.2f} times as fast"
    ]
    lines += [
        f"decoding, {row['batch']} at once: jax {row['jax_tokens_per_second']:.0f} tokens/s, "
        f"transformers {row['transformers_tokens_per_second']:.0f}; {row['ratio']:.2f} times as "
        "fast"
        for row in report["decoding"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
