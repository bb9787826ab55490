"""The wrapper's parts beside it: two versions of them in one process, and a copy whose folder is gone."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from support.commands import REPOSITORY

from slm.models import chat_model, wrappers

MODELS = REPOSITORY / "slm" / "models"
ROLES = "{% for message in messages %}{{ message.role }}{% endfor %}"


def copied(folder: Path) -> Path:
    """A copy of the wrapper as it lies in a logged model."""
    folder.mkdir()
    shutil.copy(MODELS / "chat_model.py", folder)
    shutil.copytree(MODELS / "chat_parts", folder / "chat_parts", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def edited(tmp_path):
    """A wrapper of another version: its answers may have 7 tokens at most unless a request says otherwise."""
    folder = copied(tmp_path / "edited")
    part = folder / "chat_parts" / "fields.py"
    text = part.read_text(encoding="utf-8")
    assert "default=512" in text
    part.write_text(text.replace("default=512", "default=7"), encoding="utf-8")
    return folder


def test_mlflow_loads_two_versions_of_the_parts_in_one_process(tmp_path, edited):
    from mlflow.models.utils import _load_model_code_path

    folders = [copied(tmp_path / "same"), edited]
    loaded = [_load_model_code_path(str(folder / "chat_model.py"), {}) for folder in folders]
    for folder in folders:
        shutil.rmtree(folder)  # as a temporary folder of a download is removed
    modules = [sys.modules[type(model).__module__] for model in loaded]
    assert len({module.__name__ for module in modules} | {chat_model.SmallLanguageModel.__module__}) == 3
    assert [module.checked({})["max_tokens"] for module in modules] == [512, 7]
    assert chat_model.checked({})["max_tokens"] == 512
    for module in modules:
        assert module.render(ROLES, {}, [{"role": "user", "content": "Hi"}]) == "user"
        with pytest.raises(module.Refused, match="division by zero"):
            module.render("{{ 1 / 0 }}", {}, [])


def test_mlflow_loads_a_copy_where_this_repository_is_absent(tmp_path):
    folder = copied(tmp_path / "model")
    code = (
        "import sys; from mlflow.models.utils import _load_model_code_path as load\n"
        f"load({str(folder / 'chat_model.py')!r}, {{}})\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'slm']"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_checked_bytes_of_the_parts_run_even_if_the_files_change(edited, monkeypatch):
    """Between the check and the import, somebody writes into the folder."""

    described = types.SimpleNamespace(metadata={"wrapper": {"version": "0.0.9"}})

    code = wrappers.logged_code("m", edited)
    monkeypatch.setitem(wrappers.RELEASED, "0.0.9", wrappers.code_sha256(code))

    def read_then_written(uri, folder):
        for path in folder.rglob("*.py"):
            path.write_text("raise SystemExit('the changed file ran')", encoding="utf-8")
        return code

    monkeypatch.setattr(wrappers, "logged_code", read_then_written)
    module, sha256 = wrappers._module("m", edited, described, trust_code=False)
    assert sha256 == wrappers.code_sha256(code)
    assert module.checked({})["max_tokens"] == 7 and chat_model.checked({})["max_tokens"] == 512
    assert issubclass(module.SmallLanguageModel, sys.modules[f"{module.__name__}.chat_parts.generation"].Generation)
    text = module.render(ROLES, {}, [{"role": "user", "content": "Hi"}])
    assert text == "user"


def test_a_wrapper_of_one_file_keeps_the_hash_of_its_file():
    import hashlib

    assert wrappers.code_sha256({"chat_model.py": b"x"}) == hashlib.sha256(b"x").hexdigest()
    two = [wrappers.code_sha256({"chat_model.py": b"x", "chat_parts/a.py": content}) for content in (b"y", b"z")]
    assert len({*two, hashlib.sha256(b"x").hexdigest()}) == 3
