# ruff: noqa: E402
"""A training step of SSQL beside one of SimSiam, and both beside the same in PyTorch eager.

All four start from the same weights and train on the same two views of a batch in this one process,
taking turns, so that whatever else the machine does meets all. Losses of the first step must agree,
else nothing is reported. PyTorch's convolutions are channels-last, as ours.

    .venv-parity/bin/python benchmarks/ssql_step.py

What counts are the two ratios: SSQL over SimSiam (four forwards and backwards instead of two, and
the quantisers), and PyTorch's time over ours. Augmentation is not part of it. CPU seconds are those
of all threads: on a busy machine they say more than the clock.
"""

import argparse
import json
import pathlib
import sys

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import torch_ssql
from benchmarks.lm_step import measure
from t5x_audio.images.resnet import ResnetConfig, resnet18
from t5x_audio.images.siamese import SiameseConfig
from t5x_audio.objectives.siamese import Siamese
from t5x_audio.objectives.ssql import Ssql
from t5x_audio.training.checkpoints import named_arrays
from t5x_audio.training.host_memory import keep_freed_memory
from t5x_audio.training.learner import GradientLearner
from t5x_audio.training.optimizers import Sgd

SIZES = {
    "laptop": SiameseConfig(
        ResnetConfig((2, 2, 2), (16, 32, 64), stem_stride=2), (256,) * 3, predictor=128
    ),
    "resnet18": SiameseConfig(resnet18()),
}
BITS = (4, 5)
LEARNING_RATE, L2 = 0.05, 5e-4


class GivenViews(Siamese):
    """SimSiam on the views of the batch."""

    def views(self, model, batch, rng, train):
        return batch["first"], batch["second"]


class Ours:
    """The learner's own step, compiled as the loop compiles it."""

    def __init__(self, config, views, ssql: bool):
        objective = GivenViews()
        if ssql:
            bits = {"weight_bits": (BITS[0],) * 2, "activation_bits": (BITS[1],) * 2}
            objective = Ssql(objective, **bits)
        optimizer = Sgd(peak_lr=LEARNING_RATE, schedule="constant", l2=L2)
        learner = GradientLearner(config, objective, optimizer)
        self.state = jax.jit(learner.init)(jax.random.key(0))
        self.batch = {"first": jnp.asarray(views[0]), "second": jnp.asarray(views[1])}
        self.run = jax.jit(learner.step, donate_argnums=0)

    def weights(self):
        return {n: np.array(a) for n, a in named_arrays(self.state.params["model"]).items()}

    def step(self) -> float:
        self.state, metrics = self.run(self.state, self.batch, jax.random.key(1))
        return float(metrics["loss"][0])


class Peer:
    """The same in PyTorch."""

    def __init__(self, config, weights, views, ssql: bool):
        self.model = torch_ssql.SimSiam(config)
        torch_ssql.load(self.model, weights)
        self.model = self.model.to(memory_format=torch.channels_last)
        self.bits = BITS if ssql else None
        self.views = [torch.tensor(view).permute(0, 3, 1, 2) for view in views]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=L2
        )

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(*self.views, self.bits)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="laptop", choices=SIZES)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; XLA takes all cores")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(flags.threads)
    config = SIZES[flags.size]
    views = np.random.default_rng(0).standard_normal((2, flags.batch, 32, 32, 3)).astype(np.float32)
    trainers, losses = {}, {}
    for name, ssql in (("SimSiam", False), ("SSQL", True)):
        ours = Ours(config, views, ssql)
        peer = Peer(config, ours.weights(), views, ssql)
        trainers |= {name: ours, f"{name}, PyTorch": peer}
        losses[name] = ours.step(), peer.step()
        if not np.allclose(*losses[name], atol=1e-4):
            sys.exit(f"error: the two {name} differ, losses {losses[name]}: nothing to compare")
    times = measure(trainers, flags.steps)
    report = {"size": flags.size, "batch": flags.batch, "losses": losses, "times": times}
    for kind in ("seconds", "cpu"):
        plain, low = (times[n][kind] for n in ("SimSiam", "SSQL"))
        report[f"ssql_over_simsiam_{kind}"] = low / plain
        for name, own in (("SimSiam", plain), ("SSQL", low)):
            report[f"torch_over_jax_{name}_{kind}"] = times[f"{name}, PyTorch"][kind] / own
    print(json.dumps(report) if flags.json else _table(report))


def _table(report) -> str:
    lines = [f"{report['size']}: {report['batch']} images a step", f"{'':18} {'s/step':>7} CPU s"]
    for name, row in report["times"].items():
        lines.append(f"{name:18} {row['seconds']:7.3f} {row['cpu']:5.2f}")
    for name, value in report.items():
        if "_over_" in name:
            lines.append(f"{name}: {value:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
