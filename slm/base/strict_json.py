"""Reads JSON, and refuses JSON that two readers could understand in different ways.

If a text gives a key twice, one reader may keep the first value, and another reader the last value. A check of the
first value then gives no protection against the last one. So a key that is given twice is refused. NaN and Infinity
are refused too, because they are not JSON.
"""

import json
from collections import Counter


def parse(text: str) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not strict JSON. The message says why in one line.
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


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r:.80} is given twice")
    return mapping
