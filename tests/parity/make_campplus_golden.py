"""Golden vectors of CAM++: a small one of FunASR's parts, exported by PyTorch.

Run in the environment that has PyTorch and FunASR:
  python tests/parity/make_campplus_golden.py
Writes tests/golden/campplus_folded.onnx (batch norms folded into convolutions, as published),
campplus_whole.onnx (the same network with all its norms) and campplus.npz: features of utterances
and their embeddings in float64, and a waveform's features.
"""

import collections
import pathlib
import warnings

import numpy as np
import torch
from funasr.models.campplus import components, utils

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MELS, FRAMES = 16, (231, 90, 3, 200)
FORMS = {
    "folded": {"opset_version": 11},
    "whole": {"opset_version": 13, "training": torch.onnx.TrainingMode.PRESERVE},
}


class Small(torch.nn.Module):
    """The network with other sizes."""

    def __init__(self, front=4, channels=8, growth=4, bottleneck=8, blocks=((2, 1), (3, 2)), out=6):
        super().__init__()
        self.head = components.FCM(m_channels=front, feat_dim=MELS)
        parts = [("tdnn", components.TDNNLayer(front * MELS // 8, channels, 5, 2, -1))]
        for i, (count, dilation) in enumerate(blocks, 1):
            block = components.CAMDenseTDNNBlock(
                count, channels, growth, bottleneck, 3, dilation=dilation
            )
            channels += count * growth
            transit = components.TransitLayer(channels, channels // 2, bias=False)
            channels //= 2
            parts += [(f"block{i}", block), (f"transit{i}", transit)]
        parts += [
            ("out_nonlinear", components.get_nonlinear("batchnorm-relu", channels)),
            ("stats", components.StatsPool()),
            ("dense", components.DenseLayer(2 * channels, out, config_str="batchnorm_")),
        ]
        self.xvector = torch.nn.Sequential(collections.OrderedDict(parts))

    def forward(self, x):
        """[B, T, mels] -> [B, out]."""
        return self.xvector(self.head(x.permute(0, 2, 1)))


@torch.no_grad()
def main():
    """Writes the golden files."""
    torch.manual_seed(0)
    model = Small().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.0, 0.3)
        elif isinstance(module, torch.nn.Conv2d):
            # So that the embeddings depend on what is heard, as those of a trained network do.
            module.weight.mul_(2.5)
    for form, options in FORMS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, (torch.randn(1, 345, MELS),), GOLDEN / f"campplus_{form}.onnx",
                input_names=["input"], output_names=["output"], dynamo=False,
                dynamic_axes={"input": {0: "b", 1: "t"}, "output": {0: "b"}}, **options,
            )  # fmt: skip
    rng, content = np.random.default_rng(0), {}
    model.double()
    for i, frames in enumerate(FRAMES):
        spectrum = rng.normal(size=(1, MELS)) * np.sin(0.05 * (1 + i) * np.arange(frames))[:, None]
        features = (2 * spectrum + rng.normal(size=(frames, MELS))).astype(np.float32)
        content[f"features_{i}"] = features
        content[f"embedding_{i}"] = model(torch.tensor(features).double()[None])[0].numpy()
    time = np.arange(6000) / 16000
    samples = sum(np.sin(2 * np.pi * k * (130 * time + 20 * time**2)) / k for k in range(1, 20))
    samples = (samples * np.clip(np.sin(9 * time), 0.0, 1.0) / 8).astype(np.float32)
    content["samples"] = samples
    content["fbank"] = utils.extract_feature([torch.tensor(samples)])[0][0].numpy()
    np.savez_compressed(GOLDEN / "campplus.npz", **content)


if __name__ == "__main__":
    main()
