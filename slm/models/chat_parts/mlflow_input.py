"""What MLflow does with a call before the wrapper gets it.

MLflow (3.17) drops columns and parameters that the signature lacks. It only warns, in the log of the server. A client
with a typing error then gets an answer that ignores its field. MLflow has no hook in front of this. So the first
wrapper of a process adds a check to MLflow's PyFuncModel. The check calls `check_input` of the loaded model. Models
without this method are not touched.
"""

import functools
from collections.abc import Iterable

import mlflow.pyfunc

MARK = "_checks_input"
METHODS = ("_predict", "_predict_stream")


def columns(model_input) -> Iterable[object]:
    """The names of the fields in a call's input: columns of a table, or the keys of dicts."""
    if hasattr(model_input, "columns"):
        return list(model_input.columns)
    rows = model_input if isinstance(model_input, list) else [model_input]
    return dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)


def check_before_mlflow() -> None:
    """Lets MLflow call `check_input` of a loaded model before it drops columns. Further calls change nothing."""
    for name in METHODS:
        method = getattr(mlflow.pyfunc.PyFuncModel, name, None)
        if method is not None and not hasattr(method, MARK):
            setattr(mlflow.pyfunc.PyFuncModel, name, _checking(method))


def _checking(method):
    @functools.wraps(method)
    def checking(self, data, params=None):
        check = getattr(getattr(self._model_impl, "python_model", None), "check_input", None)
        if check is not None:
            check(data, params)
        return method(self, data, params)

    setattr(checking, MARK, True)
    return checking
