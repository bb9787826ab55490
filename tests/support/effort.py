"""How much the tests do: PHI3_MLFLOW_TESTS=long takes every example and the whole time, as before a release."""

import os
from collections.abc import Sequence

LONG = os.environ.get("PHI3_MLFLOW_TESTS") == "long"
EXAMPLES = 300 if LONG else 60  # of hypothesis
LOAD_SECONDS = 300 if LONG else 60  # of clients in a closed loop, while the alias moves
SOAK_SECONDS = 1800 if LONG else 30  # of a server under mixed requests


def some(items: Sequence, count: int) -> list:
    """About `count` of the items, evenly spaced; all of them in a long run."""
    return list(items if LONG else items[:: max(len(items) // count, 1)])
