"""Parameters of any value: taken as what they say, or refused by name in one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import in_process
from support.refusals import any_file, checked

from slm.base import parameters
from slm.base.errors import BadInput

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


@any_file
@given(words=st.lists(st.text(st.characters(exclude_characters="\0"), max_size=30), min_size=1, max_size=3))
def test_any_command_line_is_understood_or_refused_in_one_line(words):
    words = [word for word in words if word not in ("-h", "--help", "--")]
    known = {parameter.name for parameter in parameters.PARAMETERS}
    try:
        parameters.parse("evaluate", "", words)
    except BadInput as refusal:
        checked(str(refusal))
    else:
        assert {word.removeprefix("--").partition("=")[0] for word in words} <= known


@pytest.mark.parametrize("word", ["--promts=x", "--prompt=x", "--PROMPTS=x", "-prompts=x", "prompts=x", "x", "--x y"])
@pytest.mark.fault("parameters: unknown names")
def test_an_unknown_name_is_refused_by_name(word):
    with pytest.raises(BadInput, match="there is no such parameter"):
        parameters.parse("evaluate", "", [word])


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
    done = in_process("evaluate", option, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(line) and done.err.count("\n") == 1
    assert not (tmp_path / "mlflow.db").exists()
