"""Models of a few lines, for the tests: their code and their signatures."""

# A model whose skill is known
COPIER = """
import mlflow
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Copier(PythonModel):
    '''Repeats a number, if its last digit is below {skill}.'''
    def predict(self, context, model_input, params=None):
        {also}
        return [text if int(text) % 10 < {skill} else "no" for text in model_input["prompt"]]

set_model(Copier())
"""


def signature(*columns, params=None):
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    specs = [ParamSpec(name, *rest) for name, *rest in params or ()]
    return ModelSignature(
        Schema([ColSpec(type, name, required) for type, name, required in columns]),
        Schema([ColSpec("string")]),
        ParamSchema(specs) if specs else None,
    )
