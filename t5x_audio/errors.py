"""What entry points tell in a single line; any other exception is a defect and keeps its traceback.

`UserError`, the one exception that means "the input is at fault", ends them with code 2.
"""


class UserError(Exception):
    """Bad input. The message is one line that names the culprit and how to mend it."""


class Abandoned(KeyboardInterrupt):
    """An interruption that leaves threads at work which cannot be stopped, but may be lost."""
