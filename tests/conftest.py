"""For every test: quick compilation instead of quick programs, and no deadline on examples."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

# Each program runs once or twice.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# How long an example takes says more of the machine's load than of the code.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


@pytest.fixture
def on_devices(request):
    """(count, name): runs a function of the test's module where a CPU makes `count` devices.

    In a process of its own: JAX counts its devices once.
    """

    def run(count: int, name: str) -> None:
        module = Path(request.module.__file__)
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            f"import jax; jax.config.update('jax_num_cpu_devices', {count})\n"
            f"import {module.stem}; {module.stem}.{name}()"
        )
        command = [sys.executable, "-c", code, str(module.parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return run
