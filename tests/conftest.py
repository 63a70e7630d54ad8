"""For every test: quick compilation instead of quick programs, and no deadline on examples."""

import os

import hypothesis

# Each program runs once or twice.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# How long an example takes says more of the machine's load than of the code.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")
