"""The vocabulary, sequence layouts, masks and packing."""
