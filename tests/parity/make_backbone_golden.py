"""Golden vectors of the backbone: small checkpoints and what PyTorch and transformers make of them.

Run in the environment of `make parity`:
  .venv-parity/bin/python tests/parity/make_backbone_golden.py
Writes tests/golden/backbone.npz: for each family of test_backbone.py the files of a checkpoint of
random weights, two sequences, their logits in float32 and 40 greedy tokens after each.
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import test_backbone

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "backbone.npz"
SMALL = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=2, vocab_size=53)
FILES = ("config.json", "model.safetensors")


def golden(family: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What the test needs of one family."""
    torch.manual_seed(0)
    if family == "step1":
        peer = test_backbone.step1(folder)
    else:
        peer = test_backbone.PEERS[family]().eval()
        with torch.no_grad():
            test_backbone.randomise(peer.state_dict())
        peer.save_pretrained(folder)
    found = {name: np.frombuffer((folder / name).read_bytes(), np.uint8) for name in FILES}
    rng = np.random.default_rng(1)
    for i, length in enumerate((30, 17)):
        tokens = rng.integers(0, SMALL["vocab_size"], length).tolist()
        found[f"tokens{i}"] = np.array(tokens)
        found[f"logits{i}"] = test_backbone.theirs(peer, tokens)
        for _ in range(40):
            tokens.append(int(test_backbone.theirs(peer, tokens)[-1].argmax()))
        found[f"greedy{i}"] = np.array(tokens[length:])
    return {f"{family}/{name}": array for name, array in found.items()}


if __name__ == "__main__":
    test_backbone.SIZES.update(SMALL)
    arrays = {}
    for name in test_backbone.FAMILIES:
        with tempfile.TemporaryDirectory() as temporary:
            arrays |= golden(name, pathlib.Path(temporary) / "hf")
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes")
