"""Faults in what the user gives: prompt sets, gates, parameters. One line each, exit 2, before a model is loaded.

What test_prompts.py, test_gate.py and test_parameters.py hold about single mistakes is marked there; here is what takes
a file's size, arbitrary input or the command line.
"""

import gzip
import json
import subprocess
import sys
import zlib

import pytest
from conftest import REPOSITORY, entry_point
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slm.base import parameters
from slm.base.errors import BadInput
from slm.prompts import prompt_rows, prompt_sets, readers
from slm.scorers.confined import CHECKS
from slm.verdict import gate

ROW = {"id": "a", "prompt": "2+2?"}
LINE = 700  # characters that a mistake's one line may have

any_file = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def complaint(read, *given) -> str:
    """The one line that refuses what was given."""
    with pytest.raises(BadInput) as caught:
        read(*given)
    return checked(str(caught.value))


def checked(line: str) -> str:
    assert len(line.splitlines()) == 1 and len(line) < LINE
    line.encode()  # it can be printed, and logged
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Prompt sets

texts = st.text(max_size=20) | st.sampled_from(["user", "a\0", "\ud800", "=1+1", "prompt", "\u2028", "1e999"])
numbers = st.integers() | st.floats() | st.sampled_from([10**400, float("nan")])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*prompt_rows.FIELDS, "inputs", "expectations", "x"])
rows = st.dictionaries(fields, values, max_size=5)
almost_rows = st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": texts}), max_size=2) | values},
    optional={"expected": values, "scorers": values, "tags": values, "id": texts, "cluster": values},
)


def dumped(row) -> bytes:
    try:
        return json.dumps(row).encode()
    except ValueError:  # CPython writes no integer of more than 4,300 digits
        return b"9" * 5000


file_contents = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.one_of(rows, almost_rows, values).map(dumped), max_size=4).map(b"\n".join),
    st.lists(st.sampled_from([*"[]{}-:,&*!|>'\"#%@`?\n \t", "a", "<<", "!!int", "id", "prompt"])).map(
        lambda words: "".join(words).encode()
    ),
)


def test_a_mapping_of_long_mappings_is_shown_shortened(tmp_path):
    rows = {f"key-{place}": {f"{inner}" * 50: "x" * 500 for inner in range(9)} for place in range(9)}
    said = checked(
        complaint(prompt_sets.read_prompt_set, write(tmp_path / "set.yaml", json.dumps(rows).encode()), "x", CHECKS)
    )
    assert said.endswith("; write a list of rows, each starting with '- '")


@pytest.mark.fault("prompt sets: any bytes at all, as JSONL, CSV or YAML (hypothesis)")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".yaml"])
@any_file
@given(content=file_contents)
def test_any_file_is_a_prompt_set_or_refused_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"set{suffix}"
    path.write_bytes(content)
    try:
        prompt_set = prompt_sets.read_prompt_set(path, "x", CHECKS)
    except BadInput as refusal:
        checked(str(refusal))
    else:
        again = tmp_path / "again.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in prompt_rows.canonical_rows(prompt_set.prompts)]
        again.write_text("".join(lines), encoding="utf-8")
        assert prompt_sets.read_prompt_set(again, "x", CHECKS).sha256 == prompt_set.sha256


def write(path, content: bytes):
    path.write_bytes(content)
    return path


COMPRESSED = gzip.compress((json.dumps(ROW) + "\n").encode() * 1000)


@pytest.mark.fault("prompt sets: gzip, whole and truncated")
@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("set.jsonl", COMPRESSED, "set.jsonl: is compressed with gzip; unpack it first"),
        ("set.csv", COMPRESSED[:40], "set.csv: is compressed with gzip; unpack it first"),
        ("set.jsonl.gz", COMPRESSED[:40], "set.jsonl.gz: a prompt set is a .jsonl, .csv, .yaml, .yml file; rename"),
    ],
)
def test_a_compressed_set_is_refused_and_never_unpacked(tmp_path, name, content, line):
    with pytest.raises((EOFError, zlib.error)):
        gzip.decompress(COMPRESSED[:40])
    assert complaint(prompt_sets.read_prompt_set, write(tmp_path / name, content), "x", CHECKS).startswith(line)


def repeated(text: str) -> str:
    return text * ((readers.FILE_BYTES - 100) // len(text))


HOSTILE = {
    "prompt sets: a row of 10 MB": (".jsonl", lambda: json.dumps({"prompt": "x" * 10_000_000}), "line 1: is 9.5 MiB"),
    "prompt sets: 64 MiB of brackets in one row": (".jsonl", lambda: "[" + repeated("[],") + "[]]", "line 1: is"),
    "prompt sets: a CSV header of 64 MiB": (".csv", lambda: repeated("id,prompt,"), "line 1: unknown column"),
    "prompt sets: a CSV row of millions of cells": (".csv", lambda: "id,prompt\n" + repeated(","), "line 2: has"),
    "prompt sets: 64 MiB of empty lines": (".jsonl", lambda: repeated("\n"), ": no rows"),
    "prompt sets: 64 MiB of YAML": (".yaml", lambda: repeated("- [a, b]\n"), ": is larger than 4 MiB; write it as"),
    "prompt sets: a million rows": (
        ".jsonl",
        lambda: "".join(f'{{"prompt": "{number}"}}\n' for number in range(1_000_000)),
        ": has more than 100,000 rows; split it, or draw a sample",
    ),
}
READ = """
import resource, sys
from pathlib import Path
from slm.base.errors import BadInput
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.confined import CHECKS
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
try: read_prompt_set(Path(sys.argv[1]), "x", CHECKS)
except BadInput as refusal: print(refusal)
"""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(name)) for name in HOSTILE])
def test_a_hostile_size_is_refused_within_two_gigabytes(tmp_path, name):
    suffix, content, line = HOSTILE[name]
    path = write(tmp_path / f"set{suffix}", content().encode())
    command = [sys.executable, "-c", READ, str(path), str(2 * 2**30)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert line in checked(done.stdout.strip("\n"))


@pytest.mark.fault("prompt sets: YAML bombs and tags")
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("- &a [x]\n- &b [*a, *a]\n- &c [*b, *b]\n", "not YAML: line 2: the alias *a is not accepted"),
        ("- &a {prompt: x}\n- <<: *a\n", "not YAML: line 2: the alias *a is not accepted"),
        ("- !!python/object/apply:os.system ['true']\n", "not YAML: line 1: could not determine a constructor"),
        ("- !!python/name:os.system\n", "not YAML: line 1: could not determine a constructor"),
        ("- !!binary " + "A" * 10_000 + "\n", "row 1: is b'"),
        ("- {prompt: " + "1:" * 5000 + "1}\n", "row 1: `prompt` is"),
    ],
)
def test_a_yaml_bomb_or_tag_is_refused(tmp_path, content, line):
    said = complaint(prompt_sets.read_prompt_set, write(tmp_path / "set.yaml", content.encode()), "x", CHECKS)
    assert said.startswith("set.yaml") and line in said


# ---------------------------------------------------------------------------------------------------------------------
# Gates

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
            b"#" * 300_000_000, "is longer than 100,000 characters", marks=pytest.mark.fault("gates: 300 MB of it")
        ),
        pytest.param(
            b"\xef\xbb\xbfa: {min: '0.8'}",
            "'a': `min` is '0.8', not a number; write 0.8",
            marks=pytest.mark.fault("gates: a byte order mark"),
        ),
    ],
    ids=["missing", "directory", "not UTF-8", "huge", "byte order mark"],
)
def test_a_gate_that_cannot_be_read_is_one_line(tmp_path, content, line):
    from slm.evaluation import requests

    path = tmp_path / "gate.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        write(path, content)
    args = parameters.parse("evaluate", "", [f"--thresholds={path}"])
    assert line.format(path=path)[:50] in complaint(requests.read_gate, args)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters

HOSTILE_VALUES = {
    "negative": "-7",
    "zero": "0",
    "huge": "9" * 400,
    "very long": "x" * 100_000,
    "NaN": "nan",
    "infinity": "-inf",
    "empty": "",
    "text": "many words",
    "a line break": "a\nerror: b",
    "a terminal's escape": "\x1b[2J",
    "bytes that are no text": "\udcff\udcfe",
    "a path with ..": "../../../etc/passwd",
    "somebody's home": "~nobody-there/x",
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.fault(f"parameters: {what}, each one")) for what in HOSTILE_VALUES]
)
@pytest.mark.parametrize("parameter", parameters.PARAMETERS, ids=lambda parameter: parameter.name)
def test_a_hostile_value_is_taken_as_what_it_says_or_refused_by_name(parameter, what):
    given = HOSTILE_VALUES[what]
    try:
        args = parameters.parse(parameter.entry_points[-1], "", [f"--{parameter.name}={given}"])
        taken = getattr(args, parameter.name)
        if parameter.name == "stop":
            assert parameters.stop_strings(taken) == ([given] if given else [])
    except BadInput as refusal:
        assert checked(str(refusal)).startswith(f"{parameter.name}: ")
    else:
        assert what not in ("very long", "bytes that are no text")
        assert str(taken) == given or (type(taken), what) == (float, "zero")
        if not isinstance(parameter.default, str):
            assert parameter.low <= taken <= parameter.high


@pytest.mark.fault("parameters: unknown names")
@any_file
@given(words=st.lists(st.text(st.characters(exclude_characters="\0"), max_size=30), min_size=1, max_size=3))
def test_any_command_line_is_understood_or_refused_in_one_line(words):
    try:
        parameters.parse("evaluate", "", [word for word in words if word not in ("-h", "--help")])
    except BadInput as refusal:
        checked(str(refusal))


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--prompts=" + "x" * 3000, "error: prompts: 'xxx"),
        ("--prompts=~nobody-there/x.jsonl", "error: prompts: '~nobody-there/x.jsonl' does not exist"),
        ("--model=/dev/null", "error: model: /dev/null is a file, but not a .gguf"),
        ("--registered_model_name=a/b", "error: registered_model_name: 'a/b' can't be one; leave out"),
        ("--alias=latest", "error: alias: 'latest' can't be one; write letters"),
        ("--device=abacus", "error: device: 'abacus' can't be one; write auto, cpu, cuda or cuda:0"),
    ],
)
@pytest.mark.fault("parameters: on the command line, exit 2 and no run")
def test_on_the_command_line_it_is_one_line_exit_2_and_no_run(tmp_path, option, line):
    done = entry_point("evaluate", option, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(line) and done.err.count("\n") == 1
    assert not (tmp_path / "mlflow.db").exists()
