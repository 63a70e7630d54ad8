"""Quantisation-aware self-supervision and low-bit inference."""
