"""Finds the scorers of each answer, and calls them. A row names scorers, and `scorers` adds scorers to every row.

Only this module separates built-in scorers, users' own scorers and judges. A row may name built-in scorers and
judges. Only the `scorers` parameter may name a user's file.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from slm.base import wording
from slm.base.errors import BadInput
from slm.prompts import prompt_sets
from slm.prompts.prompt_rows import Prompt, ScorerCall
from slm.prompts.prompt_sets import PromptSet
from slm.scorers import built_in, confined, judges
from slm.scorers import user_scorers as users
from slm.scorers.built_in import Score

# the scorers that a row may name. `add` checks a judge's options, because `add` knows whether there is a judge
IN_ROWS = confined.CHECKS | dict.fromkeys(judges.JUDGES, lambda expected, options: None)
METRICS = ("score", "difference", "latency_seconds")  # other names that have metrics of the form name/figure

ScoreAnswer = Callable[[ScorerCall, Prompt, str], dict[str, Score]]


@dataclass(frozen=True)
class Asked:
    """The scorers and the judge that `scorers` and `judge` name. All are checked, and no model is loaded."""

    added: tuple[ScorerCall, ...]  # to every row
    user_scorers: dict[str, users.UserScorer]
    judge: judges.JudgeModel | None

    @property
    def sha256(self) -> str:
        """One hash over users' files and the judge. Apart from the prompt set, the scores depend on these."""
        files = {name: scorer.sha256 for name, scorer in self.user_scorers.items()}
        return hashlib.sha256(json.dumps([files, self.judge and self.judge.identity]).encode()).hexdigest()


@functools.cache  # a run executes a user's file and resolves an alias once for all its models
def read(scorers_parameter: str = "", judge_parameter: str = "") -> Asked:
    """Reads the two parameters, and checks all that they name.

    Raises:
        BadInput: a name, file, function or model in them is wrong.
        Unavailable: the judge doesn't answer.
    """
    judge = judges.find(judge_parameter) if judge_parameter else None
    added: list[ScorerCall] = []
    own: dict[str, users.UserScorer] = {}
    for item in filter(None, (item.strip() for item in scorers_parameter.split(","))):
        name = item
        if users.is_spec(item):
            scorer = users.read(item)
            name, own[scorer.name] = scorer.name, scorer
            if name in (*IN_ROWS, *METRICS):
                raise BadInput(f"scorers: {item} is called {name!r}, which is taken; rename the function")
        elif item not in IN_ROWS:
            hint = wording.did_you_mean(item, IN_ROWS)
            raise BadInput(f"scorers: {item!r} is no built-in scorer, judge or file.py:function{hint}")
        if name in [call.name for call in added]:
            raise BadInput(f"scorers: {name!r} is named twice; remove one")
        added.append(ScorerCall(name, {}))
    if judge:
        judges.check_reachable(judge)
    return Asked(tuple(added), own, judge)


def add(asked: Asked, prompt_set: PromptSet) -> PromptSet:
    """The prompt set with the added scorers in every row. A row's own call of an added scorer stays unchanged.

    If an added scorer can score some rows, the other rows are unscored.

    Raises:
        BadInput: a row calls a judge wrongly, or without a judge model; or an added scorer can score no row.
    """
    for prompt in prompt_set.prompts:
        for call in prompt.scorers:
            problem = None if call.name in built_in.BUILT_IN else _problem(asked, call, prompt)  # checked by read_row
            if problem:
                raise BadInput(f"prompts: row {prompt.id}: {problem}")
    for call in asked.added:
        problems = [_problem(asked, call, prompt) for prompt in prompt_set.prompts]
        if all(problems):
            raise BadInput(f"scorers: {call.name} can score no row of {prompt_set.name}: {problems[0]}")
    return prompt_sets.with_scorers(prompt_set, asked.added)


@contextmanager
def opened(asked: Asked, resume: bool = True) -> Iterator[ScoreAnswer]:
    """The function that scores one answer with one call of its row. It returns scores by name, one or several.

    If a scorer fails, the answer is unscored. A logged judge is loaded when a row first needs it, and is freed at the
    end. So measure the memory of other models before. With `resume`, judgements come from the cache.
    """
    with ExitStack() as stack:
        judge = stack.enter_context(judges.opened(asked.judge, resume)) if asked.judge else None

        def score_answer(call: ScorerCall, prompt: Prompt, output: str) -> dict[str, Score]:
            if call.name in built_in.BUILT_IN:
                return {call.name: confined.score(call.name, output, prompt.expected, call.options)}
            if call.name in asked.user_scorers:
                return users.score(asked.user_scorers[call.name], prompt, output)
            assert judge is not None  # without a judge, no row can ask for one
            return {call.name: judge.score(call, prompt, output)}

        yield score_answer


def _problem(asked: Asked, call: ScorerCall, prompt: Prompt) -> str | None:
    if call.name in built_in.BUILT_IN:
        return confined.call_error(call.name, prompt.expected, call.options)
    if call.name in asked.user_scorers:
        return None
    if asked.judge is None:
        return f"scorer {call.name} needs a judge; give evaluate one, as judge=openai:/gpt-4o-mini"
    return judges.call_error(call.name, prompt.expected, call.options)
