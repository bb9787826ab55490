"""Evaluation on a schedule: one at a time, a slot once, and nothing where nothing has changed.

A scheduler names the time it starts an evaluation for in `slot`. Such a start

- is skipped while another one for the same models and alias runs: on this host a file lock tells, elsewhere the tags
  of a RUNNING run;
- takes over the verdict that its slot has already come to, and that of an earlier run with the same inputs: models,
  baseline, prompts, parameters, thresholds, scorers, code and environment. `force` evaluates nevertheless.

A verdict is known by the tag `slot.verdict`, which is set when all is done, promotion included: a run that `mlflow run`
ends as FAILED since its model regressed has one, a run that broke off has none, and its slot is evaluated again.

Not covered: an endpoint may change without notice, so what is asked of one, or judged by one, never counts as
unchanged. Of two hosts that start within the same moment, the one whose run began first by its own clock goes on; with
clocks apart both may. The alias moves once even then: slm/evaluation/promotion.py looks at it again before it is moved.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from filelock import Timeout

from slm.answers import endpoints
from slm.base import cache, console, environment
from slm.base.errors import BadInput
from slm.base.hashing import digest
from slm.base.parameters import Parameters
from slm.scorers import scorer_calls
from slm.tracking import lifecycle, mlflow_client, registry, run_records

SLOT, SUBJECT, ASKED, INPUTS = "slot", "slot.subject", "slot.asked", "slot.inputs"
VERDICT, EARLIER, SKIPPED = "slot.verdict", "unchanged.run", "skipped"
PER_START = ("slot", "force", "resume", "traces", "timeout")  # parameters that don't change what is found
BY_CONTENT = ("model_uris", "baseline", "prompts", "thresholds")  # that name what is hashed itself


def check(args: Parameters) -> None:
    """What a slot needs.

    Raises:
        BadInput: no model is named.
    """
    if args.slot and not args.model_uris.strip():
        raise BadInput("slot: needs model_uris; a schedule evaluates what is logged already, models:/name@challenger")


@contextmanager
def run(name: str, args: Parameters) -> Iterator[str]:
    """The run of this process; yields the verdict that this start ends with at once, "" where it is to go on."""
    if not args.slot:
        with lifecycle.run(name, args):
            yield ""
        return
    with _alone_on_this_host(args) as alone:
        if not alone:
            run_records.tag_waiting_run({SLOT: args.slot, **_skipped(args, "on this host")})
            yield "none"
            return
        with lifecycle.run(name, args) as active:
            yield _entered(args, active)


def unchanged(args: Parameters, uris: Sequence[str], prompt_set, thresholds) -> str:
    """The verdict of an earlier run with the same inputs, taken over; "" where there is none. `uris` are resolved."""
    if not args.slot:
        return ""
    asked = scorer_calls.read(args.scorers, args.judge)
    models = [identity(uri) for uri in uris]
    if not all(models) or (asked.judge and not asked.judge.is_logged):
        return ""
    inputs = inputs_sha256(args, models, prompt_set.sha256, thresholds, asked.sha256, environment.describe())
    earlier = [] if args.force else run_records.runs_with({INPUTS: inputs})
    run_records.tag_active_run({INPUTS: inputs})
    return _taken_over(earlier, f"unchanged: slot {args.slot} has the inputs of")


def conclude(args: Parameters, verdict: str) -> None:
    """Marks the slot as done: the verdict is there, and the alias moved where it had to."""
    if args.slot:
        run_records.tag_active_run({VERDICT: verdict})


def identity(uri: str) -> str:
    """What a resolved model URI stands for, in a text that changes when the model does; "" where nobody can know."""
    if endpoints.is_endpoint(uri):
        return ""
    if uri.startswith(("models:/", "runs:/")):  # what these name is written once
        return f"{uri} {registry.version_source(uri)}"
    with registry.local_copy(uri) as folder:
        return cache.manifest_sha256(cache.manifest_of(folder))


def inputs_sha256(args: Parameters, models: list[str], prompts: str, thresholds, scorers: str, machine: dict) -> str:
    """One hash over everything that a verdict depends on; of the code its content, whatever the commit."""
    given = {name: value for name, value in vars(args).items() if name not in (*PER_START, *BY_CONTENT)}
    machine = {name: value for name, value in machine.items() if not name.startswith("git_")}
    return digest([given, models, bool(args.baseline), prompts, repr(thresholds), scorers, machine])


def subject(args: Parameters) -> str:
    """By what two starts are in each other's way: the models and the alias, as they were given."""
    return digest([args.model_uris, args.alias])


def _entered(args: Parameters, active) -> str:
    """Marks the run, then looks for a start elsewhere that came first, and for the slot's verdict."""
    given = {name: value for name, value in vars(args).items() if name not in PER_START}
    mine = {SLOT: args.slot, SUBJECT: subject(args), ASKED: digest(given)}
    run_records.tag_active_run(mine)
    own = (active.info.start_time, active.info.run_id)
    for other in run_records.runs_with({SUBJECT: mine[SUBJECT]}, "RUNNING"):
        if (other.info.start_time, other.info.run_id) < own:
            run_records.tag_active_run(_skipped(args, f"in run {other.info.run_id}"))
            return "none"
    earlier = [] if args.force else run_records.runs_with({SLOT: args.slot, ASKED: mine[ASKED]})
    return _taken_over(earlier, f"skipped: slot {args.slot} is done by")


def _skipped(args: Parameters, where: str) -> dict[str, str]:
    """Says that this start gives way, and the tags that say so."""
    line = f"skipped: {args.model_uris} is being evaluated {where}; slot {args.slot} is left alone"
    console.out.print(line, markup=False)
    return {"gate": "none", SKIPPED: line}


def _taken_over(earlier: Sequence, why: str) -> str:
    """The newest verdict among earlier runs, said and put on the active run; "" where there is none."""
    found = next((run for run in earlier if VERDICT in run.data.tags), None)
    if found is None:
        return ""
    verdict, run_id = found.data.tags[VERDICT], found.data.tags.get(EARLIER, found.info.run_id)
    line = f"{why} run {run_id}, gate: {verdict}; force=true evaluates again"
    console.out.print(line, markup=False)
    run_records.tag_active_run({"gate": verdict, VERDICT: verdict, EARLIER: run_id, SKIPPED: line})
    return verdict


@contextmanager
def _alone_on_this_host(args: Parameters) -> Iterator[bool]:
    """Whether no other process here evaluates the same on the same tracking server; none can while the block lasts."""
    name = f"{digest([*mlflow_client.address(), subject(args)])[:16]}.lock"
    lock = cache.lock(cache.private("schedules") / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
