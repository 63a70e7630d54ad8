"""The discriminators at published size, and what both players minimise, against CosyVoice's own.

Multi-period of HiFi-GAN as Matcha-TTS carries it, multi-resolution of CosyVoice; weights copied.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from t5x_audio.objectives.gan import GanObjective
from t5x_audio.vocoder.discriminators import DiscriminatorConfig
from tests.parity import cosyvoice_reference

CONFIG = DiscriminatorConfig()
SAMPLES = 6000  # no multiple of a period


@dataclasses.dataclass
class Pair:
    """The reference and its copy; `judge` is compiled."""

    theirs: torch.nn.Module
    graph: nnx.GraphDef
    state: nnx.State

    def judge(self, samples):
        """Judgements of samples [B, T]."""
        return _judge(self.graph, self.state, jnp.asarray(samples))


_judge = jax.jit(lambda graph, state, x: nnx.merge(graph, state)(x), static_argnums=0)


def copied(module) -> dict[str, np.ndarray]:
    """Our names and arrays of the reference's weights."""
    parts = [*module.mpd.discriminators, *module.mrd.discriminators]
    found = {}
    for i, part in enumerate(parts):
        layers = part.convs if i < len(CONFIG.periods) else part.discriminators
        last = part.conv_post if i < len(CONFIG.periods) else part.out
        names = [f"parts/{i}/layers/{j}" for j in range(len(layers))] + [f"parts/{i}/post"]
        for name, layer in zip(names, [*layers, last], strict=True):
            state = {key: tensor.numpy() for key, tensor in layer.state_dict().items()}
            kernel = state.get("parametrizations.weight.original1", state.get("weight_v"))
            scale = state.get("parametrizations.weight.original0", state.get("weight_g"))
            if i < len(CONFIG.periods):
                kernel = kernel[..., 0]
            found[f"{name}/kernel"] = np.moveaxis(kernel, (0, 1), (-1, -2))
            found[f"{name}/scale"] = scale.ravel()
            found[f"{name}/bias"] = state["bias"]
    return found


@pytest.fixture(scope="module")
def pair() -> Pair:
    theirs = cosyvoice_reference.discriminators()
    arrays = copied(theirs)
    graph, state = nnx.split(nnx.eval_shape(lambda: CONFIG.make(nnx.Rngs(0))))
    names = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    assert sorted(names) == sorted(arrays)

    def fill(path, leaf):
        name = "/".join(str(k.key) for k in path if not str(k).endswith("value"))
        assert leaf.shape == arrays[name].shape, name
        return jnp.asarray(arrays[name])

    return Pair(theirs, graph, jax.tree_util.tree_map_with_path(fill, state))


@pytest.fixture(scope="module")
def audio():
    """(real, fake) float32 [2, T]."""
    rng = np.random.default_rng(0)
    time = np.arange(SAMPLES) / 22050
    real = 0.3 * np.sin(2 * np.pi * np.array([[120.0], [410.0]]) * time)
    real = real + 0.02 * rng.normal(size=real.shape)
    return real.astype(np.float32), (0.8 * real + 0.05 * rng.normal(size=real.shape)).astype("f")


def laid_out(part: int, array, rows: int) -> np.ndarray:
    """A layer of ours as the reference has it: [B, channels, ., .]."""
    array = np.asarray(array)
    if part < len(CONFIG.periods):
        return array.reshape(rows, CONFIG.periods[part], *array.shape[1:]).transpose(0, 3, 2, 1)
    return array.transpose(0, 3, 1, 2)


@torch.no_grad()
def test_scores_and_hidden_layers(pair, audio):
    real, fake = audio
    scores, _, layers, _ = pair.theirs(torch.tensor(real), torch.tensor(fake))
    judged = pair.judge(real)
    assert len(judged) == len(scores) == 8
    for part, ((score, hidden), want, maps) in enumerate(zip(judged, scores, layers, strict=True)):
        for got, layer in zip(hidden, maps, strict=True):
            got, layer = laid_out(part, got, len(real)), layer.numpy()
            assert got.shape == layer.shape
            assert np.abs(got - layer).max() < 1e-4 * max(1.0, np.abs(layer).max())
        ours = laid_out(part, score[..., None], len(real)).reshape(len(real), -1)
        assert np.abs(ours - want.numpy()).max() < 1e-4 * max(1.0, np.abs(want.numpy()).max())


@torch.no_grad()
def test_what_both_players_minimise(pair, audio):
    """Least squares, feature matching and the relativistic term, as weighted by CosyVoice."""
    real, fake = audio
    want = cosyvoice_reference.gan_losses(pair.theirs, torch.tensor(real), torch.tensor(fake))
    objective = GanObjective(feature_weight=4.0, relativistic_weight=1.0)
    loss, values = objective.adversarial_loss(pair.judge, fake, real)
    assert float(values["generator_adversarial"]) == pytest.approx(want["adversarial"], rel=1e-4)
    assert float(loss) == pytest.approx(want["generator"], rel=1e-4)
    judged = objective.discriminator_loss(pair.judge, fake, real)
    assert float(judged) == pytest.approx(want["discriminator"], rel=1e-4)


@pytest.mark.parametrize("limit", [0.04, 10.0])
@pytest.mark.parametrize("count", [200, 201])
def test_relativistic_term(count, limit):
    """Of two discriminators whose scores differ enough to matter."""
    rng = np.random.default_rng(count)
    better, worse = rng.normal(size=(2, 2, 3, count)).astype(np.float32)
    want = cosyvoice_reference.relativistic(torch.tensor(better), torch.tensor(worse), limit)
    objective = GanObjective(relativistic_weight=1.0, relativistic_limit=limit)
    got = objective._relativistic([(a, []) for a in better], [(b, []) for b in worse])
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    assert (float(want) == pytest.approx(0.08)) == (limit == 0.04)
