"""Makes the arguments of an MLflow scorer, and turns its result into this project's scores.

A scorer may return a bool, a number, "yes" or "no", an `mlflow.entities.Feedback`, or a list of Feedbacks. Each value
becomes a score in [0, 1]. A value that can't be a score is unscored, with the reason. This module calls no scorer.
"""

import numbers
import re

from slm.base.wording import quoted
from slm.prompts.prompt_rows import Prompt, conversation
from slm.scorers.built_in import Score

METRIC_NAME = re.compile(r"[\w.\- ]{1,100}", re.ASCII)  # MLflow's characters without the slash
REASON_CHARACTERS = 500


def arguments_of(prompt: Prompt, output: str) -> dict:
    """The keyword arguments of an MLflow scorer, for one answer. The trace is None."""
    expected = {"expected_response": prompt.expected[0], "expected": list(prompt.expected)} if prompt.expected else {}
    return {
        "inputs": {"messages": conversation(prompt)},
        "outputs": output,
        "expectations": expected,
        "trace": None,
    }


def scores_of(name: str, value: object) -> dict[str, Score]:
    """Turns the result of the scorer `name` into scores by name. A Feedback `f` of a list becomes `name/f`."""
    from mlflow.entities import Feedback
    from mlflow.entities.assessment import DEFAULT_FEEDBACK_NAME

    if not isinstance(value, list | tuple):
        return {name: _score(name, value)}
    if not value or not all(isinstance(item, Feedback) for item in value):
        return {name: Score(None, f"{name} gave {quoted(value)}; a list must hold Feedbacks, at least one")}
    scores = {}
    for item in value:
        own = name if item.name == DEFAULT_FEEDBACK_NAME else f"{name}/{item.name}"
        if own in scores:
            return {name: Score(None, f"{name} gave two Feedbacks named {quoted(item.name)}")}
        if not METRIC_NAME.fullmatch(item.name):
            return {name: Score(None, f"{name} gave a Feedback named {quoted(item.name)}, which can't name a metric")}
        scores[own] = _score(own, item)
    return scores


def one_line(text: object) -> str:
    """Cuts a text for a reason. Removes line breaks, and halves of characters, which no file can hold."""
    return " ".join(str(text).split())[:REASON_CHARACTERS].encode(errors="replace").decode()


def _score(name: str, value: object) -> Score:
    from mlflow.entities import Feedback

    if not isinstance(value, Feedback):
        return _plain_score(name, value)
    if value.error is not None:
        return Score(None, f"{name} failed: {one_line(value.error.error_message or value.error.error_code)}")
    score, rationale = _plain_score(name, value.value), one_line(value.rationale or "")
    if score.value is None and value.value is not None and rationale:
        return Score(None, f"{score.reason}: {rationale}")
    return Score(score.value, rationale or score.reason)


def _plain_score(name: str, value: object) -> Score:
    import numpy as np

    value = value.item() if isinstance(value, np.generic) else value
    if value is None:
        return Score(None, f"{name} gave no value")
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("yes", "no"):
            return Score(float(word == "yes"), f"{name} gave {word}")
        return Score(None, f"{name} gave {quoted(str(value))}, which is neither yes nor no")
    if isinstance(value, numbers.Real) and 0 <= float(value) <= 1:  # NaN is not
        return Score(float(value), f"{name} gave {quoted(value)}")
    return Score(None, f"{name} gave {quoted(value)}, which is not a number from 0 to 1")
