"""For every test: quick compilation instead of quick programs, since each program runs once."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
