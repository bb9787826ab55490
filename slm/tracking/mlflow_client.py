"""MLflow itself: imported quietly, asked for files, and its failures told apart."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from slm.base.errors import BadInput, exhausted


def _or_found(make: Callable, error_code: str):
    """What `make` gives, asked twice where another run was first: MLflow looks, makes what isn't there, and fails."""
    import mlflow

    try:
        return make()
    except mlflow.MlflowException as error:
        if error.error_code != error_code:
            raise
        return make()


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


def address() -> tuple[str, str]:
    """The tracking server, and the experiment as it was named: what can be known before a run is opened."""
    named = os.environ.get("MLFLOW_EXPERIMENT_ID") or os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    return quiet_mlflow().get_tracking_uri(), named


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
