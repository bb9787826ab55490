"""The run: opened, logged to, and ended in the right state, whatever happens. MLflow is called here.

An entry point's story runs inside `exit_code`, which turns every way of ending into the exit codes of the README and
leaves the run FINISHED, FAILED (with the reason in its `error` tag) or KILLED. MLflow is imported by the functions
that need it, so that `--help` and a typo answer at once.
"""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slm import cache, console, credentials, endpoints, environment, runs, stopping, store
from slm.errors import BadInput, Unavailable, exhausted
from slm.stopping import Stopped

HISTORY = 50  # earlier runs that a report looks back on
VERDICT_CODES = {"none": 0, "pass": 0, "regress": 3, "inconclusive": 5}
# with a store that failed, and was waited for once already: with MLflow's own patience each call takes minutes
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
_open_runs: list[str] = []


def exit_code(story: Callable[[], str]) -> int:
    """Runs an entry point's story, which returns the gate's verdict, and gives the exit code of how it ended."""
    try:
        with stopping.listening(_end_open_runs):
            return VERDICT_CODES[story()]
    except (BadInput, Unavailable) as error:
        _print_error(error)
        _end_waiting_run("FAILED", str(error))
        return error.exit_code
    except Stopped as stopped:
        _end_waiting_run("KILLED", f"stopped by {stopped}")
        console.err.print(f"stopped by {stopped}; the run is ended, and its answers are kept for the next one")
        return stopped.exit_code
    except Exception as error:
        reason = exhausted(error)
        if not reason and not is_infrastructure(error) and not type(error).__module__.startswith("mlflow"):
            raise
        line = reason or f"{type(error).__name__}: {_one_line(error)}"
        _print_error(line)
        _end_waiting_run("FAILED", line)
        return Unavailable.exit_code


@contextmanager
def run(name: str, args: argparse.Namespace) -> Iterator["object"]:
    """The MLflow run of this process: the one `mlflow run` made, or a new one. Ended on the way out."""
    mlflow = quiet_mlflow()
    cache.check()
    store.check(mlflow)
    made_by_mlflow = "MLFLOW_RUN_ID" in os.environ
    client = mlflow.MlflowClient()
    words = {"run_name": None if made_by_mlflow else name, "tags": runs.tags()}
    # the experiment of MLFLOW_EXPERIMENT_NAME is made here, where it isn't there
    started = _or_found(lambda: mlflow.start_run(**words), "RESOURCE_ALREADY_EXISTS")
    limit = stopping.within(getattr(args, "timeout", 0))
    with _ending(started) as active, limit, runs.signs_of_life(client, active.info.run_id):
        ended = runs.end_abandoned(client, active)
        if ended:
            console.out.print(f"runs that earlier processes left behind are set FAILED: {', '.join(ended)}")
        opened = client.get_run(active.info.run_id)
        _scrub(client, opened)
        known = opened.data.params
        plain = {name: str(value) for name, value in vars(args).items()}
        mlflow.log_params({name: value for name, value in plain.items() if name not in known})
        mlflow.log_params({f"cfg.{name}": value for name, value in plain.items()})
        yield active


def _or_found(make: Callable, error_code: str):
    """What `make` gives, asked twice where another run was first: MLflow looks, makes what isn't there, and fails."""
    import mlflow

    try:
        return make()
    except mlflow.MlflowException as error:
        if error.error_code != error_code:
            raise
        return make()


@contextmanager
def child_run(name: str) -> Iterator["object"]:
    """A run below the active one, for one scored model."""
    with _ending(quiet_mlflow().start_run(run_name=name, nested=True, tags=runs.tags())) as active:
        yield active


@contextmanager
def _ending(active) -> Iterator["object"]:
    """Ends a run in the state that what happened in it asks for (MLflow's own context knows no KILLED)."""
    import mlflow

    run_id = active.info.run_id
    _open_runs.append(run_id)
    try:
        yield active
    except BaseException as error:
        status, reason = "FAILED", exhausted(error) or _one_line(error)
        if isinstance(error, Stopped):
            status, reason = "KILLED", f"stopped by {error}"
        with environment.variables(PATIENCE):  # the error is told, whatever the store says to its tag
            with suppress(Exception):
                mlflow.MlflowClient().set_tag(run_id, "error", credentials.scrubbed(reason))
            with suppress(Exception):
                mlflow.end_run(status)
        raise
    else:
        mlflow.end_run("FINISHED")
    finally:
        _open_runs.remove(run_id)


def _end_open_runs(reason: str) -> None:
    """Ends what is open as KILLED, from whatever thread."""
    client = quiet_mlflow().MlflowClient()
    with environment.variables(PATIENCE):
        for run_id in reversed(_open_runs):
            with suppress(Exception):
                client.set_tag(run_id, "error", f"stopped by {reason}")
                client.set_terminated(run_id, "KILLED")


def quiet_mlflow():
    """mlflow, without the lines that say nothing to this project's users, and bars on a terminal alone."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", str(sys.stderr.isatty()))
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")  # MLflow's own default lets any model in
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
        if is_infrastructure(error) or exhausted(error):
            raise
        raise BadInput(f"{uri} can't be downloaded: {_one_line(error)}") from None


@contextmanager
def local_copy(uri: str) -> Iterator[Path | None]:
    """A logged model's folder on this machine, None for an endpoint.

    A copy is removed again, once the model is loaded from it; a folder of a store on this machine is not.
    """
    import tempfile

    if endpoints.is_endpoint(uri):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-") as scratch:
        before, tempfile.tempdir = tempfile.tempdir, scratch  # where MLflow puts copies, and nothing else
        try:
            folder = download(uri)
        finally:
            tempfile.tempdir = before
        yield folder


def resolve(uri: str, trust_code: bool = False) -> str:
    """A model URI frozen: an alias becomes the version it points at now. Only the model's description is read.

    An endpoint is asked for one token, and its URI gets the model's name. Code that was logged with a model is let in
    where `trust_code` says so.

    Raises:
        BadInput: there is no such model, version or alias, or it can't be asked.
        Unavailable: an endpoint does not answer, or refuses the key.
    """
    if endpoints.is_endpoint(uri):
        return endpoints.connect(uri).uri
    mlflow = quiet_mlflow()
    from slm import forms, wrappers

    name, _, alias = uri.removeprefix("models:/").partition("@")
    try:
        if uri.startswith("models:/") and alias:
            uri = f"models:/{name}/{mlflow.MlflowClient().get_model_version_by_alias(name, alias).version}"
        described = mlflow.models.get_model_info(uri)
        state = _state(uri)
    except Exception as error:
        if is_infrastructure(error) or exhausted(error):
            raise
        raise BadInput(f"{uri}: there is no such model: {_one_line(error)}") from None
    if state != "READY":
        raise BadInput(f"{uri} is {state}: its logging never came to an end; log it again")
    wrappers.check(uri, described, trust_code, lambda: _file_of(uri, wrappers.FILE))
    forms.check(uri, described)
    return uri


def _file_of(uri: str, name: str) -> bytes:
    """A small file of a logged model."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-") as scratch:
        try:
            found = quiet_mlflow().artifacts.download_artifacts(artifact_uri=f"{uri}/{name}", dst_path=scratch)
        except Exception as error:
            if is_infrastructure(error) or exhausted(error):
                raise
            raise BadInput(f"{uri} has no {name}: {_one_line(error)}") from None
        return Path(found).read_bytes()


def recorded_manifests(uri: str) -> tuple[str, ...]:
    """The hashes of a logged model's manifest that registry and tracking server keep, out of its folder's reach.

    Models that were logged by others have none until they have been evaluated as a registered version.
    """
    from mlflow.exceptions import MlflowException

    from slm import manifest

    if endpoints.is_endpoint(uri):
        return ()
    mlflow = quiet_mlflow()
    client, found, version = mlflow.MlflowClient(), [], registered_version(uri)
    if version:
        registered = client.get_model_version(*version)
        found.append(registered.tags.get(manifest.TAG))
        uri = registered.source or ""
    logged = re.fullmatch(r"models:/(m-[0-9a-f]+)", uri)
    model_id = logged[1] if logged else None
    try:
        if uri.startswith("runs:/"):
            model_id = _model_of_run(client, uri)
        elif not model_id and not version:
            model_id = mlflow.models.get_model_info(uri).model_id
        if model_id:
            found.append(client.get_logged_model(model_id).tags.get(manifest.TAG))
    except MlflowException as error:
        if is_infrastructure(error) or logged:
            raise
    return tuple(dict.fromkeys(filter(None, found)))  # a folder may be that of another server's model


def _state(uri: str) -> str:
    """READY, or what else MLflow says of a model; the registry calls a version READY whose model is not."""
    mlflow = quiet_mlflow()
    version = registered_version(uri)
    if version:  # over HTTP a version has no model_id
        uri = mlflow.MlflowClient().get_model_version(*version).source or ""
    model_id = re.fullmatch(r"models:/(m-[0-9a-f]+)", uri)
    return str(mlflow.get_logged_model(model_id[1]).status) if model_id else "READY"


def _model_of_run(client, uri: str) -> str | None:
    """The id of the LoggedModel that `runs:/RUN_ID/name` names, as the tracking server has it; None where none."""
    run_id, _, name = uri.removeprefix("runs:/").partition("/")
    outputs = client.get_run(run_id).outputs
    models = [client.get_logged_model(output.model_id) for output in (outputs.model_outputs if outputs else ())]
    named = sorted((model for model in models if model.name == name), key=lambda model: model.creation_timestamp)
    return named[-1].model_id if named else None


def log_dataset(prompt_set):
    """The prompt set as an MLflow dataset, an input of the active run."""
    import json

    import pandas as pd

    mlflow = quiet_mlflow()
    from mlflow.data.code_dataset_source import CodeDatasetSource

    from slm.prompts import canonical_rows

    rows = [
        {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in row.items()
        }
        for row in canonical_rows(prompt_set.prompts)
    ]
    frame = pd.DataFrame(rows).astype("string").fillna("").astype(object)
    source = prompt_set.source
    if source.startswith(("runs:/", "models:/")):  # these MLflow downloads, and has no kind of dataset source for
        source = CodeDatasetSource({"prompts": source})
    dataset = mlflow.data.from_pandas(frame, source=source, name=prompt_set.name)
    _or_found(lambda: mlflow.log_input(dataset, context="evaluation"), "BAD_REQUEST")  # of the database, by its rules
    return dataset


def history(prompts_sha256: str, model_name: str, names) -> dict[str, tuple]:
    """What earlier finished runs of this experiment found for the same prompts and model name, the oldest first.

    Returns report.Points by scorer. The children of the active run are left out.
    """
    from slm.report import Point

    mlflow = quiet_mlflow()
    parent = mlflow.active_run()
    quoted = model_name.replace("'", "''")
    runs = mlflow.MlflowClient().search_runs(
        [parent.info.experiment_id],
        f"tags.`prompts.sha256` = '{prompts_sha256}' and tags.`model.name` = '{quoted}' and status = 'FINISHED'",
        max_results=HISTORY,
        order_by=["attributes.start_time DESC"],
    )
    found: dict[str, tuple] = {}
    for run in reversed(runs):
        tags, metrics = run.data.tags, run.data.metrics
        if tags.get("mlflow.parentRunId") == parent.info.run_id:
            continue
        version = tags.get("model.uri", "").rpartition("/")[2]
        for name in names:
            figures = [metrics.get(f"{name}/{field}") for field in ("mean", "ci95_low", "ci95_high")]
            if None not in figures:
                version = version if version.isdigit() else ""
                point = Point(run.info.run_id, run.info.start_time / 1000, version, tags.get("gate", ""), *figures)
                found[name] = (*found.get(name, ()), point)
    return found


def log_scored(scored, dataset, tags: dict[str, str]) -> None:
    """A scored model's metrics, tags and samples into the active run, linked to the model and to the dataset."""
    mlflow = quiet_mlflow()
    mlflow.log_metrics(scored.metrics, model_id=scored.model.model_id, dataset=dataset)
    mlflow.set_tags(tags)
    mlflow.log_text("".join(f"{line}\n" for line in scored.sample_lines()), "evaluation/samples.jsonl")


def registered_version(uri: str) -> tuple[str, str] | None:
    """Name and version of `models:/name/version`; None for any other URI."""
    found = re.fullmatch(r"models:/([^/@]+)/(\d+)", uri)
    return (found[1], found[2]) if found else None


def can_be_promoted(uri: str) -> bool:
    """Whether a URI names one registered version, by its number or by an alias."""
    return bool(registered_version(uri) or re.fullmatch(r"models:/[^/@]+@[^/@]+", uri))


def version_source(uri: str) -> str:
    """What a registered version was made of (a number may be given again); "" for any other URI."""
    version = registered_version(uri)
    return quiet_mlflow().MlflowClient().get_model_version(*version).source if version else ""


def address() -> tuple[str, str]:
    """The tracking server, and the experiment as it was named: what can be known before a run is opened."""
    named = os.environ.get("MLFLOW_EXPERIMENT_ID") or os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    return quiet_mlflow().get_tracking_uri(), named


def runs_with(tags: dict[str, str], status: str = "") -> list:
    """Other runs of the active run's experiment that have these tags, the newest first. No value may hold a quote."""
    mlflow = quiet_mlflow()
    own = mlflow.active_run().info
    wanted = [f"tags.`{key}` = '{value}'" for key, value in tags.items()]
    wanted += [f"attributes.status = '{status}'"] if status else []
    found = mlflow.MlflowClient().search_runs(
        [own.experiment_id], " and ".join(wanted), order_by=["attributes.start_time DESC"], max_results=HISTORY
    )
    return [run for run in found if run.info.run_id != own.run_id]


def tag_active_run(tags: dict[str, str]) -> None:
    quiet_mlflow().set_tags(tags)


def tag_waiting_run(tags: dict[str, str]) -> None:
    """Tags the run that `mlflow run` made for us, where it did, and leaves its ending to it."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    for key, value in tags.items() if run_id else ():
        quiet_mlflow().MlflowClient().set_tag(run_id, key, value)


def alias_version(name: str, alias: str) -> str:
    """The version that an alias points at now; "" where there is none."""
    mlflow = quiet_mlflow()
    try:
        return str(mlflow.MlflowClient().get_model_version_by_alias(name, alias).version)
    except mlflow.exceptions.MlflowException as error:
        if is_infrastructure(error):
            raise
        return ""


def tag_version(name: str, version: str, tags: dict[str, str], description: str = "") -> None:
    client = quiet_mlflow().MlflowClient()
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    if description:
        client.update_model_version(name, version, description)


def set_alias(name: str, alias: str, version: str) -> None:
    quiet_mlflow().MlflowClient().set_registered_model_alias(name, alias, version)


def _end_waiting_run(status: str, reason: str) -> None:
    """Ends the run that `mlflow run` made for us, where the story ended before it was opened."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return
    # the reason may be that the store can't be reached; the exit code stands
    with environment.variables(PATIENCE), suppress(Exception):
        client = quiet_mlflow().MlflowClient()
        _scrub(client, client.get_run(run_id))
        client.set_tag(run_id, "error", credentials.scrubbed(reason))
        client.set_terminated(run_id, status)


def _scrub(client, run) -> None:
    """Takes a git URL's token out of the tags that `mlflow run` wrote; it keeps it in mlflow.source.name."""
    for name, value in run.data.tags.items():
        if credentials.held_by(value):
            client.set_tag(run.info.run_id, name, credentials.scrubbed(value))


def is_infrastructure(error: Exception) -> bool:
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
    console.err.print(f"error: {credentials.scrubbed(str(error))}", style="red", markup=False)
    sys.stderr.flush()
