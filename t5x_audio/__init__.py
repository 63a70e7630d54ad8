"""t5x_audio: audio-LLM pretraining in JAX, from waveform to spoken answer."""

__version__ = "0.1.0"
