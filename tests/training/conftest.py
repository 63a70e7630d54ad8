import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # Tests and their processes share toy_run.
