"""What a process of its own takes, for benchmarks of entry points."""

import pathlib
import re
import subprocess
import sys
import time


def run_python(*words: str) -> tuple[float, float]:
    """(seconds, GB of memory at the most) of Python with these arguments; its failure is ours.

    Memory is what the process holds itself, the highest of looks 20 ms apart.
    """
    begun, most = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *words])
    while process.poll() is None:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE):
            most = max(most, int(found[1]))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - begun, most * 1024 / 1e9
