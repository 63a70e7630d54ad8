# ruff: noqa: E402
"""Tokens per second of decoding with the backbone on this machine, batch by batch.

    python benchmarks/decode.py --size=tiny

Weights are random and nothing stops an answer, so every row yields all its tokens. The clock
starts after one answer of the same shapes has been decoded (compilation) and includes the prompt.
"""

import argparse
import json
import pathlib
import sys
import time

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from flax import nnx

from benchmarks.sizes import backbone, macros
from t5x_audio.backbone.decoding import Decoder, Sampling
from t5x_audio.training.host_memory import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="tiny", help="a file of gin/models")
    parser.add_argument("--prompt", type=int, default=120, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens a row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    keep_freed_memory()
    config = backbone(macros(flags.size))
    decoder = Decoder(config.make(nnx.Rngs(0)), stop_ids=[])
    rng = np.random.default_rng(0)
    report = {"size": flags.size, "prompt": flags.prompt, "new_tokens": flags.tokens}
    for batch in flags.batches:
        prompts = rng.integers(0, config.vocab_size, (batch, flags.prompt)).tolist()
        options = {"sampling": Sampling(), "max_new_tokens": flags.tokens, "block": 32}
        decoder.generate(prompts, **options)
        begun, busy = time.perf_counter(), time.process_time()
        produced = sum(map(len, decoder.generate(prompts, **options)))
        seconds, cpu = time.perf_counter() - begun, time.process_time() - busy
        report[f"batch_{batch}"] = {"tokens_per_second": produced / seconds, "cpu_seconds": cpu}
        if not flags.json:
            rate = produced / seconds
            print(f"batch {batch}: {rate:.0f} tokens/s, CPU {cpu / produced * 1e3:.2f} ms a token")
    if flags.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
