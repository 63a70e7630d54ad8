"""The Step-1 transformer, its cache, decoding and sampling."""
