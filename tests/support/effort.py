"""How much the tests do: PHI3_MLFLOW_TESTS=long takes every example, as before a release."""

import os
from collections.abc import Sequence

LONG = os.environ.get("PHI3_MLFLOW_TESTS") == "long"
EXAMPLES = 300 if LONG else 60  # of hypothesis


def some(items: Sequence, count: int) -> list:
    """About `count` of the items, evenly spaced; all of them in a long run."""
    return list(items if LONG else items[:: max(len(items) // count, 1)])
