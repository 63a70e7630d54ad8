"""Golden vectors of CLIP's vision tower: a tiny one of transformers and what it makes of images.

Writes tests/golden/clip.npz. Run it in the parity environment (requirements/parity.txt):

    .venv-parity/bin/python tests/parity/make_clip_golden.py

Kept are config.json, the tensors of the checkpoint that transformers saves (float16, and the model
computes with those), images, and the patches behind every layer. Preprocessing is CLIP's, in numpy.
"""

import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "clip.npz"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def main():
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        image_size=12, patch_size=4, hidden_act="quick_gelu",
    )  # fmt: skip
    model = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from ones and zeros, so that each one counts
            parameter += 0.2 * torch.randn_like(parameter)
            parameter.copy_(parameter.half().float())
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), np.uint8)
    pixels = ((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.no_grad():
        states = model(torch.tensor(pixels), output_hidden_states=True).hidden_states
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = safetensors.numpy.load_file(f"{folder}/model.safetensors")
        text = (pathlib.Path(folder) / "config.json").read_text()
    arrays = {f"weights.{name}": array.astype(np.float16) for name, array in weights.items()}
    arrays |= {f"layer_{i}": state[:, 1:].numpy() for i, state in enumerate(states)}
    np.savez_compressed(GOLDEN, config=np.array(text), images=images, **arrays)


if __name__ == "__main__":
    main()
