"""One line that refuses what the user gave."""

import json

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support.effort import EXAMPLES

from slm.base.errors import BadInput

ROW = {"id": "a", "prompt": "2+2?"}
LINE = 700  # characters that a mistake's one line may have

any_file = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def complaint(read, *given) -> str:
    """The one line that refuses what was given."""
    with pytest.raises(BadInput) as caught:
        read(*given)
    return checked(str(caught.value))


def checked(line: str) -> str:
    assert len(line.splitlines()) == 1 and len(line) < LINE
    line.encode()  # it can be printed, and logged
    return line


texts = st.text(max_size=20) | st.sampled_from(["user", "a\0", "\ud800", "=1+1", "prompt", "\u2028", "1e999"])
numbers = st.integers() | st.floats() | st.sampled_from([10**400, float("nan")])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def dumped(row) -> bytes:
    try:
        return json.dumps(row).encode()
    except ValueError:  # CPython writes no integer of more than 4,300 digits
        return b"9" * 5000


def write(path, content: bytes):
    path.write_bytes(content)
    return path
