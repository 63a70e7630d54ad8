"""The quantisers and one whole SSQL step against an independent implementation in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import torch_ssql
from t5x_audio.images.resnet import ResnetConfig
from t5x_audio.images.siamese import SiameseConfig
from t5x_audio.objectives.siamese import Siamese
from t5x_audio.objectives.ssql import Ssql
from t5x_audio.quantization import fake_quant
from t5x_audio.training.checkpoints import named_arrays
from t5x_audio.training.learner import GradientLearner
from t5x_audio.training.optimizers import Sgd

ENCODERS = {
    "basic": ResnetConfig((1, 1), (8, 12), stem_stride=2),
    "bottleneck": ResnetConfig((1, 1), (4, 6), bottleneck=True),
}


class GivenViews(Siamese):
    """SimSiam on the views of the batch."""

    def views(self, model, batch, rng, train):
        return batch["first"], batch["second"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantisers(bits):
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal((3, 3, 4, 6)).astype(np.float32)
    x = rng.standard_normal((5, 7)).astype(np.float32)
    bounds = np.array([-0.8, 1.3], np.float32)

    def check(ours, theirs, array):
        pull = rng.standard_normal(array.shape).astype(np.float32)
        value, by = jax.jit(lambda a: jax.vjp(ours, a))(array)
        tensor = torch.tensor(array, requires_grad=True)
        out = theirs(tensor)
        out.backward(torch.tensor(pull))
        np.testing.assert_allclose(value, out.detach().numpy(), atol=1e-6)
        np.testing.assert_allclose(by(pull)[0], tensor.grad.numpy(), atol=1e-6)

    check(
        lambda w: fake_quant.quantize_weight(w, bits),
        lambda w: torch_ssql.quantize_weight(w.permute(3, 2, 0, 1), bits).permute(2, 3, 1, 0),
        weight,
    )
    low, high = torch.tensor(bounds)
    check(
        lambda a: fake_quant.quantize_activation(a, jnp.asarray(bounds), bits),
        lambda a: torch_ssql.quantize_activation(a, low, high, bits),
        x,
    )


@pytest.mark.parametrize(
    ("name", "bits"), [("basic", (4, 5)), ("basic", None), ("bottleneck", (2, 8))]
)
def test_a_whole_step(name, bits):
    """In float64: in float32 one of ten thousand roundings falls to the other side now and then."""
    with jax.enable_x64(True):
        compare_steps(name, bits)


def compare_steps(name, bits):
    config = SiameseConfig(ENCODERS[name], (16, 16, 16), predictor=8)
    objective = GivenViews()
    if bits:
        objective = Ssql(objective, weight_bits=(bits[0],) * 2, activation_bits=(bits[1],) * 2)
    learner = GradientLearner(config, objective, Sgd(peak_lr=0.05, total_steps=10))
    state = jax.jit(learner.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    # Gains away from their start, which holds some gradients at 0.
    params = jax.tree.map(
        lambda a: np.float64(a) + 0.1 * rng.standard_normal(a.shape), state.params["model"]
    )
    views = rng.standard_normal((2, 8, 12, 12, 3))
    batch = {"first": views[0], "second": views[1]}

    @jax.jit
    def gradients(params):
        return jax.value_and_grad(learner._loss, has_aux=True)(
            params, state.variables["model"], state, batch, jax.random.key(1), True
        )

    (loss, _), grads = gradients(params)
    peer = torch_ssql.SimSiam(config).double()
    torch_ssql.load(peer, {n: np.asarray(a) for n, a in named_arrays(params).items()})
    their_loss = peer.loss(*(torch.tensor(v).permute(0, 3, 1, 2) for v in views), bits)
    their_loss.backward()
    assert abs(float(loss) - their_loss.item()) < 1e-6
    theirs = {n: p.grad.numpy() for n, p in peer.named_parameters()}
    largest = 0.0
    for path, ours in named_arrays(grads).items():
        assert ours.dtype == np.float64
        got = torch_ssql.to_torch(path, np.asarray(ours))
        largest = max(largest, np.abs(got).max())
        np.testing.assert_allclose(got, theirs[torch_ssql.torch_name(path)], atol=1e-6)
    assert largest > 1e-2
