import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from t5x_audio.vocoder.flow import FlowConfig, noise_share
from tests.toy_vocoder import FLOW


@nnx.jit
def _sample(flow, noise, *inputs):
    return flow.sample(flow.conditions(*inputs), noise)


@pytest.fixture(scope="module")
def flow(build):
    def wake(model):
        kernel = jax.random.normal(jax.random.key(9), (1, 8, 6)) * 0.3
        model.estimator.project.kernel[...] = kernel

    return build(FLOW, edit=wake)


@pytest.fixture(scope="module")
def inputs():
    codes = jax.random.randint(jax.random.key(0), (2, 20), 0, 30)
    speaker = jax.random.normal(jax.random.key(1), (2, 4))
    noise = jax.random.normal(jax.random.key(2), (2, 32, 6))
    return codes, jnp.array([10, 20]), speaker, noise


def test_published_size():
    module = nnx.eval_shape(lambda: FlowConfig(speaker_dim=192).make(nnx.Rngs(0)))

    def millions(part):
        return round(sum(x.size for x in jax.tree.leaves(part)) / 1e6, 1)

    assert (millions(module), millions(module.estimator)) == (105.4, 81.9)


@given(groups=st.integers(0, 2000))
def test_mel_length_is_the_duration_of_the_codes(groups):
    assert FLOW.mel_lengths(5 * groups) == 8 * groups
    assert FlowConfig().mel_lengths(5 * groups) == int(groups * 22050 * 0.12 / 256 + 1e-9)


def test_sampling_is_independent_of_padding(flow, inputs):
    codes, lengths, speaker, noise = inputs
    both = _sample(flow, noise, codes, lengths, speaker)
    alone = _sample(flow, noise[:1, :16], codes[:1, :10], lengths[:1], speaker[:1])
    assert both.shape == (2, 32, 6)
    np.testing.assert_allclose(both[:1, :16], alone, rtol=1e-3, atol=1e-4)
    assert not both[0, 16:].any()


def test_euler_with_guidance_equals_the_definition(flow, inputs):
    codes, lengths, speaker, noise = inputs
    conditions = nnx.jit(lambda f, *a: f.conditions(*a))(flow, codes, lengths, speaker)
    velocity = nnx.jit(lambda f, *a: f.velocity(*a))
    empty = conditions.keep(jnp.zeros(2))
    times = 1 - np.cos(np.linspace(0, 1, 4) * np.pi / 2)
    x = noise
    for start, end in zip(times[:-1], times[1:], strict=True):
        t = jnp.full(2, start)
        guided = 1.7 * velocity(flow, x, t, conditions) - 0.7 * velocity(flow, x, t, empty)
        x = x + (end - start) * guided
    wanted = (x * 2.0 - 5.0) * conditions.mask
    got = _sample(flow, noise, codes, lengths, speaker)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_conditions_matter(flow, inputs):
    codes, lengths, speaker, noise = inputs
    base = _sample(flow, noise, codes, lengths, speaker)
    other_codes = _sample(flow, noise, (codes + 7) % 30, lengths, speaker)
    other_voice = _sample(flow, noise, codes, lengths, -speaker)
    louder_voice = _sample(flow, noise, codes, lengths, 3.0 * speaker)
    assert jnp.abs(base - other_codes).max() > 1e-3
    assert jnp.abs(base - other_voice).max() > 1e-4
    np.testing.assert_allclose(
        base, louder_voice, rtol=1e-3, atol=1e-4
    )  # only its direction counts


def test_prompt_reaches_the_rest(flow, inputs):
    codes, lengths, speaker, noise = inputs
    prompts = jnp.array([5, 5])
    mel = jax.random.normal(jax.random.key(3), (2, 32, 6)) - 5.0
    conditions = nnx.jit(lambda f, *a: f.conditions(*a))
    with_prompt = conditions(flow, codes, lengths, speaker, mel, prompts)
    assert with_prompt.prompt[:, :8].any()
    assert not with_prompt.prompt[:, 8:].any()
    silent = jnp.full_like(mel, -5.0)
    difference = _sample(flow, noise, codes, lengths, speaker, mel, prompts) - _sample(
        flow, noise, codes, lengths, speaker, silent, prompts
    )
    assert jnp.abs(difference[:, 8:]).max() > 1e-4


@pytest.mark.parametrize("deviation", [0.5, 1.0])
def test_share_of_the_noise_is_the_regression_of_velocity_on_mel(deviation):
    rng = np.random.default_rng(0)
    mel, noise = deviation * rng.standard_normal(200_000), rng.standard_normal(200_000)
    for time in (0.0, 0.3, 0.7, 0.95):
        mixed = (1 - time) * noise + time * mel
        slope = np.mean(mixed * (mel - noise)) / np.mean(mixed**2)
        assert noise_share(jnp.float32(time), deviation) == pytest.approx(slope, abs=0.03)


def test_a_silent_estimator_with_residual_std_gives_mu_and_that_deviation(build, inputs):
    """The U-Net's projection starts at zero; what is left has a solution: mu + s * noise."""
    config = dataclasses.replace(FLOW, residual_std=0.5, num_steps=400, guidance=0.0)
    codes, lengths, speaker, noise = inputs

    def untrained(model):
        model.estimator.project.kernel[...] = jnp.zeros((1, 8, 6))

    model = build(config, edit=untrained)
    conditions = nnx.jit(lambda f, *a: f.conditions(*a))(model, codes, lengths, speaker)
    assert np.std(np.asarray(conditions.mu)) > 0.1
    mel = model.normalise(_sample(model, noise, codes, lengths, speaker))
    difference = (mel - (conditions.mu + 0.5 * noise)) * conditions.mask
    assert np.abs(np.asarray(difference)).max() < 0.05

    dropped = conditions.keep(jnp.zeros(2))
    velocity = nnx.jit(lambda f, *a: f.velocity(*a))(model, noise, jnp.full(2, 0.25), dropped)
    unit = noise_share(jnp.float32(0.25), 1.0) * noise * conditions.mask
    np.testing.assert_allclose(velocity, unit, atol=1e-5)


def test_temperature_scales_the_noise_that_sampling_starts_from(build, flow, inputs):
    codes, lengths, speaker, noise = inputs
    cool = build(dataclasses.replace(FLOW, temperature=0.5), edit=lambda model: None)
    nnx.update(cool, nnx.state(flow))
    half = _sample(flow, 0.5 * noise, codes, lengths, speaker)
    np.testing.assert_allclose(_sample(cool, noise, codes, lengths, speaker), half, atol=1e-5)
