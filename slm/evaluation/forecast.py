"""Says what an evaluation can find and how long it takes, before it generates; with `check=true` also what it would do.

By then all parameters, prompts, scorers, rules and models have been checked. What earlier runs on this tracking
server measured is the base of the two forecasts: the difference that can be found, and the likely time to generate.
The time to load the models and to compare them token by token is not forecast. With `check=true`, nothing is generated
and no run is opened.
"""

import math
import os
from collections import Counter

from slm.answers import endpoints, loading
from slm.base import console
from slm.base.parameters import Parameters
from slm.base.wording import counted, part_of
from slm.engines import answering
from slm.evaluation import requests, scoring
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
    checkpoint: str = "",
    skipped: str = "",
    before: str = "",
) -> None:
    """Prints one line per question.

    `named` has (label, resolved URI). A wrapper that is to be logged has no URI, and `checkpoint` is what it is made
    of. `baseline` is the place of the baseline. `skipped` says why nothing would be evaluated.
    `before` is the version that has the alias now, "" if none has it.
    """
    clusters = _clusters(prompt_set)
    scorers = Counter(call.name for prompt in prompt_set.prompts for call in prompt.scorers)
    told = [counted(prompt_set.count, "row")]
    told += [counted(clusters, "cluster")] if clusters < len(prompt_set.prompts) else []
    told += [f"{args.repeats} answers to each"] if args.repeats > 1 else []
    told += [f"{name} {number}" for name, number in sorted(scorers.items())]
    _line("prompts", f"{prompt_set.name}: {', '.join(told)}")
    if prompt_set.texts:
        _line("texts", f"{prompt_set.texts.name}: {counted(len(prompt_set.texts.documents), 'text')}")
    if args.judge:
        _line("judge", args.judge)
    if prompt_set.system:
        _line("system", prompt_set.system.source)
    for place, (label, uri) in enumerate(named):
        shown = f"{label} of {checkpoint}" if not uri else label if label == uri else f"{label}, which is {uri}"
        _line("baseline" if place == baseline else "model", shown)
    rules = [f"{one.metric} {keyword} {limit:g}" for one in thresholds for keyword, limit in one.rules.items()]
    _line("gate", "; ".join(rules) or "none")
    if args.alias:
        _line("alias", f"{args.alias} is {f'version {before}' if before else 'not set'}")
    if skipped:
        _line("skipped", skipped)
    else:
        earlier = earlier_runs.newest(prompt_set.sha256)
        _line("can find", _finds(args, prompt_set, earlier, baseline is not None))
        _line("takes", _takes(args, prompt_set, thresholds, named, earlier, checkpoint))
    console.out.print("check: nothing was generated", markup=False)
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        run_records.name_run(run_id, f"checked: {', '.join(label for label, _ in named)} on {prompt_set.name}")


def tell(
    args: Parameters,
    prompt_set: PromptSet,
    thresholds: tuple[gate.Threshold, ...],
    named: list[tuple[str, str]],
    is_compared: bool,
) -> None:
    """Prints two lines before a run generates: what these prompts can find, and how long generating takes."""
    earlier = earlier_runs.newest(prompt_set.sha256)
    finds = _finds(args, prompt_set, earlier, is_compared)
    takes = _takes(args, prompt_set, thresholds, named, earlier)
    clusters, held = _clusters(prompt_set), len(prompt_set.prompts)
    among = f" in {counted(clusters, 'cluster')}" if clusters < held == prompt_set.count else ""
    console.out.print(f"{counted(prompt_set.count, 'prompt')}{among} can find {finds}", markup=False)
    console.out.print(f"The time to generate is {takes}", markup=False)


def _finds(args: Parameters, prompt_set: PromptSet, earlier: earlier_runs.Earlier, is_compared: bool) -> str:
    """What the prompts can find, as the end of a sentence."""
    before = earlier.detectable if is_compared else None
    if prompt_set.scorer_names == frozenset() and not args.tasks:
        finds = "no difference in scores, because no row has a scorer"
        return finds + ("; fidelity compares the models" if is_compared and args.fidelity != "off" else "")
    if before is None and len(prompt_set.prompts) < prompt_set.count:
        return "a difference of unknown size: the clusters are not counted before Spark's workers score"
    if is_compared:
        return _detectable(_clusters(prompt_set), before)
    return f"the score to ±{_half_width(_clusters(prompt_set)):.2f} or better; a difference needs a baseline"


def _clusters(prompt_set: PromptSet) -> int:
    return len({prompt.cluster or f"row {prompt.id}" for prompt in prompt_set.prompts})


def _detectable(clusters: int, before: float | None) -> str:
    """The difference of the overall score that is found with 80 % power at a two-sided 5 % level."""
    base = "as in the last run on these prompts"
    found = before
    if found is None:
        found = min((Z_95 + Z_80) * math.sqrt(DIFFERING / clusters), 1.0)
        base = "if one answer in five differs"
    return f"a difference of {found:.2f} ({100 * found:.0f} points) or more in the score at 80 % power, {base}"


def _half_width(clusters: int) -> float:
    """Half of the widest 95 % interval that a mean of scores from 0 to 1 has: where half of them are 1."""
    return min(Z_95 * math.sqrt(0.25 / clusters), 0.5)


def _takes(
    args: Parameters,
    prompt_set: PromptSet,
    thresholds: tuple[gate.Threshold, ...],
    named: list[tuple[str, str]],
    earlier: earlier_runs.Earlier,
    checkpoint: str = "",
) -> str:
    """The likely time to generate, as the end of a sentence: answers that are left times their earlier seconds.

    Answers of a wrapper that is not logged yet, of a model of others and on Spark may be reused too. They are not
    counted, so the time is then an upper bound.
    """
    if args.tasks:
        return "unknown: a task has its own lengths of answers"
    rows, generation = prompt_set.count * args.repeats, requests.generation(args)
    seconds, reused, at_most = 0.0, 0, ""
    for label, uri in named:
        facts = loading.facts_before_loading(label, uri) if uri else None
        kept = 0
        if scoring.reuse(args.resume, thresholds) == "all" and not endpoints.is_endpoint(uri):
            if facts and args.engine == "local":
                kept = answering.count_kept(facts, prompt_set.prompts, generation, args.repeats)
            else:
                at_most = "at most "
        reused += kept
        if kept < rows:
            pace = earlier.pace(uri, facts.name if facts else f"{checkpoint}, {label}")
            if pace is None:
                return "unknown: no earlier run of this experiment has measured a speed"
            seconds += (rows - kept) * pace.seconds(args.max_tokens)
    total = rows * len(named)
    taken = f"{part_of(reused, total, 'answer')} reused"
    if reused == total:
        return f"0 s: {taken}"
    return f"{at_most}about {console.duration(seconds)}, as in earlier runs" + (f"; {taken}" if reused else "")


def _line(name: str, text: str) -> None:
    console.out.print(f"{name:9} {text}", markup=False)
