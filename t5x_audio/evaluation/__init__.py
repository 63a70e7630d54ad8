"""WER, speaker similarity, MOS, answer accuracy and the report."""
