"""Users' own scorers: functions that the command line names as `file.py:function`, called on each answer.

A function takes any of inputs, outputs, expectations and trace by name. These are the arguments of
`mlflow.genai.scorers.scorer`, and the function may have that decorator. The trace is None. The file is executed once,
in this process and with its rights. The person who starts the run names the file. A prompt set can't name a file.

Not covered: a time limit, a sandbox, and sessions of several turns. The hash does not include files that the file
imports.
"""

import functools
import hashlib
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slm.base.errors import BadInput
from slm.base.wording import did_you_mean, quoted
from slm.models import checkpoints
from slm.prompts.prompt_rows import Prompt
from slm.scorers import feedback
from slm.scorers.built_in import Score

ARGUMENTS = ("inputs", "outputs", "expectations", "trace")


@dataclass(frozen=True)
class UserScorer:
    name: str
    function: Callable
    arguments: tuple[str, ...]  # the names of ARGUMENTS that the function takes
    sha256: str  # of the file


def is_spec(item: str) -> bool:
    """Whether one item of `scorers` names a file. Any other item names a scorer."""
    return ":" in item or item.endswith(".py")


def read(spec: str) -> UserScorer:
    """Executes the file of `file.py:function`, and returns the function.

    Raises:
        BadInput: there is no such file or function, the file fails, or the function takes other arguments.
    """
    given, _, attribute = spec.rpartition(":")
    if not given or not attribute:
        raise BadInput(f"scorers: {spec!r} names no function; write {spec.strip(':')}:function")
    path = checkpoints.located(given)
    if path is None or not path.is_file():
        raise BadInput(f"scorers: {given!r} does not exist, from the repository's root or from here")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise BadInput(f"scorers: {given} can't be read: {error.strerror or error}") from None
    module = _module(path.resolve(), source)
    if attribute not in vars(module):
        public = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        raise BadInput(f"scorers: {given} has no {attribute!r}{did_you_mean(attribute, public)}")
    function = vars(module)[attribute]
    name, arguments = _checked(function, attribute, spec)
    return UserScorer(name, function, arguments, hashlib.sha256(source).hexdigest())


def score(scorer: UserScorer, prompt: Prompt, output: str) -> dict[str, Score]:
    """The function's scores for one answer. If the function fails, the answer is unscored, with the reason."""
    given = feedback.arguments_of(prompt, output)
    try:
        value = scorer.function(**{name: given[name] for name in scorer.arguments})
    except (Exception, SystemExit) as error:  # a scorer that calls sys.exit() must not end the run
        return {scorer.name: Score(None, f"{scorer.name} failed: {type(error).__name__}: {quoted(str(error))}")}
    return feedback.scores_of(scorer.name, value)


@functools.cache  # all functions of a file and all scored models share one execution
def _module(path: Path, source: bytes) -> types.ModuleType:
    module = types.ModuleType(f"user_scorers_{hashlib.sha256(bytes(path) + source).hexdigest()[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # a dataclass looks up its own module there
    sys.path.insert(0, str(path.parent))  # the file can import files of its folder, as a script can
    try:
        exec(compile(source, path, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        place = f"{path.name} line {lines[-1]}" if any(lines) else path.name
        text = feedback.one_line(error.msg if isinstance(error, SyntaxError) else error)
        raise BadInput(f"scorers: {place}: {type(error).__name__}: {text}") from None
    finally:
        sys.path.remove(str(path.parent))
    return module


def _checked(function: object, attribute: str, spec: str) -> tuple[str, tuple[str, ...]]:
    """The scorer's name, and the names of the arguments that it gets.

    Raises:
        BadInput: the object is no function that can be called with ARGUMENTS, or its name can't name a metric.
    """
    from mlflow.genai.scorers import Scorer

    if not callable(function) or isinstance(function, type):
        kind = "a class" if isinstance(function, type) else quoted(function)
        raise BadInput(f"scorers: {spec} is {kind}; name a function")
    name = function.name if isinstance(function, Scorer) else attribute
    if not feedback.METRIC_NAME.fullmatch(name):
        raise BadInput(f"scorers: {spec} is called {quoted(name)}, which can't name a metric; use letters and digits")
    if inspect.iscoroutinefunction(function):
        raise BadInput(f"scorers: {spec} is an async function; write a plain one")
    try:
        parameters = inspect.signature(
            function.__call__ if isinstance(function, Scorer) else function
        ).parameters.values()
    except (TypeError, ValueError):  # some functions that are written in C have no signature
        raise BadInput(f"scorers: {spec} doesn't say which arguments it takes; wrap it in a function") from None
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for parameter in needed:
        if parameter not in by_name or parameter.name not in ARGUMENTS:
            hint = did_you_mean(parameter.name, ARGUMENTS) if parameter.name not in ARGUMENTS else ""
            problem = f"{spec} needs the argument {parameter.name!r}{hint}"
            raise BadInput(f"scorers: {problem}; a scorer is given {', '.join(ARGUMENTS)}, by name")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return name, ARGUMENTS
    return name, tuple(parameter.name for parameter in by_name if parameter.name in ARGUMENTS)
