"""First contact with the tracking store, so that whatever is wrong with it is one line, before anything is done.

MLflow makes the tables of a fresh sqlite file at its first use, and two processes that do so at once ruin the file;
here they take turns. `mlflow run` uses the store before it starts an entry point: the README says what to do there.
Databases with a server of their own are not locked: they are set up by `mlflow server` or `mlflow db upgrade`.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm.base import credentials
from slm.base.errors import BadInput, Unavailable

LOCK_SECONDS = 300  # the tables take some 10 s


def check(mlflow) -> None:
    """Asks the tracking store that MLflow's settings name for one experiment.

    Raises:
        BadInput: the URI is of no kind that MLflow or a plugin knows, or of one that MLflow refuses.
        Unavailable: it doesn't answer, refuses the user, is of another MLflow's making, or can't be opened.
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
    """Waits for its turn with an sqlite file."""
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
    """Without the pages that cloud libraries log while they look for credentials; the error says it in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
