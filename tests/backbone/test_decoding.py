"""Decoding against the plain forward pass, and what grammars, sampling and stopping promise."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.backbone import decoding, decoding_weights
from t5x_audio.backbone.decoding import Decoder, Sampling
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.training import partitioning

VOCAB, STOP = 40, 3
GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 9, 11], [7], [1, 2, 4, 6, 8, 10, 12]]


@pytest.fixture(scope="module")
def model():
    return TransformerConfig(
        num_layers=2, embed=16, mlp=32, num_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=VOCAB, dtype="float32", remat="none", init_std=0.5,
    ).make(nnx.Rngs(0))  # fmt: skip


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, stop_ids=[STOP])


@nnx.jit
def forward(model, tokens):
    return model(tokens)


def greedy_by_forward(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        width = 32  # one shape: what is behind the last token cannot be seen from it
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(forward(model, padded)[0, len(tokens) - 1])))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_the_full_forward(model, decoder):
    answers = decoder.generate(PROMPTS, sampling=GREEDY, max_new_tokens=16, block=8)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tolist() == greedy_by_forward(model, prompt, 16)


def test_a_row_does_not_depend_on_its_batch(decoder):
    together = decoder.generate(PROMPTS, sampling=GREEDY, max_new_tokens=16, block=8)
    alone = decoder.generate(PROMPTS[:1], sampling=GREEDY, max_new_tokens=16, block=8)
    assert together[0].tolist() == alone[0].tolist()


def test_stream_is_generate_in_blocks(decoder):
    options = {"sampling": Sampling(), "max_new_tokens": 20, "seed": 3}
    blocks = list(decoder.stream(PROMPTS, block=8, **options))
    assert all(b.shape[0] == 3 and b.shape[1] <= 8 for b in blocks)
    rows = np.concatenate(blocks, 1)
    whole = decoder.generate(PROMPTS, block=8, **options)
    assert [r[r != decoding.PADDING].tolist() for r in rows] == [w.tolist() for w in whole]
    assert all(len(w) <= 20 for w in whole)


def test_an_answer_ends_with_its_stop_token(decoder):
    answers = decoder.generate(
        PROMPTS * 4, sampling=Sampling(temperature=3.0, top_p=1.0), max_new_tokens=64, seed=1
    )
    ended = [a for a in answers if STOP in a]
    assert ended
    assert all(a.tolist().index(STOP) == len(a) - 1 for a in ended)


def alternating():
    """Even and odd tokens in turn; STOP is class 2, allowed after every odd one."""
    token_class = np.arange(VOCAB) % 2
    token_class[STOP] = 2
    return types.SimpleNamespace(
        token_class=token_class.astype(np.int32),
        allowed=np.array([[True, False, True], [False, True, False], [False, False, True]]),
        next_state=np.array([[1, 0, 2], [1, 0, 1], [2, 2, 2]], np.int32),
        start_state=0,
    )


def test_grammar_is_obeyed(decoder):
    answers = decoder.generate(
        PROMPTS, grammar=alternating(), sampling=Sampling(temperature=2.0), max_new_tokens=32
    )
    for answer in answers:
        body = answer[answer != STOP]
        assert (body % 2 == np.arange(len(body)) % 2).all()
        if STOP in answer:
            assert len(body) % 2 == 0


def test_repetition_rule_bars_a_frequent_token(decoder):
    sampling = Sampling(temperature=0, repetition_window=10)
    answer = decoder.generate([[5] * 3], sampling=sampling, max_new_tokens=40)[0]
    for end in range(10, len(answer)):
        window, following = answer[end - 10 : end], answer[end]
        if (window == window[-1]).sum() > 1:
            assert following != window[-1]


def test_top_k_of_one_is_greedy(decoder):
    one = decoder.generate(PROMPTS, sampling=Sampling(top_k=1), max_new_tokens=8, block=8)
    greedy = decoder.generate(PROMPTS, sampling=GREEDY, max_new_tokens=8, block=8)
    assert [a.tolist() for a in one] == [a.tolist() for a in greedy]


def test_min_p_keeps_what_is_nearly_as_likely():
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(5, 40)) * 3)
    probabilities = np.asarray(jax.nn.softmax(logits, -1))
    for min_p in (0.01, 0.2, 1.0):
        kept = decoding._admitted(logits, Sampling(top_p=1.0, min_p=min_p)) > -jnp.inf
        want = probabilities >= min_p * probabilities.max(-1, keepdims=True) * (1 - 1e-6)
        np.testing.assert_array_equal(kept, want)
    everything = decoding._admitted(logits, Sampling(top_p=1.0))
    np.testing.assert_array_equal(everything, logits)


def test_nucleus_keeps_the_fewest():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))
    kept = decoding._nucleus(logits, 0.6) > -jnp.inf
    assert kept.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert (decoding._nucleus(logits, 0.01) > -jnp.inf).sum() == 2


def test_nucleus_agrees_with_sorting():
    logits = np.random.default_rng(0).normal(size=(6, 300)).astype(np.float32) * 4
    logits[:, ::7] = -np.inf  # what a grammar forbids
    logits[0] *= 3
    for top_p in (0.1, 0.5, 0.9, 0.99):
        kept = np.asarray(decoding._nucleus(jnp.asarray(logits), top_p) > -jnp.inf)
        for row, mask in zip(logits.astype(np.float64), kept, strict=True):
            order = np.argsort(-row)
            probabilities = np.exp(row[order] - row.max())
            before = np.cumsum(probabilities / probabilities.sum()) - (
                probabilities / probabilities.sum()
            )
            assert set(order[before < top_p]) == set(np.flatnonzero(mask))


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[VOCAB]], [[-1]]])
def test_bad_prompts(decoder, prompts):
    with pytest.raises(UserError):
        decoder.generate(prompts, max_new_tokens=4)


def test_grammar_of_another_vocabulary(decoder):
    grammar = alternating()
    grammar.token_class = grammar.token_class[:-1]
    with pytest.raises(UserError, match="vocabulary and model"):
        decoder.generate(PROMPTS, grammar=grammar)


def run_on_4_devices():
    """Rows of a cache whole, groups of heads over `tensor`, weights over `fsdp` too."""
    config = TransformerConfig(
        num_layers=2, embed=16, mlp=32, num_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=VOCAB, dtype="float32", remat="none", init_std=0.5,
    )  # fmt: skip
    model = config.make(nnx.Rngs(0))
    mesh = partitioning.MeshShape(data=1, fsdp=2, tensor=2).make()
    graphdef, state = nnx.split(model)
    shardings = partitioning.ShardingRules().shardings(state, mesh)
    placed = nnx.merge(graphdef, jax.tree.map(jax.device_put, state, shardings))
    options = dict(sampling=GREEDY, max_new_tokens=16, block=8)
    for weights in (None, "int8"):
        for unstack in (True, False):
            want = Decoder(model, [STOP], weights).generate(PROMPTS, **options)
            with jax.set_mesh(mesh):
                decoder = Decoder(placed, [STOP], weights)
                kept = nnx.split(decoding_weights.prepare(placed, weights, unstack))
                decoder._graphdef, decoder._weights = kept
                got = decoder.generate(PROMPTS, **options)
                tokens, lengths = decoder._pad(PROMPTS)
                cache, *_ = decoding.prefill(*kept, tokens, lengths, 8)
            assert [a.tolist() for a in got] == [a.tolist() for a in want]
            keys = cache.keys[0] if unstack else cache.keys
            assert keys.addressable_shards[0].data.shape[-4:-2] == (3, 1)


def test_on_a_mesh(on_devices):
    on_devices(4, "run_on_4_devices")
