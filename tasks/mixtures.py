"""SeqIO mixtures by share of tokens.

A mixture is {task: share}, as gin/tasks/mixtures.gin lists them. SeqIO mixes by examples, so a
share is divided by the task's mean length, read from its cache when the mixture is used.
"""

import functools
import os
from collections.abc import Mapping

from t5x_audio.data.lm_reader import read_stats
from t5x_audio.errors import UserError


def register(name: str, shares: Mapping[str, float], run_dir: str):
    """Registers (or registers anew) the SeqIO mixture `name`. UserError for an unknown task."""
    import seqio

    for task in shares:
        if task not in seqio.TaskRegistry.names():
            raise UserError(f"mixture {name}: no task is called {task!r}")
    rates = [
        (task, functools.partial(_examples_per_token, share=share, run_dir=run_dir))
        for task, share in shares.items()
    ]
    seqio.MixtureRegistry.remove(name)
    return seqio.MixtureRegistry.add(name, rates)


def _examples_per_token(task, share: float, run_dir: str) -> float:
    stats = read_stats(os.path.join(run_dir, "tasks", task.name))
    return share * stats["train"]["examples"] / stats["train"]["tokens"]
