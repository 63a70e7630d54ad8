"""Golden vectors of the tokenizers: small published files and what their references make of them.

Run in the environment of `make parity`:
  .venv-parity/bin/python tests/parity/make_tokenizer_golden.py
Writes tests/golden/tokenizers.npz: a recording (synthetic), its features by FunASR and S3Tokenizer,
a Paraformer folder and a speech tokenizer's graph of random weights with few layers, the encoders'
outputs and codes. Structure and code are those of test_linguistic.py and test_semantic.py.
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import test_linguistic
import test_semantic
from funasr.frontends.wav_frontend import WavFrontend, WavFrontendOnline

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tokenizers.npz"
SECONDS = 2.5
# In samples: within the first chunk, beyond a chunk without and with a stack, and whole.
LENGTHS = (880, 3840 + 800, 3840 + 880, 15360, 31003, int(SECONDS * 16000))


def recording() -> np.ndarray:
    """A gliding harmonic tone with pauses and noise, int16 [T]."""
    rng = np.random.default_rng(0)
    time = np.arange(int(SECONDS * 16000)) / 16000
    phase = 2 * np.pi * np.cumsum(130 + 50 * np.sin(2 * np.pi * 0.7 * time)) / 16000
    formant = 1 + 8 * (1 + np.sin(2 * np.pi * 1.9 * time))
    tone = sum(np.sin(k * phase + k) / (1 + abs(k - formant)) for k in range(1, 25))
    tone *= np.sin(2 * np.pi * 1.3 * time) > -0.5
    samples = 0.05 * tone + 0.003 * rng.standard_normal(len(time))
    return np.round(samples * 32768).astype(np.int16)


def linguistic(folder: pathlib.Path, samples: np.ndarray) -> dict[str, np.ndarray]:
    """A folder of FunASR and what it makes of the recording."""
    model = test_linguistic.reference()
    test_linguistic.write_folder(folder, model, [samples])
    online = test_linguistic.front_end(WavFrontendOnline, folder)
    outputs = {
        length: test_linguistic.chunk_by_chunk(model.double(), online, samples[:length])
        for length in LENGTHS
    }
    centres = test_linguistic.draw_codebook(outputs[LENGTHS[-1]], test_linguistic.SIZES["codes"])
    np.save(folder / "linguistic_tokenizer.npy", centres)
    found = {
        path.name: np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(folder.iterdir())
    }
    for length, hidden in outputs.items():
        found[f"chunks{length}"] = hidden.astype(np.float32)
        found[f"codes{length}"] = test_linguistic.nearest(hidden, centres)[0]
    plain = test_linguistic.front_end(WavFrontend, folder)
    frames = plain(torch.tensor(samples)[None], [len(samples)])[0][0]
    found["features"] = frames.numpy().astype(np.float32)
    found["whole"] = test_linguistic.whole(model, frames).astype(np.float32)
    return {f"linguistic/{name}": array for name, array in found.items()}


def semantic(folder: pathlib.Path, samples: np.ndarray) -> dict[str, np.ndarray]:
    """A graph, and what S3Tokenizer and onnxruntime make of the recording."""
    model = test_semantic.reference([samples])
    path = folder / "speech_tokenizer_v1.onnx"
    test_semantic.export(model, path)
    session = test_semantic.run_file(path)
    found = {path.name: np.frombuffer(path.read_bytes(), np.uint8)}
    mels = {length: test_semantic.features(samples[:length]) for length in LENGTHS}
    found["features"] = mels[LENGTHS[-1]].numpy().T
    for (length, mel), hidden in zip(
        mels.items(), test_semantic.hidden(model, list(mels.values())), strict=True
    ):
        found[f"hidden{length}"] = hidden
        found[f"codes{length}"] = test_semantic.codes_of(session, mel)
    return {f"semantic/{name}": array for name, array in found.items()}


if __name__ == "__main__":
    test_linguistic.SIZES.update(
        output_size=16, attention_heads=2, linear_units=24, num_blocks=3, decoder_blocks=1,
        vocab_size=9, codes=16,
    )  # fmt: skip
    # Heads of 8: the reference takes any number.
    test_semantic.SIZES.update(
        n_audio_state=16, n_audio_head=2, n_audio_layer=2, n_codebook_size=32
    )
    sound = recording()
    waveform = (sound / 32768).astype(np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        place = pathlib.Path(temporary)
        arrays = {"samples": sound, "lengths": np.array(LENGTHS)}
        arrays |= linguistic(place / "paraformer", waveform) | semantic(place, waveform)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes")
