"""Faults in models: damaged files, ways out of a folder, code and pickles. One line each, before a model is loaded."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from support import tiny_models
from support.commands import entry_point
from support.databases import sqlite_store
from support.model_folders import folder_of, genai, genai_folder_of, refusal

from slm.base.errors import BadInput
from slm.models import checkpoints, model_logging


def test_folders_that_are_in_order_are_taken(tmp_path):
    for folder in (folder_of(tmp_path / "checkpoint"), genai_folder_of(tmp_path / "genai")):
        assert checkpoints.find(str(folder)).fetch(onnx=True).folder == folder


FAULTS = {
    "models: missing folder": (lambda at: at / "gone", "does not exist"),
    "models: truncated safetensors": (
        lambda at: folder_of(at, model__safetensors=tiny_models.safetensors()[:-3]),
        "model.safetensors is damaged (Error while deserializing header",
    ),
    "models: a safetensors header that lies about its size": (
        lambda at: folder_of(at, model__safetensors=b"\xff" * 8 + bytes(90)),
        "model.safetensors is damaged (Error while deserializing header: header too large)",
    ),
    "models: a shard that is missing": (
        lambda at: folder_of(at, model__safetensors__index__json='{"weight_map": {"a": "model-2.safetensors"}}'),
        "names 'model-2.safetensors', which is not in its folder; fetch the model again",
    ),
    "models: .. in the index of shards": (
        lambda at: folder_of(at, model__safetensors__index__json='{"weight_map": {"a": "../model.safetensors"}}'),
        "names '../model.safetensors', which is not in its folder",
    ),
    "models: an index that is none": (
        lambda at: folder_of(at, model__safetensors__index__json="[]"),
        "is not an index of weights (TypeError",
    ),
    "models: config.json is a list": (lambda at: folder_of(at, config__json="[]"), "config.json is no JSON object"),
    "models: config.json nested without end": (
        lambda at: folder_of(at, config__json="[" * 100_000),
        "config.json can't be read as JSON: nested too deeply",
    ),
    "models: auto_map of the tokenizer": (
        lambda at: folder_of(at, tokenizer_config__json='{"auto_map": {"AutoTokenizer": ["t.T", null]}}'),
        "tokenizer_config.json asks to run code from the model's folder (auto_map), which is refused",
    ),
    "models: no genai_config.json": (
        lambda at: genai_folder_of(at, genai_config__json=None),
        "holds neither config.json nor genai_config.json",
    ),
    "models: a genai_config.json of the wrong shape": (
        lambda at: genai_folder_of(at, genai_config__json='{"model": {"decoder": {"filename": 7}}}'),
        "genai_config.json names 7, which is not a file in the model's folder",
    ),
    "models: .. in genai_config.json": (
        lambda at: genai_folder_of(at, genai_config__json=genai(filename="../../model.onnx")),
        "genai_config.json names '../../model.onnx', which is not a file in the model's folder",
    ),
    "models: an absolute path in genai_config.json": (
        lambda at: genai_folder_of(at, genai_config__json=genai(filename="/etc/passwd")),
        "genai_config.json names '/etc/passwd'",
    ),
    "models: a native library in genai_config.json": (
        lambda at: genai_folder_of(at, genai_config__json=genai(session_options={"custom_ops_library": "./x.so"})),
        "sets 'model.decoder.session_options.custom_ops_library' to './x.so', which is not allowed; remove it",
    ),
    "models: truncated ONNX data": (
        lambda at: genai_folder_of(at, model__onnx__data=bytes(23)),
        "model.onnx.data is missing or cut off (24 bytes are needed); fetch it again",
    ),
    "models: no ONNX data": (
        lambda at: genai_folder_of(at, model__onnx__data=None),
        "model.onnx.data is missing or cut off",
    ),
    "models: truncated ONNX graph": (
        lambda at: genai_folder_of(at, model__onnx=tiny_models.onnx_graph()[:-9]),
        "model.onnx is damaged (no ONNX graph can be read from it)",
    ),
    "models: .. in the ONNX graph": (
        lambda at: genai_folder_of(at, model__onnx=tiny_models.onnx_graph("../secret")),
        "model.onnx takes weights from '../secret', which is not in its folder and is refused",
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(name)) for name in FAULTS])
def test_a_damaged_or_unsafe_folder_is_refused_before_it_is_loaded(tmp_path, name):
    make, line = FAULTS[name]
    assert line in refusal(make(tmp_path / "model"))


@pytest.mark.fault("models: links that leave the folder")
@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt"])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_bytes(tiny_models.safetensors())
    folder = folder_of(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../outside")
    assert f"{folder / name} is a link to {outside}, outside the folder" in refusal(folder)


def test_a_link_within_the_folder_and_to_the_folder_are_taken(tmp_path):
    folder = folder_of(tmp_path / "model")
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "model.safetensors")
    (folder / "model.safetensors").symlink_to("weights/model.safetensors")
    (tmp_path / "link").symlink_to("model")
    assert checkpoints.find(str(tmp_path / "link")).fetch().name == "model"


def hub_snapshot(at: Path, blob: bytes, name: str) -> Path:
    """A model as the hub's cache holds it: links into blobs, which are named by their SHA-256."""
    snapshot = folder_of(at / "models--org--model" / "snapshots" / ("0" * 40), model__safetensors=None)
    (at / "models--org--model" / "blobs").mkdir()
    (at / "models--org--model" / "blobs" / name).write_bytes(blob)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{name}")
    return snapshot


@pytest.mark.fault("models: the hub's own snapshot links")
def test_the_hubs_own_links_work(tmp_path):
    weights = tiny_models.safetensors()
    sha256 = hashlib.sha256(weights).hexdigest()
    whole = hub_snapshot(tmp_path / "whole", weights, sha256)
    assert checkpoints.find(str(whole)).fetch().manifest["model.safetensors"].sha256 == sha256


@pytest.mark.fault("models: a flipped bit in the hub's cache")
def test_the_name_of_a_file_in_the_hubs_cache_tells_a_flipped_bit(tmp_path):
    weights = tiny_models.safetensors()
    sha256 = hashlib.sha256(weights).hexdigest()
    flipped = weights[:-1] + bytes([weights[-1] ^ 1])
    assert "model.safetensors is damaged (SHA-256" in refusal(hub_snapshot(tmp_path / "flipped", flipped, sha256))


@pytest.mark.fault("models: .. in subfolder")
@pytest.mark.parametrize("subfolder", ["..", "../other", "a/../../other", "/etc"])
@pytest.mark.parametrize("model", ["folder", "org/model"])
def test_a_subfolder_stays_in_its_folder(tmp_path, model, subfolder):
    model = str(folder_of(tmp_path / "model")) if model == "folder" else model
    with pytest.raises(BadInput, match="leaves the model's folder; name one in it"):
        checkpoints.find(model, subfolder=subfolder)


def cannot_be_wrapped(model: Path, folder: Path) -> str:
    done = entry_point("pipeline", f"--model={model}", MLFLOW_TRACKING_URI=sqlite_store(folder))
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    return done.err


@pytest.mark.fault("models: GGUF of an unknown architecture")
def test_a_gguf_file_of_an_unknown_architecture_costs_one_line(tmp_path):
    strange = tiny_models.gguf(tmp_path / "strange.gguf", "mystery")
    line = cannot_be_wrapped(strange, tmp_path)
    assert line.startswith(f"error: model: {strange} can't be converted: ") and "mystery" in line


@pytest.mark.fault("models: no chat template")
def test_a_checkpoint_without_a_chat_template_costs_one_line(tmp_path, checkpoint):
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint.folder, bare, ignore=shutil.ignore_patterns("*.jinja"))
    config = json.loads((bare / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    line = "error: model: bare has no chat template; log it with -e onnx and schema=prompt"
    assert cannot_be_wrapped(bare, tmp_path).startswith(line)


# ---------------------------------------------------------------------------------------------------------------------
# Logged models


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An sqlite store with an ONNX wrapper and a pipeline over real weights, and strangers' models."""
    import mlflow
    from support.python_models import signature

    folder = tmp_path_factory.mktemp("faults")
    uri = sqlite_store(folder)
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("faults", artifact_location=str(folder / "artifacts"))
    (folder / "code.py").write_text(STRANGER, encoding="utf-8")
    text = signature(("string", "prompt", True))
    with mlflow.start_run(experiment_id=experiment):
        yield uri, lambda name, **log: mlflow.pyfunc.log_model(name=name, pip_requirements=[], **log).model_uri, text
    mlflow.set_tracking_uri(None)


STRANGER = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Stranger(PythonModel):
    def predict(self, context, model_input, params=None):
        return list(model_input["prompt"])

set_model(Stranger())
"""


def evaluate(store, *uris: str, **environment):
    return entry_point(
        "evaluate",
        f"--model_uris={','.join(uris)}",
        "--max_tokens=2",
        "--trust_code=true",
        MLFLOW_TRACKING_URI=store[0],
        **environment,
    )


@pytest.mark.fault("security: pickled pyfuncs are refused unless asked for")
def test_a_pickled_pyfunc_is_refused_before_any_model_is_loaded_unless_pickle_is_allowed(store, tmp_path, monkeypatch):
    from mlflow.pyfunc import PythonModel

    class Pickled(PythonModel):
        def predict(self, context, model_input, params=None):
            return list(model_input["prompt"])

    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION")
    uri = store[1]("pickled", python_model=Pickled(), signature=store[2])
    done = evaluate(store, uri)
    assert done.code == 2
    assert done.err == (
        f"error: {uri} is a pickle, which can run anything; "
        "set MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true where you trust who made it\n"
    )
    assert "Loading" not in done.out
    done = evaluate(store, uri, MLFLOW_ALLOW_PICKLE_DESERIALIZATION="true")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        pytest.param(
            "signature",
            "takes the columns age (double); a `messages` column, or one text column, is needed",
            marks=pytest.mark.fault("models: wrong signature"),
        ),
        pytest.param(
            "flavor",
            "has no python_function flavor, by which MLflow asks models for answers",
            marks=pytest.mark.fault("models: wrong flavor"),
        ),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused_before_any_model_is_loaded(store, tmp_path, kind, reason):
    import mlflow
    from support.python_models import signature

    code = tmp_path / "code.py"
    code.write_text(STRANGER, encoding="utf-8")
    good = store[1]("good", python_model=str(code), signature=store[2])
    if kind == "flavor":
        uri = mlflow.models.Model.log(artifact_path=None, name="flavored", flavor=_NoPyfunc).model_uri
    else:
        uri = store[1]("wrong", python_model=str(code), signature=signature(("double", "age", True)))
    done = evaluate(store, good, uri)
    assert done.code == 2, done.err
    assert done.err == f"error: {uri} {reason}\n"
    assert "Loading" not in done.out


class _NoPyfunc:
    """An MLflow flavor that has no pyfunc."""

    __name__ = "nothing"

    @staticmethod
    def save_model(path, mlflow_model, **_):
        Path(path).mkdir(exist_ok=True)
        mlflow_model.add_flavor("nothing")
        mlflow_model.save(f"{path}/MLmodel")


GENERATION = {"max_tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}


@pytest.mark.parametrize(
    ("name", "flip"),
    [
        pytest.param(
            "artifacts/onnx/model.onnx.data", True, marks=pytest.mark.fault("models: a flipped bit in logged ONNX data")
        ),
        pytest.param(
            "model/model.safetensors", True, marks=pytest.mark.fault("models: a flipped bit in logged safetensors")
        ),
        pytest.param(
            "artifacts/onnx/tokenizer.json", False, marks=pytest.mark.fault("models: a logged file that is gone")
        ),
    ],
)
def test_a_logged_model_whose_files_were_changed_is_not_scored(store, checkpoint, int4_export, name, flip):
    from urllib.parse import urlsplit

    import mlflow

    if name.startswith("artifacts"):
        logged = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4")
    else:
        logged = model_logging.log_pipeline(checkpoint, GENERATION)
    folder = mlflow.get_logged_model(logged.model_id).artifact_location
    path = Path(urlsplit(folder).path) / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if flip:  # in a file of its own: the cache's may be linked to this one
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    done = evaluate(store, logged.model_uri)
    assert done.code == 2, done.err
    assert done.err == f"error: {logged.model_uri}: {name} is missing or was changed since the model was logged\n"
