"""Audio codes to speech: flow matching, HiFT, discriminators, speaker encoder."""
