import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.tokenizers import dual_codebook, vector_quantizer
from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig

streams = st.tuples(
    st.lists(st.integers(0, 1023), max_size=40), st.lists(st.integers(0, 4095), max_size=60)
)


@given(streams)
def test_split_returns_what_was_merged(codes):
    linguistic, semantic = (np.array(c, np.int32) for c in codes)
    groups = min(len(linguistic) // 2, len(semantic) // 3)
    flat = dual_codebook.merge(linguistic, semantic, 1024)
    assert flat.shape == (5 * groups,) and flat.dtype == np.int32
    back = dual_codebook.split(flat, 1024)
    np.testing.assert_array_equal(back[0], linguistic[: 2 * groups])
    np.testing.assert_array_equal(back[1], semantic[: 3 * groups])


@given(st.integers(0, 20), st.integers(1, 2000), st.randoms(use_true_random=False))
def test_merge_of_split_is_the_identity(groups, linguistic_size, random):
    flat = []
    for _ in range(groups):
        flat += [random.randrange(linguistic_size) for _ in range(2)]
        flat += [linguistic_size + random.randrange(4096) for _ in range(3)]
    merged = dual_codebook.merge(*dual_codebook.split(flat, linguistic_size), linguistic_size)
    np.testing.assert_array_equal(merged, np.array(flat, np.int32))


def test_a_group_is_two_linguistic_then_three_semantic():
    flat = dual_codebook.merge([1, 2, 3, 4, 9], [0, 1, 2, 3, 4, 5, 7, 7], 100)
    np.testing.assert_array_equal(flat, [1, 2, 100, 101, 102, 3, 4, 103, 104, 105])


def test_only_one_codebook_is_left():
    flat = np.array([1, 2, 101, 102, 103], np.int32)
    assert dual_codebook.only(flat, 100, "semantic").tolist() == [0, 0, 101, 102, 103]
    assert dual_codebook.only(flat, 100, "linguistic").tolist() == [1, 2, 100, 100, 100]
    assert flat.tolist() == [1, 2, 101, 102, 103]
    with pytest.raises(UserError, match="codebook='both'"):
        dual_codebook.only(flat, 100, "both")


@pytest.mark.parametrize("flat", [[1, 2, 100, 101], [1, 100, 2, 101, 102], [1, 2, 3, 101, 102]])
def test_split_refuses_what_is_not_groups(flat):
    with pytest.raises(ValueError):
        dual_codebook.split(flat, 100)


@pytest.fixture(scope="module")
def tokenizer():
    encoder = SanmConfig(num_layers=2, width=16, num_heads=2, mlp_dim=16)
    linguistic = LinguisticTokenizerConfig(encoder, codebook_size=8, text_size=0)
    linguistic = linguistic.make(nnx.Rngs(0))
    linguistic.codebook[...] = jax.random.normal(jax.random.key(0), linguistic.codebook.shape)
    semantic = SemanticTokenizerConfig(
        16, 2, 16, 1, codebook_size=16, num_supervision_layers=0, text_size=0
    )
    semantic = semantic.make(nnx.Rngs(1))
    # Codes from the model's own output: untrained, it says much the same everywhere.
    noise = np.random.default_rng(2).normal(size=(1, 16000)).astype(np.float32) * 0.3
    hidden, _ = semantic.hidden(*semantic.features(noise, jnp.array([16000])))
    semantic.quantizer.codes[...] = vector_quantizer.normalize(hidden[0, :16])
    return dual_codebook.DualCodebookTokenizer(linguistic, semantic)


def test_codes_of_a_waveform_do_not_depend_on_its_company(tokenizer):
    generator = np.random.default_rng(0)
    waves = [generator.normal(size=n).astype(np.float32) * 0.1 for n in (9000, 15000, 100, 12345)]
    together = tokenizer.encode_batch(waves)
    for wave, (linguistic, semantic) in zip(waves, together, strict=True):
        alone = tokenizer.encode_batch([wave])[0]
        np.testing.assert_array_equal(linguistic, alone[0])
        np.testing.assert_array_equal(semantic, alone[1])
    assert [len(pair[0]) for pair in together] == [9, 16, 0, 13]
    assert [len(pair[1]) for pair in together] == [14, 24, 0, 20]
    assert len(np.unique(np.concatenate([pair[1] for pair in together]))) > 4


def test_encode_gives_flat_codes_whatever_the_level(tokenizer):
    wave = np.random.default_rng(1).normal(size=16000).astype(np.float32) * 0.1
    flat = tokenizer.encode(wave)
    assert len(flat) == 40 and flat.max() < tokenizer.size == 24
    np.testing.assert_array_equal(flat, tokenizer.encode(wave * 0.3))
    with pytest.raises(UserError, match="too short"):
        tokenizer.encode(wave[:800])
