"""Compiles for a pod that is not there, and says in one line what does not fit."""

import re

from t5x_audio.errors import UserError


def compile_for(topology: str, lowered, what: str, remedy: str):
    """`lowered.compile()`; UserError names the topology where `what` lacks memory."""
    try:
        return lowered.compile()
    except Exception as error:  # of the C API: no class of its own
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        raise UserError(
            f"--topology={topology}: {what} does not fit ({shortage(text)}); {remedy}, "
            "or shard over more chips"
        ) from error


def shortage(text: str) -> str:
    """What the compiler says of the memory it lacks; it has two ways to put it."""
    found = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+|total memory required.*?exceeds.*?\)", text)
    return found[0] if found else text.split("RESOURCE_EXHAUSTED:")[-1].strip().split("\n")[0][:120]
