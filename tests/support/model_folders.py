"""Folders of models, in order or damaged in one place, and how each is refused."""

import json
from pathlib import Path

import pytest
from support import tiny_models

from slm.base.errors import BadInput
from slm.models import checkpoints


def folder_of(path: Path, **changes: bytes | str | None) -> Path:
    """A folder with a safetensors checkpoint that is in order, but for the changes (None: the file isn't there)."""
    return _filled(
        path, {"model.safetensors": tiny_models.safetensors(), "config.json": '{"model_type": "llama"}'}, changes
    )


def genai_folder_of(path: Path, **changes: bytes | str | None) -> Path:
    """An ONNX GenAI folder that is in order, but for the changes."""
    files = {"genai_config.json": '{"model": {"decoder": {"filename": "model.onnx"}}}', "model.onnx.data": bytes(24)}
    return _filled(path, files | {"model.onnx": tiny_models.onnx_graph()}, changes)


def _filled(path: Path, files: dict, changes: dict) -> Path:
    path.mkdir(parents=True)
    files = {"tokenizer.json": "{}", "tokenizer_config.json": "{}"} | files
    for name, content in (files | {name.replace("__", "."): content for name, content in changes.items()}).items():
        if content is not None:
            (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(folder: Path, subfolder: str = "") -> str:
    with pytest.raises(BadInput) as caught:
        checkpoints.find(str(folder), subfolder=subfolder).fetch(onnx=True)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    return line


def genai(**more) -> str:
    return json.dumps({"model": {"decoder": {"filename": "model.onnx"} | more}})
