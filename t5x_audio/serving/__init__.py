"""A spoken question in, a spoken answer out."""
