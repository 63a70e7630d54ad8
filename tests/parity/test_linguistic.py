"""The linguistic tokenizer against FunASR's own modules, at the published size.

A streaming Paraformer of 50 layers with random weights is built by FunASR, saved by PyTorch,
imported by `interop.paraformer`, and both encode the same Mandarin sentences: with full context,
and chunk by chunk with caches as Step-Audio's tokenizer does ([0, 4, 5], look-back 4). The
reference is computed in float64, so that what differs is our float32 and FunASR's, which is
measured too.
"""

import contextlib
import copy
import dataclasses
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

with contextlib.redirect_stdout(io.StringIO()):  # it asks for packages that are not needed
    from funasr.frontends.wav_frontend import WavFrontend, WavFrontendOnline
    from funasr.models.paraformer import cif_predictor, decoder  # noqa: F401 registered by name
    from funasr.models.paraformer_streaming.model import ParaformerStreaming
    from funasr.models.sanm.encoder import SANMEncoder
    from funasr.models.scama import encoder  # noqa: F401

from t5x_audio.interop import assembly, paraformer

SIZES = {
    "output_size": 512,
    "attention_heads": 4,
    "linear_units": 2048,
    "num_blocks": 50,
    "decoder_blocks": 16,
    "vocab_size": 8501,
    "codes": 1024,
}
CHUNK, LOOK_BACK = [0, 4, 5], 4
STRIDE = 960 * CHUNK[1]  # samples
FRONT_END = {
    "fs": 16000,
    "window": "hamming",
    "n_mels": 80,
    "frame_length": 25,
    "frame_shift": 10,
    "lfr_m": 7,
    "lfr_n": 6,
}
# Lengths around what ends a chunk, a stack and a window; Step-Audio skips tails of under 480.
TAILS = (0, 1, 79, 80, 399, 400, 480, 719, 720, 879, 880, 1040, 1839, 1840, 2800, 3839)


def encoder_values() -> dict:
    """encoder_conf of the checkpoint."""
    return {
        "output_size": SIZES["output_size"],
        "attention_heads": SIZES["attention_heads"],
        "linear_units": SIZES["linear_units"],
        "num_blocks": SIZES["num_blocks"],
        "dropout_rate": 0.1,
        "positional_dropout_rate": 0.1,
        "attention_dropout_rate": 0.1,
        "input_layer": "pe_online",
        "pos_enc_class": "SinusoidalPositionEncoder",
        "normalize_before": True,
        "kernel_size": 11,
        "sanm_shfit": 0,
        "selfattention_layer_type": "sanm",
    }


def reference() -> ParaformerStreaming:
    """FunASR's model with random weights."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = ParaformerStreaming(
            encoder="SANMEncoderChunkOpt",
            encoder_conf={k: v for k, v in encoder_values().items() if k != "pos_enc_class"},
            decoder="ParaformerSANMDecoder",
            decoder_conf={
                "attention_heads": SIZES["attention_heads"],
                "linear_units": SIZES["linear_units"],
                "num_blocks": SIZES["decoder_blocks"],
                "att_layer_num": SIZES["decoder_blocks"],
                "kernel_size": 11,
                "sanm_shfit": 5,
            },
            predictor="CifPredictorV2",
            predictor_conf={
                "idim": SIZES["output_size"],
                "threshold": 1.0,
                "l_order": 1,
                "r_order": 1,
                "tail_threshold": 0.45,
            },
            ctc_weight=0.0,
            input_size=560,
            vocab_size=SIZES["vocab_size"],
        ).eval()
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def write_folder(folder: pathlib.Path, model: ParaformerStreaming, speech) -> None:
    """A folder of FunASR: the model, and mean and scale of these recordings."""
    import yaml

    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.pt")
    values = {
        "model": "ParaformerStreaming",
        "encoder": "SANMEncoderChunkOpt",
        "encoder_conf": encoder_values(),
        "frontend": "WavFrontendOnline",
        "frontend_conf": FRONT_END,
        "tokenizer": "CharTokenizer",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    plain = WavFrontend(cmvn_file=None, dither=0.0, **FRONT_END)
    features = np.concatenate([plain(torch.tensor(x)[None], [len(x)])[0][0] for x in speech])
    shift, scale = -features.mean(0), 1 / features.std(0)
    text = "<Nnet> \n<Splice> 560 560 \n[ 0 ]\n"
    for name, numbers in (("AddShift", shift), ("Rescale", scale)):
        joined = " ".join(f"{x:.6f}" for x in numbers)
        text += f"<{name}> 560 560 \n<LearnRateCoef> 0 [ {joined} ]\n"
    (folder / "am.mvn").write_text(text + "</Nnet> \n")


def front_end(kind, folder: pathlib.Path):
    """One of FunASR's front ends; dither 0, as tokens are to be deterministic."""
    return kind(cmvn_file=str(folder / "am.mvn"), dither=0.0, **FRONT_END)


def offline(model) -> SANMEncoder:
    """FunASR's encoder with full context, of the same weights and type."""
    values = encoder_values() | {"input_layer": "pe"}
    del values["pos_enc_class"]
    encoder = SANMEncoder(input_size=560, **values).eval()
    encoder.load_state_dict(model.encoder.state_dict())
    return encoder.to(next(model.parameters()).dtype)


@torch.no_grad()
def whole(model, frames) -> np.ndarray:
    """Normalised features [N, 560] -> outputs [N, width], full context."""
    dtype = next(model.parameters()).dtype
    return offline(model)(frames[None].to(dtype), torch.tensor([len(frames)]))[0][0].numpy()


@torch.no_grad()
def chunk_by_chunk(model, online, samples: np.ndarray) -> np.ndarray:
    """Waveform [T] -> outputs [N, width]: the loop of Step-Audio's `infer_encoder`, is_final."""
    dtype = next(model.parameters()).dtype
    cache = {}
    model.init_cache(
        cache,
        chunk_size=CHUNK,
        encoder_chunk_look_back=LOOK_BACK,
        encoder_conf=encoder_values(),
        frontend_conf=FRONT_END,
    )
    outputs, count = [], len(samples) // STRIDE + 1
    for i in range(count):
        piece = torch.tensor(samples[i * STRIDE : (i + 1) * STRIDE])
        if len(piece) == 0:
            break
        if i == count - 1 and not makes_a_stack(piece, cache["frontend"]):
            break
        frames, lengths = online(
            piece[None], [len(piece)], cache=cache["frontend"], is_final=i == count - 1
        )
        out, _ = model.encode_chunk(frames.to(dtype), lengths, cache=cache)
        outputs.append(out[0, -int(lengths[0]) :])
    if not outputs:
        return np.zeros((0, SIZES["output_size"]))
    return torch.cat(outputs).numpy()


def makes_a_stack(piece, cache: dict) -> bool:
    """Whether Step-Audio's copy of the front end makes anything of a last piece.

    It stacks from 7 frames on, those kept from before included (at first, 3 copies of the first
    one). FunASR has since come to fill up fewer.
    """
    samples = len(piece) + (cache["input_cache"].shape[-1] if cache else 0)
    kept = cache["lfr_splice_cache"][0].shape[0] if cache else 3
    return samples >= 400 and (samples - 400) // 160 + 1 + kept >= 7


def nearest(hidden, centres) -> tuple[np.ndarray, np.ndarray]:
    """Step-Audio's `kmean_cluster` in float64: (codes, by how much the second is farther)."""
    distances = torch.cdist(torch.tensor(hidden).double(), torch.tensor(centres).double())
    two = distances.topk(2, largest=False)
    return two.indices[:, 0].numpy(), (two.values[:, 1] - two.values[:, 0]).numpy()


def draw_codebook(hidden, size: int) -> np.ndarray:
    """Centres [size, width] that lie among the outputs, as k-means puts them."""
    rng = np.random.default_rng(0)
    chosen = hidden[rng.integers(len(hidden), size=size)]
    return (chosen + 0.5 * hidden.std(0) * rng.standard_normal(chosen.shape)).astype(np.float32)


@dataclasses.dataclass
class Pair:
    """Both implementations of one checkpoint."""

    folder: pathlib.Path
    float32: ParaformerStreaming
    float64: ParaformerStreaming
    ours: object


@pytest.fixture(scope="module")
def pair(tmp_path_factory, speech) -> Pair:
    folder = tmp_path_factory.mktemp("checkpoint") / "paraformer"
    model = reference()
    write_folder(folder, model, speech)
    precise = copy.deepcopy(model).double()
    online = front_end(WavFrontendOnline, folder)
    hidden = np.concatenate([chunk_by_chunk(model, online, x) for x in speech])
    np.save(folder / "linguistic_tokenizer.npy", draw_codebook(hidden, SIZES["codes"]))
    ours, report = paraformer.load(folder, folder / "linguistic_tokenizer.npy")
    assert report["tensors"] == len(model.encoder.state_dict())
    assert report["not_used"] == len(model.state_dict()) - report["tensors"] > 0
    return Pair(folder, model, precise, ours)


def compiled(model, call):
    """`call(model, *arguments)`, compiled; weights are arguments too, no constants to compile."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, *arguments: call(nnx.merge(graph, state), *arguments))
    return lambda *arguments: run(state, *arguments)


def error(got, want) -> float:
    """The largest difference relative to the largest value."""
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def with_context(model, context: str):
    """The same weights in an encoder of another context."""
    encoder = dataclasses.replace(model.config.encoder, context=context)
    config = dataclasses.replace(model.config, encoder=encoder)
    return assembly.build(config, assembly.arrays_of(model))


def test_full_context(pair, speech):
    """Offline: 50 layers over whole sentences, in one batch of two lengths."""
    plain = front_end(WavFrontend, pair.folder)
    batch = [plain(torch.tensor(x)[None], [len(x)])[0][0] for x in (speech[0], speech[1][:30000])]
    lengths = [len(frames) for frames in batch]
    padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).numpy()
    ours = with_context(pair.ours, "full")
    encode = compiled(ours, lambda model, x, n: model.encoder(x, n))
    got = encode(jnp.asarray(padded), jnp.asarray(lengths))
    for row, frames in enumerate(batch):
        want = whole(pair.float64, frames)
        mine, theirs = error(got[row, : len(want)], want), error(whole(pair.float32, frames), want)
        print(f"full context, {len(want)} frames: ours {mine:.1e}, FunASR in float32 {theirs:.1e}")
        assert mine < 1e-4


def test_chunk_by_chunk(pair, speech):
    """Streaming: the compiled step with explicit state gives FunASR's outputs and codes."""
    samples = np.concatenate(speech)
    online = front_end(WavFrontendOnline, pair.folder)
    want = chunk_by_chunk(pair.float64, online, samples)
    theirs = error(chunk_by_chunk(pair.float32, online, samples), want)
    ours = pair.ours
    features, counts = ours.features(jnp.asarray(samples[None]), jnp.asarray([len(samples)]))
    frames = ours.normalize(features, counts)[:, : int(counts[0])]
    step = compiled(ours, lambda model, *arguments: model.encoder.step(*arguments))
    state, outputs = ours.encoder.initial_state(1), []
    for start in range(0, frames.shape[1], CHUNK[1]):
        chunk = frames[:, start : start + CHUNK[1]]
        short = CHUNK[1] - chunk.shape[1]
        chunk = jnp.pad(chunk, ((0, 0), (0, short), (0, 0)))
        out, state = step(chunk, jnp.asarray([CHUNK[1] - short]), state)
        outputs.append(out[0, : CHUNK[1] - short])
    got = np.concatenate(outputs)
    assert got.shape == want.shape
    mine = error(got, want)
    codes, margin = nearest(want, np.asarray(ours.codebook[...]))
    print(
        f"chunks, {len(want)} frames: ours {mine:.1e}, FunASR in float32 {theirs:.1e}; "
        f"{len(set(codes))} codes, closest decision {margin.min():.1e}"
    )
    assert mine < 1e-4
    encoded, count = compiled(ours, lambda model, x, n: model.encode(x, n))(
        jnp.asarray(samples[None]), jnp.asarray([len(samples)])
    )
    np.testing.assert_array_equal(encoded[0, : int(count[0])], codes)


def test_tails(pair, speech):
    """Recordings that end anywhere within a chunk: as many codes as Step-Audio, and the same."""
    cases = [
        speech[0][6000 : 6000 + chunks * STRIDE + tail] for chunks in (0, 1, 6) for tail in TAILS
    ]
    padded = np.zeros((len(cases), 7 * STRIDE), np.float32)
    for row, samples in enumerate(cases):
        padded[row, : len(samples)] = samples
    encoded, counts = compiled(pair.ours, lambda model, x, n: model.encode(x, n))(
        jnp.asarray(padded), jnp.asarray([len(samples) for samples in cases])
    )
    for samples, row, count in zip(cases, encoded, counts, strict=True):
        online = front_end(WavFrontendOnline, pair.folder)
        want = chunk_by_chunk(pair.float32, online, samples)
        codes, _ = nearest(want, np.asarray(pair.ours.codebook[...]))
        assert int(count) == len(codes), len(samples)
        np.testing.assert_array_equal(row[: len(codes)], codes, err_msg=str(len(samples)))


def test_export_is_read_by_funasr(pair, tmp_path):
    """PyTorch loads every tensor, the same, and FunASR's front end the same mean and scale."""
    folder = tmp_path / "out"
    paraformer.save(pair.ours, folder)
    read = torch.load(folder / "model.pt", weights_only=True)
    state = pair.float32.state_dict()
    assert read.keys() == {name for name in state if name.startswith("encoder.")}
    for name, tensor in read.items():
        assert torch.equal(tensor, state[name]), name
    assert not pair.float32.load_state_dict(read, strict=False).unexpected_keys
    before, after = (front_end(WavFrontendOnline, place).cmvn for place in (pair.folder, folder))
    assert torch.equal(before, after)
    centres = paraformer.CODEBOOK_FILE
    assert (folder / centres).read_bytes() == (pair.folder / centres).read_bytes()
