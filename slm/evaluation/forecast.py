"""Says what an evaluation would do, find and take, with `check=true`. It generates nothing and opens no run.

By then all parameters, prompts, scorers, rules and models have been checked. What an earlier run on this tracking
server measured is the base of the two forecasts: the difference that can be found, and the time.
"""

import math
import os
from collections import Counter

from slm.base import console
from slm.base.parameters import Parameters
from slm.base.wording import counted
from slm.evaluation import promotion
from slm.prompts.prompt_sets import PromptSet
from slm.tracking import earlier_runs, run_records
from slm.verdict import gate
from slm.verdict.statistics import Z_80, Z_95

DIFFERING = 0.2  # of the answers of two models, until a run has shown how many


def show(
    args: Parameters,
    prompt_set: PromptSet,
    thresholds: tuple[gate.Threshold, ...],
    named: list[tuple[str, str]],
    baseline: int | None,
) -> None:
    """Prints one line per question. `named` has (label, resolved URI); `baseline` is the place of the baseline."""
    rows = prompt_set.count
    clusters = len({prompt.cluster or f"row {prompt.id}" for prompt in prompt_set.prompts})
    scorers = Counter(call.name for prompt in prompt_set.prompts for call in prompt.scorers)
    told = [counted(rows, "row")] + ([counted(clusters, "cluster")] if clusters < len(prompt_set.prompts) else [])
    told += [f"{name} {number}" for name, number in sorted(scorers.items())]
    _line("prompts", f"{prompt_set.name}: {', '.join(told)}")
    for place, (label, uri) in enumerate(named):
        shown = label if label == uri or not uri else f"{label}, which is {uri}"
        _line("baseline" if place == baseline else "model", shown)
    rules = [f"{one.metric} {keyword} {limit:g}" for one in thresholds for keyword, limit in one.rules.items()]
    _line("gate", "; ".join(rules) or "none")
    if args.alias:
        now = promotion.alias_version(named[0][1], args.alias)
        _line("alias", f"{args.alias} is {f'version {now}' if now else 'not set'}")
    earlier = earlier_runs.newest(prompt_set.sha256)
    if baseline is not None:
        _line("can find", _detectable(clusters, earlier.get("difference/score/detectable")))
    if args.tasks:
        _line("takes", "unknown: a task has its own lengths of answers")
    else:
        tokens = rows * args.repeats * args.max_tokens * len(named)
        _line("takes", _takes(tokens, earlier.get("output_tokens_per_second")))
    console.out.print("check: nothing was generated", markup=False)
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        run_records.name_run(run_id, f"checked: {', '.join(label for label, _ in named)} on {prompt_set.name}")


def _detectable(clusters: int, before: float | None) -> str:
    """The difference of the overall score that is found with 80 % power at a two-sided 5 % level."""
    if before is not None:
        return f"a difference of {before:.2f} or more in the score, as in the last run on these prompts"
    found = min((Z_95 + Z_80) * math.sqrt(DIFFERING / clusters), 1.0)
    return f"a difference of {found:.2f} or more in the score, if one answer in five differs"


def _takes(tokens: int, speed: float | None) -> str:
    if not speed:
        return "unknown: no run on these prompts has measured the speed here"
    return f"at most about {console.duration(tokens / speed)}, at {speed:.0f} tokens/s as in the last run"


def _line(name: str, text: str) -> None:
    console.out.print(f"{name:9} {text}", markup=False)
