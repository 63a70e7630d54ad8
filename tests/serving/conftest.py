"""A whole run directory with random weights, made through the same calls as a real one."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.audio import io
from t5x_audio.backbone.decoding import Decoder
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.data import corpus, lm_reader, records
from t5x_audio.sequences.layouts import Layouts
from t5x_audio.sequences.vocabulary import Vocabulary, train_sentencepiece
from t5x_audio.serving.assistant import SpokenAssistant
from t5x_audio.serving.model_dir import RunDirectory
from t5x_audio.tokenizers.dual_codebook import DualCodebookTokenizer, merge
from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig
from t5x_audio.training import checkpoints
from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.flow import FlowConfig
from t5x_audio.vocoder.hift import HiftConfig
from t5x_audio.vocoder.unet import UnetConfig

LINGUISTIC_SIZE, SEMANTIC_SIZE = 16, 24
WORDS = {"cold": "hot", "small": "big", "night": "day", "down": "up"}


def _speech(seconds: float, pitch: float) -> np.ndarray:
    """Something voiced with syllables: int16 [T] at 16 kHz."""
    t = np.arange(int(16000 * seconds)) / 16000
    voice = sum(np.sin(2 * np.pi * k * pitch * t) / k for k in range(1, 8))
    return io.to_int16(0.1 * voice * np.clip(np.sin(9 * t), 0.05, 1)).astype(np.int16)


def _questions():
    return [
        {
            "id": f"opposites-{short}", "split": "test", "category": "opposites",
            "question": f"what is the opposite of {word}",
            "answer": f"the opposite of {word} is {short}",
            "short_answer": short, "novelty": "phrasing",
        }
        for short, word in WORDS.items()
    ]  # fmt: skip


def _clips(rows, asker: str) -> list[corpus.Clip]:
    clips = []
    for i, row in enumerate(rows):
        for role, speaker, pitch in (("question", asker, 180 + i), ("answer", "joe", 110 + i)):
            clips.append(
                corpus.Clip(
                    f"{row['id']}-{role}-{asker}", _speech(0.6 + 0.1 * i, pitch), row[role],
                    speaker, role, row["id"], row["category"],
                )
            )  # fmt: skip
    return clips


def write_corpus(root: pathlib.Path) -> dict[str, list[corpus.Clip]]:
    rows = _questions()
    splits = {"train": _clips(rows, "trained"), "test": _clips(rows, "unheard")}
    corpus.write_corpus(root / "corpus" / "spoken_qa", splits, questions=rows)
    return splits


def write_vocabulary(root: pathlib.Path) -> Vocabulary:
    texts = [row[name] for row in _questions() for name in ("question", "answer")]
    model = train_sentencepiece(texts * 3, str(root / "pieces"), 140)
    vocabulary = Vocabulary(160, LINGUISTIC_SIZE, SEMANTIC_SIZE, 8, 8, sentencepiece=model)
    vocabulary.save(str(root / "vocabulary"))
    return Vocabulary.load(str(root / "vocabulary"))


def _make(config, seed: int):
    """A module with random matrices and vectors of ones, without compiling its initialisers."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        values = rng.normal(0, 0.3, leaf.shape) if len(leaf.shape) > 1 else np.ones(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(seed))))
    return nnx.merge(graphdef, jax.tree.map(fill, state))


def _save(folder: pathlib.Path, config, name: str = "model", seed: int = 0):
    module = _make(config, seed)
    checkpoints.save_model(folder, {name: config}, {name: module})
    return module


def write_tokenizers(root: pathlib.Path) -> DualCodebookTokenizer:
    encoder = SanmConfig(num_layers=1, width=16, num_heads=2, mlp_dim=16)
    config = LinguisticTokenizerConfig(encoder, LINGUISTIC_SIZE, text_size=0)
    linguistic = _save(root / "linguistic_tokenizer", config)
    config = SemanticTokenizerConfig(
        width=16, num_heads=2, mlp_dim=16, num_layers=1, codebook_size=SEMANTIC_SIZE,
        num_supervision_layers=0, text_size=0,
    )  # fmt: skip
    return DualCodebookTokenizer(linguistic, _save(root / "semantic", config))


def write_tokens(root: pathlib.Path, splits, tokenizer) -> dict[str, np.ndarray]:
    """Writes the token corpus; {clip id: flat local codes}."""
    codes = {}
    for split, clips in splits.items():
        streams = tokenizer.encode_batch([clip.samples for clip in clips])
        with records.RecordWriter(root / "tokens" / "spoken_qa", split) as writer:
            for clip, (linguistic, semantic) in zip(clips, streams, strict=True):
                record = clip.to_record()
                del record["audio"]
                writer.write(record | {"linguistic": linguistic, "semantic": semantic})
                codes[clip.id] = merge(linguistic, semantic, LINGUISTIC_SIZE)
    return codes


def write_task(root: pathlib.Path, vocabulary: Vocabulary, codes) -> None:
    """The cache of one task, as `cache_tasks` leaves it."""
    layouts, folder, lengths = Layouts(vocabulary), root / "tasks" / "aqaa", []
    with records.RecordWriter(folder, "train") as writer:
        for row in _questions():
            asked, said = (codes[f"{row['id']}-{role}-trained"] for role in ("question", "answer"))
            tokens, weights = layouts.aqaa(asked, row["answer"], said)
            writer.write({"tokens": tokens, "weights": weights})
            lengths.append(len(tokens))
    np.save(lm_reader.lengths_path(str(folder), "train"), np.asarray(lengths, np.int32))
    stats = {"task": "aqaa", "vocabulary": vocabulary.sizes(), "pad": vocabulary.pad}
    (folder / lm_reader.STATS_FILE).write_text(json.dumps(stats))


def write_backbone(root: pathlib.Path, vocabulary: Vocabulary) -> None:
    config = TransformerConfig(
        num_layers=2, embed=32, mlp=32, num_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=vocabulary.size, dtype="float32", remat="none",
    )  # fmt: skip
    _save(root / "merged", config)


def write_vocoder(root: pathlib.Path, codes) -> None:
    flow = FlowConfig(
        codebook=LINGUISTIC_SIZE + SEMANTIC_SIZE, num_mels=8, speaker_dim=256, sample_rate=16000,
        hop=256, encoder=ConformerConfig(width=16, num_layers=1, num_heads=2, mlp_dim=16),
        regulator_layers=1, num_steps=2,
        estimator=UnetConfig((8, 8), num_mid_stages=1, num_blocks=1, num_heads=1, head_dim=8,
                             norm_groups=2),
    )  # fmt: skip
    _save(root / "flow", flow)
    hift = HiftConfig(
        num_mels=8, sample_rate=16000, base_channels=16, upsample_rates=(8, 8),
        upsample_kernels=(16, 16), resblock_kernels=(3,), resblock_dilations=(1,),
        source_kernels=(3, 3), f0_channels=8, f0_layers=1, num_harmonics=2,
    )  # fmt: skip
    _save(root / "hift", hift, "generator")
    keys = [f"train {name}" for name in codes if name.endswith("trained")]
    embeddings = np.random.default_rng(0).random((len(keys), 256), np.float32)
    np.savez(root / "tokens" / "speaker_embeddings.npz", keys=keys, embeddings=embeddings)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> pathlib.Path:
    """runs/<size> as a finished life leaves it, but untrained; not to be changed by a test."""
    root = tmp_path_factory.mktemp("run")
    splits = write_corpus(root)
    vocabulary = write_vocabulary(root)
    codes = write_tokens(root, splits, write_tokenizers(root))
    write_task(root, vocabulary, codes)
    write_backbone(root, vocabulary)
    write_vocoder(root, codes)
    return root


@pytest.fixture(scope="session")
def parts(run_dir) -> dict:
    """What an assistant is made of, loaded once, with few shapes to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t5x_audio.serving.assistant.VOCODER_GROUPS", (3, 32))
        assistant = SpokenAssistant.load(run_dir)
    names = ("vocabulary", "tokenizer", "decoder", "vocoder", "voice")
    return {name: getattr(assistant, name) for name in names}


@pytest.fixture
def loaded(parts, monkeypatch) -> None:
    """`SpokenAssistant.load` checks the run but takes `parts`, so that nothing compiles twice; only
    a backbone that is to be kept in another way is its own.
    """

    def load(run_dir, *, weights=None, cache=None, **options):
        RunDirectory(run_dir).check()
        taken = dict(parts)
        if weights or cache:
            backbone = checkpoints.load_model(RunDirectory(run_dir).backbone)
            taken["decoder"] = Decoder(backbone, [parts["vocabulary"].eot], weights, cache)
        return SpokenAssistant(**taken, **options)

    monkeypatch.setattr(SpokenAssistant, "load", load)
