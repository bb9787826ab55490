"""Users' own scorers: functions that the command line names as `file.py:function`, called on each answer.

A function takes any of inputs, outputs, expectations and trace by name. These are the arguments of
`mlflow.genai.scorers.scorer`, and the function may have that decorator. The trace is None. The file is executed once,
in this process and with its rights. The person who starts the run names the file. A prompt set can't name a file.

Not covered: a time limit, a sandbox, and sessions of several turns. The hash does not include files that the file
imports.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from slm.base import user_files
from slm.base.errors import BadInput
from slm.base.wording import did_you_mean, quoted
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
    function, attribute, sha256 = user_files.function_of("scorers", spec)
    name, arguments = _checked(function, attribute, spec)
    return UserScorer(name, function, arguments, sha256)


def score(scorer: UserScorer, prompt: Prompt, output: str) -> dict[str, Score]:
    """The function's scores for one answer. If the function fails, the answer is unscored, with the reason."""
    given = feedback.arguments_of(prompt, output)
    try:
        value = scorer.function(**{name: given[name] for name in scorer.arguments})
    except (Exception, SystemExit) as error:  # a scorer that calls sys.exit() must not end the run
        return {scorer.name: Score(None, f"{scorer.name} failed: {type(error).__name__}: {quoted(str(error))}")}
    return feedback.scores_of(scorer.name, value)


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
