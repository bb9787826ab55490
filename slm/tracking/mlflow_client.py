"""Imports MLflow without its noise, downloads files, and separates infrastructure failures from other errors."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from slm.base.errors import BadInput, exhausted
from slm.base.wording import one_line


def _or_found(make: Callable, error_code: str):
    """The result of `make`, which is called again after `error_code`: two runs may create the same thing at once."""
    import mlflow

    try:
        return make()
    except mlflow.MlflowException as error:
        if error.error_code != error_code:
            raise
        return make()


def quiet_mlflow():
    """MLflow without warnings that do not help users. Progress bars appear only on a terminal."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", str(sys.stderr.isatty()))
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")  # MLflow's default loads any pickle
    import mlflow

    warnings.filterwarnings("ignore", message="(?s).*interpreted in multiple ways")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def download(uri: str) -> Path:
    """A local path of a file or folder that MLflow can download.

    Raises:
        BadInput: the URI names nothing that can be downloaded.
    """
    mlflow = quiet_mlflow()
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except Exception as error:
        if is_infrastructure(error) or exhausted(error):
            raise
        raise BadInput(f"{uri} can't be downloaded: {one_line(error)}") from None


def address() -> tuple[str, str]:
    """The tracking server's URI and the experiment's id or name, before a run is opened. "" if no variable names it."""
    named = os.environ.get("MLFLOW_EXPERIMENT_ID") or os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    return quiet_mlflow().get_tracking_uri(), named


def is_infrastructure(error: Exception) -> bool:
    """Whether a server, a store or the network failed. False for a user's mistake or a bug of this program."""
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
