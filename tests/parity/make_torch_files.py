"""Writes small checkpoints with PyTorch, and their content as npz, for tests/interop.

Run in the environment that has PyTorch: python tests/parity/make_torch_files.py
"""

import collections
import pathlib

import numpy as np
import torch

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def checkpoint():
    """Every element type, views, shared storages, parameters, nesting and entries to leave out."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    linear = torch.nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(6.0).reshape(2, 3))
        linear.bias.copy_(torch.tensor([0.5, -0.5]))
    return collections.OrderedDict(
        float=base,
        transposed=base.T,
        strided=base[1:, ::2],
        scalar=torch.tensor(3.25),
        empty=torch.zeros(0, 5),
        half=base.half(),
        bfloat16=base.bfloat16(),
        double=base.double(),
        long=torch.arange(5),
        int8=torch.arange(-2, 3, dtype=torch.int8),
        bool=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(base[0].clone()),
        model_state=linear.state_dict(),
        steps=[torch.tensor([1, 2]), {"inner": torch.tensor([3.0])}],
        epoch=12,
        name="left out",
        shape=base.shape,
    )


def flatten(node, prefix=""):
    """{dotted name: float64 array} of the tensors."""
    if isinstance(node, torch.Tensor):
        return {prefix: node.detach().to(torch.float64).numpy()}
    if isinstance(node, (dict, list)):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        pieces = [flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in items]
        return {k: v for piece in pieces for k, v in piece.items()}
    return {}


def main():
    """Writes the three files."""
    content = checkpoint()
    torch.save(content, GOLDEN / "torch_zip.pt")
    torch.save(content, GOLDEN / "torch_legacy.pt", _use_new_zipfile_serialization=False)
    np.savez_compressed(GOLDEN / "torch_content.npz", **flatten(content))


if __name__ == "__main__":
    main()
