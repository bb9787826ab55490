"""Checks the tracking store before a run does any work. Any fault of the store becomes an error of one line.

MLflow creates the tables of a new sqlite file at the first use. Two processes that do so at once ruin the file. So
this module lets one process at a time do so. `mlflow run` uses the store before it starts an entry point:
docs/tracking-servers.md describes this case. This module does not lock databases that have a server.
`mlflow server` or `mlflow db upgrade` sets up those databases.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm.base import credentials
from slm.base.errors import BadInput, Unavailable

LOCK_SECONDS = 300  # MLflow takes about 10 s to create the tables


def check(mlflow) -> None:
    """Requests one experiment from the tracking store that MLflow's settings name.

    Raises:
        BadInput: neither MLflow nor a plugin knows this kind of URI, or MLflow refuses it.
        Unavailable: the store doesn't answer, refuses the user, was made by another MLflow version, or can't be opened.
    """
    uri = mlflow.get_tracking_uri()
    shown = credentials.scrubbed(uri)
    try:
        with _quiet(), _alone(uri):
            mlflow.MlflowClient().search_experiments(max_results=1)
    except Exception as error:
        line = credentials.scrubbed(" ".join(str(error).split()))[:400] or type(error).__name__
        if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
            raise BadInput(f"MLFLOW_TRACKING_URI: {shown} can't be used{_remedy(uri)}: {line}") from None
        raise Unavailable(f"tracking store {shown} can't be used{_remedy(uri)}: {line}") from None


def _remedy(uri: str) -> str:
    if uri.startswith("databricks"):
        return " (set DATABRICKS_HOST and DATABRICKS_TOKEN, or name a profile: databricks://PROFILE)"
    if uri.startswith("azureml"):
        return " (it needs the package azureml-mlflow, and who you are in AZURE_… variables)"
    return ""


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Waits until no other process of this project opens the sqlite file. Other stores need no wait."""
    from sqlalchemy.engine import make_url

    file = make_url(uri).database if uri.startswith("sqlite") else None
    if not file or file == ":memory:":
        yield
        return
    from filelock import FileLock

    path = Path(file).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the long logs of cloud libraries that look for credentials. The error gives the cause in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
