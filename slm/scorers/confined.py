"""Runs the built-in scorers, and checks their options, in a child process with bounds.

A stranger may have written a prompt set with its patterns and schemas. So each call may use at most SECONDS of
processor time and ROOM bytes of memory. The child process is Confined of slm/models/chat_parts/confined.py.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

from slm.base.wording import did_you_mean, quoted
from slm.scorers import built_in
from slm.scorers.built_in import BUILT_IN, Score

SECONDS = 5  # of processor time for one score, or for the check of one option
ROOM = 2**30  # bytes of memory for the child process
OPTION_KINDS = {
    bool: "true or false",
    bool | None: "true or false",
    str: "text",
    str | None: "text",
    int | float: "a number",
    dict | None: "a mapping",
}


def score(call_name: str, output: str, expected: tuple[str, ...], options: dict) -> Score:
    """Runs the built-in scorer `call_name` within SECONDS and ROOM.

    If the scorer fails or exceeds a bound, the answer is unscored, with the reason.
    """
    from slm.models.chat_model import CallFailed

    try:
        return Score(*_confined().call(call_name, output, expected, options))
    except CallFailed as reason:
        return Score(None, f"{call_name} {reason}")


def score_without_bounds(call_name: str, output: str, expected: tuple[str, ...], options: dict) -> Score:
    """The part of `score` that runs in the child process."""
    try:
        return BUILT_IN[call_name](output, expected, **options)
    except MemoryError:
        raise
    except Exception as error:
        return Score(None, f"{call_name} failed: {type(error).__name__}: {quoted(str(error))}")


def call_error(name: str, expected: tuple[str, ...], options: dict) -> str | None:
    """The fault in this call of the built-in scorer `name`, or None. Prompt readers check it before any model runs."""
    parameters = dict(list(inspect.signature(BUILT_IN[name]).parameters.items())[2:])
    for option, value in options.items():
        if option not in parameters:
            has = f"it has {', '.join(parameters)}" if parameters else "it has none"
            return f"scorer {name} has no option {quoted(option)}{did_you_mean(option, parameters)}; {has}"
        kind = parameters[option].annotation
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, bool | None)):
            return f"option {option} of scorer {name} is {quoted(value)}; {OPTION_KINDS[kind]} belongs there"
    if not expected and name != "json_schema" and options.get("pattern") is None:
        return f"scorer {name} needs `expected`"
    return _option_value_error(options) or _expected_error(name, expected, options.get("choices", "ABCD"))


CHECKS = {name: functools.partial(call_error, name) for name in BUILT_IN}  # has the type prompt_rows.KnownScorers


def _option_value_error(options: dict) -> str | None:
    for option in ("pattern", "schema"):
        if options.get(option) is not None and (error := _checked(option, json.dumps(options[option]))):
            return f"option {option} is {error}"
    if not 0 <= options.get("tolerance", 0) < float("inf"):
        return f"option tolerance is {options['tolerance']}; 0 or a positive number belongs there"
    if not re.fullmatch(r"[A-Z]+", options.get("choices", "ABCD")):
        return f"option choices is {quoted(options['choices'])}; capital letters such as ABCD belong there"
    return None


def _expected_error(name: str, expected: tuple[str, ...], choices: str) -> str | None:
    """The fault if the scorer can read no expected text, so that it could score no answer."""
    remedies = {
        "choice": f"write one letter of {choices}",
        "number": "write a number such as 42 or 3/4",
        "math": r"write mathematics such as \frac{1}{2} or x^2-1",
    }
    if name not in remedies or (name == "math" and built_in.unreadable("number", expected) is None):
        return None
    # The libraries of math take a second to import. The child process needs them in any case.
    text = _unreadable_mathematics(expected) if name == "math" else built_in.unreadable(name, expected, choices)
    if text is None:
        return None
    remedy = "use expected_pattern to keep the part after ####" if "####" in text else remedies[name]
    return f"`expected` is {quoted(text)}, which scorer {name} can't read; {remedy}"


@functools.lru_cache(maxsize=10_000)
def _unreadable_mathematics(expected: tuple[str, ...]) -> str | None:
    from slm.models.chat_model import CallFailed

    try:
        return _confined().call("expected", "math", expected)
    except CallFailed:
        return expected[0]


@functools.lru_cache(maxsize=64)  # many rows of a prompt set often share one pattern or schema
def _checked(option: str, content: str) -> str | None:
    from slm.models.chat_model import CallFailed

    value = json.loads(content)
    try:
        return _confined().call(option, value)
    except CallFailed as reason:
        return f"{quoted(value)}: its check {reason}; write a simpler {option}"


def _pattern_error(pattern: str) -> str | None:
    import regex

    try:
        regex.compile(pattern)
    except MemoryError:
        raise
    except Exception as error:
        return f"{quoted(pattern)}, which is not a regular expression: {error}"
    return None


def _schema_error(schema: dict) -> str | None:
    import jsonschema

    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except MemoryError:
        raise
    except Exception as error:
        return f"not a JSON schema: {quoted(getattr(error, 'message', str(error)))}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The child process


@functools.cache
def _confined():
    """The child process. The first call starts it."""
    from slm.models.chat_model import Confined

    package = str(Path(__file__).absolute().parents[2])
    program = (
        f"sys.path.insert(0, {package!r})\nfrom {__name__} import confined_functions\nFUNCTIONS = confined_functions()"
    )
    return Confined(program, SECONDS, ROOM)


def confined_functions() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The child's functions by name, each with arguments for a first call. The first call imports heavy libraries."""
    checks: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "pattern": (_pattern_error, ("1",)),
        "schema": (_schema_error, ({},)),
        "expected": (built_in.unreadable, ("math", ["1"])),
    }
    options: dict[str, Any] = {"json_schema": {"schema": {}}}
    return checks | {
        name: (functools.partial(_score_as_data, name), ("1", ["1"], options.get(name, {}))) for name in BUILT_IN
    }


def _score_as_data(name: str, output: str, expected: list[str], options: dict) -> tuple[float | None, str]:
    return astuple(score_without_bounds(name, output, tuple(expected), options))
