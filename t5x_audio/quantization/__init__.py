"""Quantisation-aware self-supervision and low-bit inference.

`rules` says what is quantised, `simulate` runs a model as if it were, by the arithmetic of
`fake_quant`.
"""
