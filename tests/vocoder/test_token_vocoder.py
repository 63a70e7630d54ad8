import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.vocoder.flow_stream import StreamConfig
from t5x_audio.vocoder.token_vocoder import TokenVocoder
from tests.toy_vocoder import FLOW, HIFT, HIFT_FRAMES, PAIRED_FLOW
from tests.vocoder.spectral_flux import clicks

SPEAKER = np.array([1.0, -1.0, 0.5, 0.0], np.float32)


def _vocoder(build, flow_config, hift_config):
    def wake(flow):
        estimator = flow.estimator
        last = estimator.out_project if flow_config is PAIRED_FLOW else estimator.project
        kernel = last.kernel
        kernel[...] = jax.random.normal(jax.random.key(9), kernel.shape) * 3.0

    def amplify(hift):
        hift.conv_post.bias[...] += 2.0  # loud: the limiter has work

    flow, hift = build(flow_config, edit=wake), build(hift_config, edit=amplify)
    return TokenVocoder(flow, hift, bucket_groups=(4, 12))


@pytest.fixture(scope="module")
def vocoder(build):
    return _vocoder(build, FLOW, HIFT)


@pytest.fixture(scope="module")
def paired(build):
    return _vocoder(build, PAIRED_FLOW, HIFT_FRAMES)


@settings(max_examples=15, deadline=None)
@given(
    codes=st.lists(st.integers(0, 29), min_size=5, max_size=60),
    seed=st.integers(0, 3),
    is_paired=st.booleans(),
)
def test_any_codes_give_finite_samples_in_range(vocoder, paired, codes, seed, is_paired):
    samples = (paired if is_paired else vocoder).synthesize(codes, SPEAKER, seed=seed)
    assert samples.dtype == np.float32
    groups = -(-len(codes) // 5)
    assert samples.shape == (groups * 1920 if is_paired else len(codes) * 8 // 5 * 240,)
    assert np.isfinite(samples).all() and np.abs(samples).max() <= 1.0


def test_same_seed_same_samples(vocoder):
    codes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    first = vocoder.synthesize(codes, SPEAKER, seed=1)
    np.testing.assert_array_equal(first, vocoder.synthesize(codes, SPEAKER, seed=1))
    assert np.abs(first - vocoder.synthesize(codes, SPEAKER, seed=2)).max() > 0


def test_an_odd_tail_has_its_share_of_the_frames(vocoder):
    codes = [1, 2, 3, 4, 5, 6, 7]
    assert vocoder.mel(codes, SPEAKER).shape == (11, 6)  # 8 of five codes, 3 of 3.2 of two more
    assert np.abs(vocoder.mel([*codes[:-1], 8], SPEAKER) - vocoder.mel(codes, SPEAKER)).max() > 0


@pytest.mark.parametrize(
    ("tail", "added"),
    [
        ([3], [0, 10, 10, 10]),
        ([3, 4], [10, 10, 10]),
        ([3, 4, 15], [10, 10]),
        ([3, 4, 15, 16], [10]),
    ],
)
def test_an_odd_tail_of_pairs_is_filled_up(paired, tail, added):
    codes = [1, 2, 13, 14, 15]
    np.testing.assert_array_equal(
        paired.mel([*codes, *tail], SPEAKER), paired.mel([*codes, *tail, *added], SPEAKER)
    )


def test_pairs_after_a_prompt(paired):
    """The prompt is no part of the output but heard in it; its odd tail is left out."""
    codes, prompt = [1, 2, 13, 14, 15], [5, 6, 17, 18, 19]
    mel = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    alone = paired.mel(codes, SPEAKER)
    after = paired.mel(codes, SPEAKER, prompt_codes=prompt, prompt_mel=mel)
    assert alone.shape == after.shape == (6, 6)
    assert np.abs(alone - after).max() > 1e-3
    longer = paired.mel(codes, SPEAKER, prompt_codes=[*prompt, 1, 2], prompt_mel=mel)
    np.testing.assert_array_equal(after, longer)
    with pytest.raises(UserError, match="prompt_mel"):
        paired.mel(codes, SPEAKER, prompt_codes=prompt, prompt_mel=mel[:5])


def test_another_flow_of_the_same_sizes_takes_its_place(vocoder, build):
    def shift(flow):
        flow.project.bias[...] += 1.0

    codes, before = list(range(10)), vocoder.mel(list(range(10)), SPEAKER)
    other = vocoder.with_flow(build(FLOW, edit=shift))
    assert np.abs(other.mel(codes, SPEAKER) - before).max() > 0
    np.testing.assert_array_equal(vocoder.mel(codes, SPEAKER), before)
    with pytest.raises(UserError, match="other settings"):
        vocoder.with_flow(build(dataclasses.replace(FLOW, num_steps=2)))


def test_prompt_is_not_part_of_the_output(vocoder):
    mel = np.full((20, 6), -5.0, np.float32)
    samples = vocoder.synthesize(
        [1, 2, 3, 4, 5], SPEAKER, prompt_codes=list(range(10)), prompt_mel=mel
    )
    assert samples.shape == (1920,)


def test_vocode_matches_synthesize(vocoder):
    codes = list(range(15))
    mel = vocoder.mel(codes, SPEAKER, seed=3)
    assert mel.shape == (24, 6)
    samples = vocoder.synthesize(codes, SPEAKER, seed=3)
    np.testing.assert_allclose(vocoder.vocode(mel, seed=3), samples, atol=1e-6)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([], "0 codes"),
        ([1, 2, 3, 4], "4 codes"),
        ([1, 2, 3, 4, 30], "30 is outside"),
        ([1, 2, -1, 4, 5], "-1 is outside"),
        ([[1, 2, 3, 4, 5]], "flat list"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "whole numbers"),
    ],
)
def test_bad_codes_are_named(vocoder, codes, message):
    with pytest.raises(UserError, match=message):
        vocoder.synthesize(codes, SPEAKER)


def test_bad_speaker_prompt_and_mel_are_named(vocoder):
    codes = [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="speaker embedding"):
        vocoder.synthesize(codes, SPEAKER[:3])
    with pytest.raises(UserError, match="speaker embedding"):
        vocoder.synthesize(codes, SPEAKER * np.nan)
    with pytest.raises(UserError, match="both"):
        vocoder.synthesize(codes, SPEAKER, prompt_codes=codes)
    with pytest.raises(UserError, match="prompt_mel"):
        vocoder.synthesize(codes, SPEAKER, prompt_codes=codes, prompt_mel=np.zeros((7, 6)))
    with pytest.raises(UserError, match="mel: shape"):
        vocoder.vocode(np.zeros((0, 6)))
    with pytest.raises(UserError, match="not finite"):
        vocoder.vocode(np.full((3, 6), np.nan))


def test_models_of_different_mels_are_refused(build):
    flow, other = build(FLOW), build(dataclasses.replace(HIFT, num_mels=8))
    with pytest.raises(UserError, match="disagree on num_mels"):
        TokenVocoder(flow, other)


CODES = [(7 * i + 3) % 30 for i in range(97)]


@pytest.fixture(scope="module", params=["vocoder", "paired"])
def streaming(request) -> TokenVocoder:
    """Of either form: in windows, with caches."""
    return request.getfixturevalue(request.param)


def pushed(streaming, codes, pieces, **options):
    sizes = StreamConfig(chunk_codes=15, left_codes=20, right_codes=5)
    session = streaming.stream(SPEAKER, sizes=sizes, **options)
    made, start = [], 0
    for size in (*pieces, len(codes)):
        made.append(session.push(codes[start : start + size]))
        start += size
    return [*made, session.finish()]


def test_any_pushing_gives_the_same_samples(streaming):
    """As many as the whole has; finite and in range."""
    whole = streaming.synthesize(CODES, SPEAKER, seed=1)
    made = np.concatenate(pushed(streaming, CODES, (), seed=1))
    assert made.shape == whole.shape and np.abs(made).max() <= 1.0 and np.std(made) > 1e-3
    by_blocks = pushed(streaming, CODES, [15] * 6, seed=1)
    np.testing.assert_allclose(np.concatenate(by_blocks), made, atol=1e-3)
    block = streaming.flow_config.mel_lengths(15) * streaming.hop
    assert [len(one) for one in by_blocks[3:6]] == [block] * 3  # once it runs
    one_by_one = pushed(streaming, CODES, [1] * 40, seed=1)
    np.testing.assert_allclose(np.concatenate(one_by_one), made, atol=1e-3)


def test_speech_has_no_click_at_the_seams(streaming):
    """Where chunks meet, the spectrum changes no more than within them."""
    codes = np.random.default_rng(0).integers(0, 30, 150)
    samples = np.concatenate(pushed(streaming, codes, ()))
    seams = np.arange(2, 9) * streaming.flow_config.mel_lengths(15) * streaming.hop
    assert not clicks(samples, seams)
    for seam in seams:
        samples[seam - 320 : seam] = 0.0
    assert clicks(samples, seams)


def test_what_fits_into_a_chunk_is_as_in_the_whole(streaming):
    for count in (5, 13):
        whole = streaming.synthesize(CODES[:count], SPEAKER, seed=2)
        made = np.concatenate(pushed(streaming, CODES[:count], (), seed=2))
        np.testing.assert_allclose(made, whole, atol=1e-3)


def test_a_stream_after_a_prompt(streaming):
    config = streaming.flow_config
    mel = np.full((config.mel_lengths(10), config.num_mels), -5.0, np.float32)
    prompt = {"prompt_codes": CODES[:10], "prompt_mel": mel}
    whole = streaming.synthesize(CODES[10:20], SPEAKER, **prompt)
    made = np.concatenate(pushed(streaming, CODES[10:20], (3,), **prompt))
    assert made.shape == whole.shape
    if streaming.flow_config is FLOW:  # caches let the prompt see nothing after it
        np.testing.assert_allclose(made, whole, atol=1e-3)


def test_less_than_a_group_and_bad_codes_in_a_stream(streaming):
    session = streaming.stream(SPEAKER)
    with pytest.raises(UserError, match="outside of the codebook"):
        session.push([1, 2, 99])
    assert not len(session.push([])) and not len(session.finish())
    with pytest.raises(UserError, match="stream is finished"):
        session.push([1])
    with pytest.raises(UserError, match="StreamConfig.left_codes=7"):
        StreamConfig(left_codes=7)
