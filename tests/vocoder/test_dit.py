"""The diffusion transformer: a stream gives what the whole gives; parity is in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.vocoder import dit
from t5x_audio.vocoder.ring import Chunks

CONFIG = dit.DitConfig(
    width=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=24, look_back_frames=6
)


@pytest.fixture(scope="module")
def model():
    """A model whose zeros (modulations, last projection) are not zeros."""
    model = dit.Dit(10, 5, CONFIG, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        noise = rng.normal(size=variable.shape).astype(np.float32)
        variable[...] = variable[...] + 0.3 * noise
    return model


def frames(length, batch=1, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, length, 10)), jnp.float32)


_whole = nnx.jit(lambda model, *inputs: model(*inputs))
_step = nnx.jit(lambda model, *inputs: model.step(*inputs), static_argnums=4)


def whole(model, x, chunks, prompt_frames):
    numbers = jnp.asarray(np.repeat(np.arange(len(chunks)), chunks))[None]
    bias = Chunks(numbers, jnp.array([prompt_frames])).bias(CONFIG.look_back_frames)
    time = jnp.full(len(x), 0.3)
    return np.asarray(_whole(model, x, jnp.ones((*x.shape[:2], 1)), time, bias))


def streamed(model, x, chunks, prompt_frames, capacity):
    state, made, start = model.initial_state(len(x), capacity), [], 0
    time = jnp.full(len(x), 0.3)
    for number, size in enumerate(chunks):
        prompt = number == 0 and prompt_frames > 0
        y, state = _step(model, x[:, start : start + size], time, state, prompt)
        made.append(y)
        start += size
    return np.concatenate(made, axis=1)


@pytest.mark.parametrize(
    ("prompt_frames", "chunks"), [(0, [3, 8, 3, 3]), (4, [3, 8, 3, 3]), (4, [8])]
)
def test_a_stream_gives_what_the_whole_gives(model, prompt_frames, chunks):
    chunks = ([prompt_frames] if prompt_frames else []) + chunks
    x = frames(sum(chunks), batch=2)
    want = whole(model, x, chunks, prompt_frames)
    got = streamed(model, x, chunks, prompt_frames, prompt_frames + len(chunks) % 2)
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_what_is_seen(model):
    """The prompt for ever, else in each layer the own chunk, 6 frames before it, and 4 by the
    convolutions."""
    chunks, x = [4, *[3] * 12], frames(40)
    base = whole(model, x, chunks, 4)

    def changed(frame):
        return np.abs(whole(model, x.at[:, frame].add(9.0), chunks, 4) - base).max((0, 2)) > 1e-5

    assert changed(1)[-1]  # of the prompt
    assert not changed(37)[:37].any() and changed(39)[37:].all()
    assert changed(20)[-3:].any() and not changed(5)[-3:].any()  # 2 layers of 2 + 6 + 4 frames


def test_padding_is_not_seen(model):
    x = frames(11)
    mask = (jnp.arange(11) < 7).astype(jnp.float32)[None, :, None]
    time = jnp.array([0.7])
    padded = model(x.at[:, 7:].set(50.0), mask, time)
    alone = model(x[:, :7], mask[:, :7], time)
    np.testing.assert_allclose(padded[:, :7], alone, atol=1e-4)
    assert not padded[:, 7:].any()


def test_a_new_model_gives_zero_and_its_memory_does_not_grow():
    model = dit.Dit(10, 5, CONFIG, nnx.Rngs(0))
    state = model.initial_state(1, 4)
    shapes = jax.tree.map(jnp.shape, state)
    for _ in range(3):
        y, state = model.step(frames(9), jnp.array([0.5]), state)
        assert not y.any()
    assert jax.tree.map(jnp.shape, state) == shapes and int(state.position) == 27
