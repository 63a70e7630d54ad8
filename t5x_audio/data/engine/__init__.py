"""The data engine: a closed world of questions, spoken, varied and checked by a recogniser."""
