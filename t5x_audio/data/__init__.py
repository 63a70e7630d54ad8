"""Corpora, the data engine and the readers of cached shards."""
