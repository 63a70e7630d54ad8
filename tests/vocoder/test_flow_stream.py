"""What stands in the windows of a stream, with a flow that gives the numbers of its frames."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.vocoder.flow import FlowConfig
from t5x_audio.vocoder.flow_stream import StreamConfig, Window, WindowStream

CONFIG = FlowConfig(num_mels=1)  # 22.05 kHz: a group is 10.3 frames


def begun(sizes: StreamConfig, prompt: int, seen: list[Window]) -> WindowStream:
    codes = np.arange(prompt, dtype=np.int32) + 5000
    mel = np.arange(CONFIG.mel_lengths(prompt), dtype=np.float32)[:, None]

    def sample(window):
        seen.append(window)
        return window.noise_frames[:, None].astype(np.float32)

    return WindowStream(CONFIG, sample, codes, mel, sizes)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.builds(
        StreamConfig,
        chunk_codes=st.sampled_from([5, 15]),
        left_codes=st.sampled_from([0, 20]),
        right_codes=st.sampled_from([0, 10]),
    ),
    prompt=st.sampled_from([0, 10]),
    pieces=st.lists(st.integers(0, 40), min_size=1, max_size=6),
)
def test_every_frame_once_and_in_order(sizes, prompt, pieces):
    """Whatever is pushed; the frames before a chunk are those that were given out."""
    seen: list[Window] = []
    stream, total = begun(sizes, prompt, seen), sum(pieces)
    codes = np.split(np.arange(total, dtype=np.int32), np.cumsum(pieces)[:-1])
    mel = np.concatenate([stream.push(one) for one in codes] + [stream.finish()])
    known = CONFIG.mel_lengths(prompt)
    np.testing.assert_array_equal(mel[:, 0], known + np.arange(CONFIG.mel_lengths(total)))
    for window in seen:
        before = window.prompt_codes - prompt
        first = int(window.codes[prompt])
        wanted = np.arange(first, first + window.num_codes - prompt)
        np.testing.assert_array_equal(window.codes[prompt : window.num_codes], wanted)
        assert before <= sizes.left_codes and window.codes[:prompt].tolist() == [
            5000 + i for i in range(prompt)
        ]
        frames = window.prompt_frames
        np.testing.assert_array_equal(window.mel[:frames, 0], window.noise_frames[:frames])
        assert frames - known == CONFIG.mel_lengths(first + before) - CONFIG.mel_lengths(first)


def test_memory_does_not_grow():
    """Five minutes, then twenty more."""
    seen: list[Window] = []
    stream = begun(StreamConfig(), 10, seen)

    def held() -> int:
        return sum(a.nbytes for a in vars(stream).values() if isinstance(a, np.ndarray))

    block, sizes = np.zeros(15, np.int32), []
    for minutes in (5, 20):
        for _ in range(minutes * 60 * 25 // 9):
            stream.push(block)
            seen.clear()
        sizes.append(held())
    assert sizes[0] == pytest.approx(sizes[1], abs=16)  # a frame more or less
