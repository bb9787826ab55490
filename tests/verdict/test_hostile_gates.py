"""Gates of any text: read, or refused in one line."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.refusals import any_file, checked, complaint, dumped, numbers, texts, write

from slm.base import parameters
from slm.base.errors import BadInput
from slm.verdict import gate

limits = st.one_of(numbers, texts, st.none(), st.booleans(), st.lists(numbers, max_size=2))
keywords = st.sampled_from([*gate.KEYWORDS, "maxdrop", "1", ""])
rules = st.dictionaries(keywords, limits, max_size=3) | limits
gates = st.dictionaries(texts, rules, max_size=3)


@pytest.mark.fault("gates: any text at all (hypothesis)")
@any_file
@given(text=st.one_of(st.text(max_size=200), gates.map(lambda content: dumped(content).decode())))
def test_any_text_is_a_gate_or_refused_in_one_line(text):
    try:
        thresholds = gate.read_thresholds(text, "gate.yaml")
    except BadInput as refusal:
        checked(str(refusal))
    else:
        verdict = gate.decide(thresholds, {"rows": 0.0}, {})
        assert verdict.state == "inconclusive"  # nothing was measured, so nothing passes


@pytest.mark.parametrize(
    ("content", "line"),
    [
        pytest.param(None, "thresholds: '{path}' does not exist", marks=pytest.mark.fault("gates: missing")),
        pytest.param("folder", "thresholds: '{path}' does not exist", marks=pytest.mark.fault("gates: a directory")),
        pytest.param(b"a: {min: \xff}", "is not UTF-8; save it as UTF-8", marks=pytest.mark.fault("gates: not UTF-8")),
        pytest.param(
            b"#" * 200_000,
            "gate.yaml: is longer than 100,000 characters",
            marks=pytest.mark.fault("gates: longer than a gate may be"),
        ),
        pytest.param(
            b"\xef\xbb\xbfa: {min: '0.8'}",
            "'a': `min` is '0.8', not a number; write 0.8",
            marks=pytest.mark.fault("gates: a byte order mark"),
        ),
    ],
    ids=["missing", "directory", "not UTF-8", "long", "byte order mark"],
)
def test_a_gate_that_cannot_be_read_is_one_line(tmp_path, content, line):
    from slm.evaluation import requests

    path = tmp_path / "gate.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        write(path, content)
    args = parameters.parse("evaluate", "", [f"--thresholds={path}"])
    assert line.format(path=path) in complaint(requests.read_gate, args)


@pytest.mark.fault("gates: 300 MB of it")
def test_a_huge_gate_is_not_read_into_memory(tmp_path):
    from slm.evaluation import requests

    path = tmp_path / "gate.yaml"
    with path.open("wb") as file:
        file.truncate(300_000_000)
    args = parameters.parse("evaluate", "", [f"--thresholds={path}"])
    tracemalloc.start()
    complaint(requests.read_gate, args)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
