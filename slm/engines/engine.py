"""The interface of an engine, and the only place that chooses an engine.

To add an engine, write a module with the functions of Engine, and name the module in parameters.ENGINES.
"""

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from slm.answers.kept_answers import Reuse
from slm.base.parameters import ENGINES, Parameters
from slm.engines.distributions import Reference
from slm.prompts.prompt_sets import PromptSet
from slm.scorers.scorer_calls import Asked
from slm.verdict.scored_model import ScoredModel
from slm.verdict.statistics import Difference

TASKS = "slm.engines.tasks.engine"  # answers lm-evaluation-harness's tasks in this process


@dataclass(frozen=True)
class Request:
    """One model to score, with everything that the scoring depends on, except the prompt set."""

    label: str
    uri: str  # resolved: no alias
    run_id: str  # of the model's child run, which is active
    generation: dict
    repeats: int
    cut: str  # how an answer counts that was cut at max_tokens
    scorers: Asked
    record: dict  # reproduction.asked of these
    reuse: Reuse  # which kept answers may be used
    resume: bool  # whether kept judgements may be used
    row_timeout: float
    trust_code: bool
    reference: Reference | None = None  # the baseline's distributions; None: nothing is compared token by token
    is_baseline: bool = False


class Engine(Protocol):
    """Where prompts are answered. A module with these functions is an engine."""

    def check(self, args: Parameters) -> None:
        """Refuses parameters that the engine does not support, with BadInput, before anything is read."""

    def read_prompts(self, args: Parameters) -> PromptSet:
        """The prompt set that `args.prompts` (or `args.tasks`) names, with the scorers of `args.scorers` in every row.

        Raises BadInput for a wrong row, scorer or judge; Unavailable where a judge or a cluster does not answer.
        """

    def score(self, request: Request, prompt_set: PromptSet) -> ScoredModel:
        """Loads the model, answers every prompt and scores the answers. The result holds no model memory."""

    def differences(
        self, candidate: ScoredModel, baseline: ScoredModel, prompt_set: PromptSet
    ) -> dict[str, Difference]:
        """Candidate minus baseline by scorer, over the prompts that both answered."""

    def release(self, prompt_set: PromptSet) -> None:
        """Frees the memory that the prompt set holds outside this process."""


def chosen(args: Parameters) -> Engine:
    """The engine that `engine` names, or the one that answers `tasks`. An engine's functions import its libraries."""
    return cast(Engine, importlib.import_module(TASKS if args.tasks else ENGINES[args.engine]))
