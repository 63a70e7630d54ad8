"""The one exception that means "the input is at fault".

Entry points print its message as a single line and exit with code 2; any other exception is a
defect of the program and keeps its traceback.
"""


class UserError(Exception):
    """Bad input. The message is one line that names the culprit and how to mend it."""
