"""The int4 model, for the servers of these tests."""

import pytest


@pytest.fixture(scope="module")
def store(logged, wrappers):
    """A store with the int4 model in both schemas: its URI, and the models' by schema."""
    return wrappers[0], {"chat": logged["onnx int4"], "prompt": logged["onnx prompt"]}


@pytest.fixture(scope="module")
def wrapper(models):
    """The same model, loaded here: what the server's answers are compared with."""
    return models["onnx int4"]
