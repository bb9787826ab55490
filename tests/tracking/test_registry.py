"""When two logged models count as one."""

import json
import shutil

import pytest
from support.python_models import COPIER, signature

from slm.models import manifest
from slm.tracking import registry


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The folder of a logged model, with a list of its files."""
    import mlflow

    folder = tmp_path_factory.mktemp("logged")
    code = folder / "model.py"
    code.write_text(COPIER.format(skill=9, also="pass"), encoding="utf-8")
    model = folder / "model"
    mlflow.pyfunc.save_model(
        model,
        python_model=str(code),
        pip_requirements=[],
        signature=signature(("string", "prompt", True)),
        metadata={"schema": "prompt"},
    )
    list_files(model, {"MLmodel": "1", "model.py": "2"})
    return model


def list_files(model, files: dict[str, str]) -> None:
    (model / manifest.NAME).write_text(json.dumps({"files": files}), encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "old", "new", "same"),
    [
        ({"MLmodel": "of another day", "model.py": "2"}, "", "", True),
        ({"MLmodel": "1", "model.py": "other weights"}, "", "", False),
        ({"MLmodel": "1", "model.py": "2"}, "schema: prompt", "schema: chat", False),
        ({"MLmodel": "1", "model.py": "2"}, '"name": "prompt"', '"name": "text"', False),
    ],
)
def test_models_with_the_same_files_metadata_and_signature_are_one(logged, tmp_path, files, old, new, same):
    other = tmp_path / "model"
    shutil.copytree(logged, other)
    described = (other / "MLmodel").read_text(encoding="utf-8")
    assert old in described
    (other / "MLmodel").write_text(described.replace(old, new), encoding="utf-8")
    list_files(other, files)
    assert registry.have_same_files(str(logged), str(other)) is same


def test_models_that_list_no_files_are_two(logged, tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        shutil.copytree(logged, folder)
        list_files(folder, {"MLmodel": "1"})
    assert not registry.have_same_files(*map(str, folders))
    (folders[1] / manifest.NAME).unlink()
    assert not registry.have_same_files(*map(str, folders))


def test_an_endpoint_is_the_same_model_as_itself_alone():
    address = "http://127.0.0.1:1/v1#phi3"
    assert registry.have_same_files(address, address)
    assert not registry.have_same_files(address, "http://127.0.0.1:1/v1#phi4")
