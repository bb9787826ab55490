"""Opens a run, logs its parameters, and ends the run in the right state after success, failure or a stop.

An entry point's story runs inside `exit_code`, which gives each kind of end an exit code. docs/reading-results.md
lists the codes. A run ends as FINISHED, FAILED or KILLED. For FAILED and KILLED, the `error` tag has the reason. Only
the functions that need MLflow import it. So `--help` and a typo get their output at once.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from slm.base import cache, console, credentials, environment, stopping
from slm.base.errors import BadInput, Unavailable, exhausted
from slm.base.parameters import Parameters, written
from slm.base.stopping import Stopped
from slm.base.wording import one_line
from slm.tracking import frozen_prompts, run_records, runs, store, tags
from slm.tracking.mlflow_client import _or_found, is_infrastructure, quiet_mlflow

VERDICT_CODES = {"none": 0, "pass": 0, "regress": 3, "inconclusive": 5}
# for calls to a store that may have failed: with MLflow's own retries, each call takes minutes
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
_open_runs: list[str] = []


def exit_code(
    story: Callable[[], str],
    stopped_by: str = "stopped by {}; the run is ended, and its answers are kept for the next one",
) -> int:
    """Runs an entry point's story, which returns the verdict of the gate. Returns the exit code for its end.

    `stopped_by` says what a signal has ended, and what is left.
    """
    try:
        with stopping.listening(_end_open_runs):
            return VERDICT_CODES[story()]
    except (BadInput, Unavailable) as error:
        _print_error(error)
        _end_waiting_run("FAILED", str(error))
        return error.exit_code
    except Stopped as stopped:
        _end_waiting_run("KILLED", f"stopped by {stopped}")
        console.err.print(stopped_by.format(stopped), markup=False)
        return stopped.exit_code
    except Exception as error:
        reason = exhausted(error)
        if not reason and not is_infrastructure(error) and not type(error).__module__.startswith("mlflow"):
            raise
        line = reason or f"{type(error).__name__}: {one_line(error)}"
        _print_error(line)
        _end_waiting_run("FAILED", line)
        return Unavailable.exit_code


@contextmanager
def run(name: str, args: Parameters) -> Iterator[Any]:
    """The MLflow run of this process: the run that `mlflow run` made, or a new run. The block's end ends the run."""
    mlflow = quiet_mlflow()
    cache.check()
    store.check(mlflow)
    made_by_mlflow = "MLFLOW_RUN_ID" in os.environ
    client = mlflow.MlflowClient()
    words = {"run_name": None if made_by_mlflow else name, "tags": runs.process_tags()}
    # this call makes the experiment of MLFLOW_EXPERIMENT_NAME if it does not exist
    started = _or_found(lambda: mlflow.start_run(**words), "RESOURCE_ALREADY_EXISTS")
    limit = stopping.within(args.timeout)
    with _ending(started) as active, limit, runs.signs_of_life(client, active.info.run_id):
        ended = runs.end_abandoned(client, active)
        if ended:
            console.out.print(f"runs that earlier processes left behind are set FAILED: {', '.join(ended)}")
        opened = client.get_run(active.info.run_id)
        _scrub(client, opened)
        known = opened.data.params
        plain = {name: written(value) for name, value in vars(args).items()}
        mlflow.log_params({name: value for name, value in plain.items() if name not in known})
        # `mlflow run` logs a text as the shell gets it, in quotes
        mlflow.log_params({f"cfg.{name}": value for name, value in plain.items() if known.get(name, value) != value})
        frozen_prompts.log(args)
        yield active
    frozen_prompts.forget(args)


@contextmanager
def child_run(name: str) -> Iterator[Any]:
    """A child run of the active run, for one scored model."""
    with _ending(quiet_mlflow().start_run(run_name=name, nested=True, tags=runs.process_tags())) as active:
        yield active


def name_end(run_id: str, name: str) -> None:
    """Names how a run ends. A store that does not answer keeps no process."""
    with environment.variables(PATIENCE), suppress(Exception):
        run_records.name_run(run_id, name)


@contextmanager
def _ending(active) -> Iterator[Any]:
    """Ends a run as FINISHED, FAILED or KILLED. MLflow's own context manager never sets KILLED."""
    import mlflow

    run_id = active.info.run_id
    _open_runs.append(run_id)
    try:
        yield active
    except BaseException as error:
        status, reason = "FAILED", exhausted(error) or one_line(error)
        if isinstance(error, Stopped):
            status, reason = "KILLED", f"stopped by {error}"
        with environment.variables(PATIENCE):  # the error is raised even if the store refuses the tag
            with suppress(Exception):
                _tell(mlflow.MlflowClient(), run_id, status, credentials.scrubbed(reason))
            with suppress(Exception):
                mlflow.end_run(status)
        raise
    else:
        mlflow.end_run("FINISHED")
        with environment.variables(PATIENCE), suppress(Exception):
            runs.forget_process(mlflow.MlflowClient(), run_id)
    finally:
        _open_runs.remove(run_id)


def _end_open_runs(reason: str) -> None:
    """Ends all open runs as KILLED. Any thread may call this function."""
    client = quiet_mlflow().MlflowClient()
    with environment.variables(PATIENCE):
        for run_id in reversed(_open_runs):
            with suppress(Exception):
                client.set_tag(run_id, tags.ERROR, f"stopped by {reason}")
                client.set_terminated(run_id, "KILLED")


def _end_waiting_run(status: str, reason: str) -> None:
    """Ends the run that `mlflow run` made for this process, also if the story ended before it opened the run."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return
    # the store may be out of reach; the exit code stays the same
    with environment.variables(PATIENCE), suppress(Exception):
        client = quiet_mlflow().MlflowClient()
        _scrub(client, client.get_run(run_id))
        _tell(client, run_id, status, credentials.scrubbed(reason))
        client.set_terminated(run_id, status)


def _tell(client, run_id: str, status: str, reason: str) -> None:
    """Writes why a run ended early: the tag `error`, and for MLflow's pages its name and description."""
    client.set_tag(run_id, tags.ERROR, reason)
    word = "stopped" if status == "KILLED" else "error"
    name = reason if reason.startswith(word) else f"{word}: {reason}"
    run_records.name_run(run_id, name, f"**{word}**\n\n    {reason}\n")


def _scrub(client, run) -> None:
    """Removes secrets from a run's tags. `mlflow run` writes a git URL with its token into mlflow.source.name."""
    for name, value in run.data.tags.items():
        if credentials.held_by(value):
            client.set_tag(run.info.run_id, name, credentials.scrubbed(value))


def _print_error(error) -> None:
    console.err.print(f"error: {credentials.scrubbed(str(error))}", style="red", markup=False)
    sys.stderr.flush()
