"""The run: opened, logged to, and ended in the right state, whatever happens. MLflow is called here.

An entry point's story runs inside `exit_code`, which turns every way of ending into the exit codes of the README and
leaves the run FINISHED, FAILED (with the reason in its `error` tag) or KILLED. MLflow is imported by the functions
that need it, so that `--help` and a typo answer at once.
"""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slm import console
from slm.errors import BadInput, Unavailable

VERDICT_CODES = {"none": 0, "pass": 0, "regress": 3, "inconclusive": 5}


class Stopped(BaseException):
    """A signal asked the run to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def exit_code(story: Callable[[], str]) -> int:
    """Runs an entry point's story, which returns the gate's verdict, and gives the exit code of how it ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        return VERDICT_CODES[story()]
    except (BadInput, Unavailable) as error:
        _print_error(error)
        _fail_waiting_run(str(error))
        return error.exit_code
    except Stopped as stopped:
        console.err.print(f"stopped by {stopped}; the run is ended, and its answers are kept for the next one")
        return stopped.exit_code
    except Exception as error:
        if not _is_infrastructure(error):
            raise
        _print_error(f"{type(error).__name__}: {_one_line(error)}")
        return Unavailable.exit_code


@contextmanager
def run(name: str, args: argparse.Namespace) -> Iterator["object"]:
    """The MLflow run of this process: the one `mlflow run` made, or a new one. Ended on the way out."""
    mlflow = quiet_mlflow()
    made_by_mlflow = "MLFLOW_RUN_ID" in os.environ
    with _ending(mlflow.start_run(run_name=None if made_by_mlflow else name)) as active:
        known = mlflow.MlflowClient().get_run(active.info.run_id).data.params
        plain = {name: str(value) for name, value in vars(args).items()}
        mlflow.log_params({name: value for name, value in plain.items() if name not in known})
        mlflow.log_params({f"cfg.{name}": value for name, value in plain.items()})
        yield active


@contextmanager
def child_run(name: str) -> Iterator["object"]:
    """A run below the active one, for one scored model."""
    with _ending(quiet_mlflow().start_run(run_name=name, nested=True)) as active:
        yield active


@contextmanager
def _ending(active) -> Iterator["object"]:
    """Ends a run in the state that what happened in it asks for (MLflow's own context knows no KILLED)."""
    import mlflow

    status, reason = "FINISHED", ""
    try:
        yield active
    except Stopped as stopped:
        status, reason = "KILLED", f"stopped by {stopped}"
        raise
    except BaseException as error:
        status, reason = "FAILED", _one_line(error)
        raise
    finally:
        try:
            if reason:
                mlflow.set_tag("error", reason)
        finally:
            mlflow.end_run(status)


def quiet_mlflow():
    """mlflow, without the lines that say nothing to this project's users, and bars on a terminal alone."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", str(sys.stderr.isatty()))
    import mlflow

    warnings.filterwarnings("ignore", message="(?s).*interpreted in multiple ways")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def download(uri: str) -> Path:
    """A local path for a file or folder that MLflow can download.

    Raises:
        BadInput: there is nothing.
    """
    mlflow = quiet_mlflow()
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except Exception as error:
        if _is_infrastructure(error):
            raise
        raise BadInput(f"{uri} can't be downloaded: {_one_line(error)}") from None


def resolve(uri: str) -> str:
    """A model URI frozen: an alias becomes the version it points at now. Only the model's description is read.

    Raises:
        BadInput: there is no such model, version or alias.
    """
    mlflow = quiet_mlflow()
    name, _, alias = uri.removeprefix("models:/").partition("@")
    try:
        if uri.startswith("models:/") and alias:
            uri = f"models:/{name}/{mlflow.MlflowClient().get_model_version_by_alias(name, alias).version}"
        mlflow.models.get_model_info(uri)
    except Exception as error:
        if _is_infrastructure(error):
            raise
        raise BadInput(f"{uri}: there is no such model: {_one_line(error)}") from None
    return uri


def log_dataset(prompt_set):
    """The prompt set as an MLflow dataset, an input of the active run."""
    import json

    import pandas as pd

    mlflow = quiet_mlflow()
    from slm.prompts import canonical_rows

    rows = [
        {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in row.items()
        }
        for row in canonical_rows(prompt_set.prompts)
    ]
    frame = pd.DataFrame(rows).astype("string").fillna("").astype(object)
    dataset = mlflow.data.from_pandas(frame, source=prompt_set.source, name=prompt_set.name)
    mlflow.log_input(dataset, context="evaluation")
    return dataset


def log_scored(scored, dataset, tags: dict[str, str]) -> None:
    """A scored model's metrics, tags and samples into the active run, linked to the model and to the dataset."""
    mlflow = quiet_mlflow()
    mlflow.log_metrics(scored.metrics, model_id=scored.model.model_id, dataset=dataset)
    mlflow.set_tags(tags)
    mlflow.log_text("".join(f"{line}\n" for line in scored.sample_lines()), "evaluation/samples.jsonl")


def set_alias(name: str, alias: str, version: str) -> None:
    quiet_mlflow().MlflowClient().set_registered_model_alias(name, alias, version)


def _stop(number, frame):
    raise Stopped(number)


def _fail_waiting_run(reason: str) -> None:
    """Ends the run that `mlflow run` made for us as FAILED, where the story ended before it was opened."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return
    client = quiet_mlflow().MlflowClient()
    client.set_tag(run_id, "error", reason)
    client.set_terminated(run_id, "FAILED")


def _is_infrastructure(error: Exception) -> bool:
    """Whether a server, a store or the network failed, and not what the user gave or this program did."""
    import requests

    if isinstance(error, requests.exceptions.RequestException | ConnectionError):
        return True
    if type(error).__module__.startswith("mlflow"):
        code, text = getattr(error, "error_code", ""), str(error)
        temporary = code in (
            "TEMPORARILY_UNAVAILABLE",
            "REQUEST_LIMIT_EXCEEDED",
            "PERMISSION_DENIED",
            "UNAUTHENTICATED",
        )
        return temporary or text.startswith("API request to") or "Max retries exceeded" in text
    return False


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _print_error(error) -> None:
    console.err.print(f"error: {error}", style="red", markup=False)
    sys.stderr.flush()
