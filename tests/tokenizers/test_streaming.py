"""Streams: any cut gives the codes of the whole, and none comes later than it was stated."""

import functools

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.audio import transforms
from t5x_audio.errors import UserError
from t5x_audio.tokenizers import dual_codebook
from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig

SEGMENT = 0.48


@functools.cache
def tokenizer(context):
    encoder = SanmConfig(num_layers=2, width=16, num_heads=2, mlp_dim=16, context=context)
    config = LinguisticTokenizerConfig(encoder, codebook_size=64, text_size=0)
    linguistic = config.make(nnx.Rngs(0))
    generator = np.random.default_rng(1)
    linguistic.codebook[...] = generator.normal(size=(64, 16)).astype(np.float32)
    # Statistics as they are of speech, so that frames differ.
    linguistic.mean[...] = np.full(560, 12.0, np.float32)
    linguistic.variance[...] = np.full(560, 9.0, np.float32)
    semantic = SemanticTokenizerConfig(16, 2, 16, 1, 32, 0, text_size=0).make(nnx.Rngs(2))
    return dual_codebook.DualCodebookTokenizer(linguistic, semantic, SEGMENT)


def sound(length, seed=0):
    """Noise whose level and colour change, so that codes do."""
    generator = np.random.default_rng([seed, length])
    noise = np.convolve(generator.normal(size=length + 3), [1, 0.8, 0.5, 0.2], "valid")
    places = np.linspace(0, 1, 12)
    envelope = np.interp(np.linspace(0, 1, length), places, generator.uniform(0.02, 1, 12))
    return (0.2 * noise[:length] * envelope).astype(np.float32)


def streamed(stream, samples, cuts):
    parts = [stream.push(part) for part in np.split(samples, sorted(cuts))]
    return np.concatenate([*parts, stream.finish()])


@pytest.mark.parametrize("context", ["chunk", "full"])
@settings(max_examples=25)
@given(st.data())
def test_any_cut_gives_the_codes_of_the_whole(context, data):
    made = tokenizer(context)
    # Every remainder of a chunk of 3,840 samples matters, not so much how many chunks there are.
    length = data.draw(st.integers(0, 3)) * 3840 + data.draw(st.integers(0, 3839))
    samples = sound(length)
    cuts = data.draw(st.lists(st.integers(0, length), max_size=6))
    gain = transforms.energy_gain(samples)
    got = streamed(made.stream(gain), samples, cuts)
    want = made.merge(*made.encode_batch([samples])[0])
    np.testing.assert_array_equal(got, want)
    assert len(want) >= 5 * (length // 1920 - 1)
    assert length < 7680 or len(np.unique(want)) > 2


@pytest.mark.parametrize("context", ["chunk", "full"])
def test_every_group_comes_when_it_was_stated(context):
    made = tokenizer(context)
    samples = sound(20000)
    stream, arrived = made.stream(), []
    step = 80
    for start in range(0, len(samples), step):
        new = stream.push(samples[start : start + step])
        arrived += [start + step] * (len(new) // 5)
    arrived += [len(samples)] * (len(stream.finish()) // 5)
    assert len(arrived) == 10
    for group, when in enumerate(arrived):
        stated = made.emission_samples(group, len(samples))
        assert stated <= when < stated + step
        # Never later than a segment after the group's own end.
        assert stated <= 1920 * (group + 1) + max(made.segment_samples, 3840)


def test_long_sound_keeps_no_more_than_a_segment():
    stream = tokenizer("chunk").stream()
    for part in np.split(sound(160000), 10):
        stream.push(part)
        assert all(len(each._samples) <= max(7680, 4720) for each in stream._streams)


def test_mistakes_are_told():
    stream = tokenizer("chunk").stream()
    with pytest.raises(ValueError, match="shape"):
        stream.push(np.zeros((2, 2)))
    stream.finish()
    with pytest.raises(ValueError, match="finished"):
        stream.push(np.zeros(3))
    made = tokenizer("chunk")
    with pytest.raises(UserError, match="segment_seconds=0.5"):
        dual_codebook.DualCodebookTokenizer(made.linguistic, made.semantic, 0.5)
