"""JSON that every reader reads alike.

Two readers of one text may keep different ones of two equal keys: a check that reads the one, and a runtime that obeys
the other, don't protect anybody. So equal keys are refused, as are NaN and Infinity, which are no JSON.
"""

import json
from collections import Counter


def parse(text: str) -> object:
    """The value that a JSON text stands for.

    Raises:
        ValueError: in one line, what is wrong with it.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from None


def no_constant(name: str) -> None:
    """Refuses NaN, Infinity and -Infinity, for `parse_constant` of the json module."""
    raise ValueError(f"{name} is not a JSON value")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r:.80} is given twice")
    return mapping
