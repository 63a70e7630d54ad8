"""In a process of its own: the settings hold for the rest of a process's life."""

import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
from t5x_audio.training.host_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory(1 << 30):
    sys.exit("not glibc")
import numpy as np
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    np.ones(16_000_000)  # 128 MB, freed at once
print(faults() - before)
"""


def faults_of_a_repeated_allocation(mode):
    command = [sys.executable, "-c", _PROGRAM, mode]
    done = subprocess.run(command, capture_output=True, text=True)
    if "not glibc" in done.stderr:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_freed_block_is_used_again():
    assert faults_of_a_repeated_allocation("keep") < 100
    assert faults_of_a_repeated_allocation("leave") > 100
