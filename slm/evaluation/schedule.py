"""Evaluation on a schedule: one evaluation at a time, one per slot, and none if nothing has changed.

A slot is the scheduled time of a start; the scheduler gives it in `slot`. A start with a slot

- is skipped while another start for the same models and alias runs. On this host, a file lock shows the other start.
  On another host, the tags of a RUNNING run show it;
- takes over the verdict of its slot, or of an earlier run with the same inputs. The inputs are the models, baseline,
  prompts, parameters, thresholds, scorers, code and environment. With `force`, the start evaluates all the same.

The tag `slot.verdict` holds the verdict. The tag is written after everything else, promotion included. So a run whose
model regressed has the tag, although `mlflow run` ends the run as FAILED. A run that broke off has no such tag, and the
next start evaluates its slot again.

Not covered: an endpoint may change without notice. So an evaluation with an endpoint as model or judge never counts as
unchanged. If two hosts start at the same moment, the run with the earlier start time goes on. If their clocks differ,
both runs may go on. The alias still moves only once: slm/evaluation/promotion.py checks it again before the move.
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
from slm.tracking import lifecycle, mlflow_client, registry, run_records, tags

PER_START = ("slot", "check", "force", "resume", "traces", "timeout")  # parameters that do not change the verdict
# parameters whose content is hashed instead
BY_CONTENT = ("model_uris", "baseline", "prompts", "texts", "fields", "expected_pattern", "system_prompt", "thresholds")


def check(args: Parameters) -> None:
    """Checks that a start with a slot names a model.

    Raises:
        BadInput: no model is named.
    """
    if args.slot and not args.model_uris.strip():
        raise BadInput("slot: needs model_uris; a schedule evaluates what is logged already, models:/name@challenger")


@contextmanager
def run(name: str, args: Parameters) -> Iterator[str]:
    """Opens the run of this process. Yields a verdict if the start must end at once, and "" if the start goes on."""
    if not args.slot:
        with lifecycle.run(name, args):
            yield ""
        return
    with _alone_on_this_host(args) as alone:
        if not alone:
            run_records.tag_waiting_run({tags.SLOT: args.slot, **_skipped(args, "on this host")})
            yield "none"
            return
        with lifecycle.run(name, args) as active:
            yield _entered(args, active)


def unchanged(args: Parameters, uris: Sequence[str], prompt_set, thresholds) -> str:
    """Takes over the verdict of an earlier run with the same inputs. "" if there is none. `uris` are resolved."""
    if not args.slot:
        return ""
    asked = scorer_calls.read(args.scorers, args.judge)
    models = [identity(uri) for uri in uris]
    if not all(models) or (asked.judge and not asked.judge.is_logged):
        return ""
    prompts = prompt_set.sha256 + (prompt_set.texts.sha256 if prompt_set.texts else "")
    inputs = inputs_sha256(args, models, prompts, thresholds, asked.sha256, environment.describe())
    earlier = [] if args.force else run_records.runs_with({tags.INPUTS: inputs})
    run_records.tag_active_run({tags.INPUTS: inputs})
    return _taken_over(earlier, f"unchanged: slot {args.slot} has the inputs of")


def mark_done(args: Parameters, verdict: str) -> None:
    """Marks the slot as done, after the verdict and the move of the alias."""
    if args.slot:
        run_records.tag_active_run({tags.VERDICT: verdict})


def identity(uri: str) -> str:
    """A text that changes if the model behind a resolved URI changes. "" for an endpoint, which may change unseen."""
    if endpoints.is_endpoint(uri):
        return ""
    if uri.startswith(("models:/", "runs:/")):  # MLflow never changes the files behind these URIs
        return f"{uri} {registry.version_source(uri)}"
    with registry.local_copy(uri) as folder:
        return cache.manifest_sha256(cache.manifest_of(folder))


def inputs_sha256(args: Parameters, models: list[str], prompts: str, thresholds, scorers: str, machine: dict) -> str:
    """One hash over everything that a verdict depends on. The code counts by its content, and not by its commit."""
    given = {name: value for name, value in vars(args).items() if name not in (*PER_START, *BY_CONTENT)}
    machine = {name: value for name, value in machine.items() if not name.startswith("git_")}
    return digest([given, models, bool(args.baseline), prompts, repr(thresholds), scorers, machine])


def subject(args: Parameters) -> str:
    """A hash of the models and the alias as given. Two starts conflict when they have the same subject."""
    return digest([args.model_uris, args.alias])


def _entered(args: Parameters, active) -> str:
    """Tags the run. Returns "none" if an earlier start runs elsewhere, else the slot's earlier verdict, or ""."""
    given = {name: value for name, value in vars(args).items() if name not in PER_START}
    mine = {tags.SLOT: args.slot, tags.SUBJECT: subject(args), tags.ASKED: digest(given)}
    run_records.tag_active_run(mine)
    own = (active.info.start_time, active.info.run_id)
    for other in run_records.runs_with({tags.SUBJECT: mine[tags.SUBJECT]}, "RUNNING"):
        if (other.info.start_time, other.info.run_id) < own:
            run_records.tag_active_run(_skipped(args, f"in run {other.info.run_id}"))
            return "none"
    earlier = [] if args.force else run_records.runs_with({tags.SLOT: args.slot, tags.ASKED: mine[tags.ASKED]})
    return _taken_over(earlier, f"skipped: slot {args.slot} is done by")


def _skipped(args: Parameters, where: str) -> dict[str, str]:
    """Prints that this start is skipped. Returns the tags for that."""
    line = f"skipped: {args.model_uris} is being evaluated {where}; slot {args.slot} is left alone"
    console.out.print(line, markup=False)
    return {tags.GATE: "none", tags.SKIPPED: line}


def _taken_over(earlier: Sequence, why: str) -> str:
    """Takes over the newest verdict of earlier runs: prints it and tags the active run. "" if there is none."""
    found = next((run for run in earlier if tags.VERDICT in run.data.tags), None)
    if found is None:
        return ""
    verdict, run_id = found.data.tags[tags.VERDICT], found.data.tags.get(tags.EARLIER, found.info.run_id)
    line = f"{why} run {run_id}, gate: {verdict}; force=true evaluates again"
    console.out.print(line, markup=False)
    run_records.tag_active_run({tags.GATE: verdict, tags.VERDICT: verdict, tags.EARLIER: run_id, tags.SKIPPED: line})
    return verdict


@contextmanager
def _alone_on_this_host(args: Parameters) -> Iterator[bool]:
    """Yields whether no other process on this host has the same subject and tracking server. Holds a lock meanwhile."""
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
