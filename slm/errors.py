"""The two ways a run ends early: the user can mend it, or the infrastructure must.

Each carries one line that says what is wrong, the value, and the remedy; the entry points print that line,
put it into the run's `error` tag and exit with the class's code. Anything else is a bug and keeps its traceback.
"""


class BadInput(Exception):
    """Something the user gave is wrong: a parameter, a file, a model. Raised before any model is loaded."""

    exit_code = 2


class Unavailable(Exception):
    """A server, a store or a hub did not answer, or refused."""

    exit_code = 4
