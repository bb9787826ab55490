"""Faults of trust: what a model's folder, a store or a registry may not make this project run, write or believe."""

import json
import os
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from support import tiny_models
from support.commands import REPOSITORY, entry_point
from support.databases import sqlite_store
from support.model_folders import folder_of, genai, genai_folder_of, refusal
from support.questions import GENERATION

from slm.answers import loading
from slm.base.errors import BadInput, Unavailable
from slm.models import chat_model, genai_config, manifest, model_logging, wrappers
from slm.scorers.confined import CHECKS
from slm.tracking import registry

# ---------------------------------------------------------------------------------------------------------------------
# A folder of a stranger, before it is logged

TWICE = (
    '{"model": {"decoder": {"filename": "model.onnx", '
    '"session_options": {"custom_ops_library": "LICENSE.md"}, "session_options": {"provider_options": []}}}}'
)
ELF = b"\x7fELF\x02\x01\x01" + bytes(64)
SETTINGS = "models: genai_config.json, "
REFUSED = {
    SETTINGS + "a library behind a second key of the same name": (TWICE, "the key 'session_options' is given twice"),
    SETTINGS + "a profile that is written to a path": (
        genai(session_options={"enable_profiling": "/tmp/profile"}),
        "sets 'model.decoder.session_options.enable_profiling' to '/tmp/profile', which is not allowed; remove it",
    ),
    SETTINGS + "a graph that is written to a path": (
        genai(session_options={"session.optimized_model_filepath": "/tmp/x"}),
        "session.optimized_model_filepath' to '/tmp/x', which is not allowed",
    ),
    SETTINGS + "a library of an execution provider": (
        genai(session_options={"provider_options": [{"qnn": {"backend_path": "./x.so"}}]}),
        "asks for the execution provider 'qnn'; write one of cpu, cuda",
    ),
    SETTINGS + "an address for the GPU's allocator": (
        genai(session_options={"provider_options": [{"cuda": {"gpu_external_alloc": "140737"}}]}),
        "gpu_external_alloc' to '140737', which is not allowed",
    ),
    SETTINGS + "an adapter's file": (
        json.dumps({"model": {"decoder": {"filename": "model.onnx"}, "vision": {"adapter_filename": "../a"}}}),
        "sets 'model.vision' to",
    ),
    SETTINGS + "a processor's file": (
        json.dumps({"model": {"decoder": {"filename": "model.onnx"}, "speech": {"config_filename": "/etc/passwd"}}}),
        "sets 'model.speech' to",
    ),
    SETTINGS + "a tokenizer in another folder": (
        json.dumps({"model": {"decoder": {"filename": "model.onnx"}, "tokenizer_dir": "/etc"}}),
        "sets 'model.tokenizer_dir' to '/etc', which is not allowed",
    ),
    SETTINGS + "a name that is a format": (
        genai(inputs={"past_key_names": "%s%s%n"}),
        "has '%s%s%n' as model.decoder.inputs.past_key_names, which is not allowed",
    ),
    SETTINGS + "a name as wide as the memory": (
        genai(outputs={"present_key_names": "%0999999999d"}),
        "has '%0999999999d' as model.decoder.outputs.present_key_names, which is not allowed",
    ),
    SETTINGS + "a number out of all range": (
        '{"model": {"decoder": {"filename": "model.onnx", "num_hidden_layers": 1e999}}}',
        "model.decoder.num_hidden_layers, which is not allowed",
    ),
    SETTINGS + "a graph whose weights are not looked at": (
        genai(filename="model.bin"),
        "names the graph 'model.bin', which is not an .onnx file",
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(name)) for name in REFUSED])
def test_settings_that_reach_beyond_the_folder_are_refused_by_name(tmp_path, name):
    text, line = REFUSED[name]
    assert line in refusal(genai_folder_of(tmp_path / "model", genai_config__json=text, model__bin=b""))


FILES = {
    "models: a library that is called a licence": (folder_of, {"LICENSE__md": ELF}, "LICENSE.md is an ELF library"),
    "models: a library that is called a tokenizer": (
        folder_of,
        {"tokenizer__model": b"\xcf\xfa\xed\xfe" + bytes(64)},
        "tokenizer.model is a macOS library",
    ),
    "models: a library that is called settings": (
        genai_folder_of,
        {"added_tokens__json": b"MZ\x90\0" + bytes(64)},
        "added_tokens.json is a Windows library",
    ),
    "models: a text that is none": (folder_of, {"README__md": b"a\0b"}, "README.md should be text, but is not"),
    "models: a key given twice in config.json": (
        folder_of,
        {"config__json": '{"auto_map": {"AutoModel": "m.M"}, "auto_map": null}'},
        "config.json can't be read as JSON: the key 'auto_map' is given twice",
    ),
    "models: a key given twice in any other JSON": (
        folder_of,
        {"generation_config__json": '{"eos_token_id": 1, "eos_token_id": 2}'},
        "generation_config.json can't be read as JSON: the key 'eos_token_id' is given twice",
    ),
    "models: an index that names weights of another kind": (
        folder_of,
        {"model__safetensors__index__json": '{"weight_map": {"a": "model.bin"}}', "model__bin": b"\x80\x02"},
        "names 'model.bin', which is not a .safetensors file; save the model again",
    ),
    "models: a place in a file that is no number": (
        genai_folder_of,
        {"model__onnx": tiny_models.onnx_graph(length="abc")},
        "model.onnx is damaged (the place of 'weight' cannot be read); fetch it again",
    ),
    "models: auto_map below the top of a configuration": (
        folder_of,
        {"processor_config__json": '{"image": {"auto_map": {"AutoProcessor": "p.P"}}}'},
        "processor_config.json asks to run code from the model's folder (auto_map), which is refused",
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(name)) for name in FILES])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name):
    make, changes, line = FILES[name]
    assert line in refusal(make(tmp_path / "model", **changes))


def test_a_vocabulary_may_hold_a_token_called_auto_map(tmp_path):
    from slm.models import checkpoints

    folder = folder_of(tmp_path / "model", vocab__json='{"auto_map": 7}')
    assert checkpoints.find(str(folder)).fetch().folder == folder


@pytest.mark.fault("models: a folder that poses as the hub's cache")
def test_a_link_into_blobs_that_are_a_link_themselves_is_refused(tmp_path):
    (tmp_path / "secret.txt").write_text("sesame")
    folder = folder_of(tmp_path / "hub" / "snapshots" / "m")
    (tmp_path / "hub" / "blobs").symlink_to("/")
    (folder / "notes").symlink_to(tmp_path / "secret.txt")
    assert f"{folder / 'notes'} is a link to {tmp_path / 'secret.txt'}, outside the folder" in refusal(folder)


@pytest.mark.fault("models: a chat template that is a folder")
def test_a_chat_template_that_is_a_folder_is_one_line(tmp_path):
    from slm.models import checkpoints

    folder = folder_of(tmp_path / "model")
    (folder / "chat_template.jinja").mkdir()
    with pytest.raises(BadInput, match="the chat template or tokenizer_config\\.json can't be read"):
        checkpoints.find(str(folder)).fetch().require_chat()


@pytest.mark.fault("models: a chat template that makes half a character")
def test_a_template_that_makes_half_a_character_is_refused(logged):
    wrapper = load(logged[0]).wrapper
    wrapper.template = '{{ "\\ud800" }}'
    with pytest.raises(chat_model.Refused, match="the prompt holds half of a character"):
        wrapper.prepare({"messages": [{"role": "user", "content": "x"}]})


@pytest.mark.fault("models: a chat template that is no text")
@pytest.mark.parametrize("template", ["7", '[{"name": "default"}]', '["x"]', '{"default": "x"}'])
def test_a_chat_template_of_no_known_form_is_one_line(tmp_path, template):
    from slm.models import checkpoints

    folder = folder_of(tmp_path / "model", tokenizer_config__json=f'{{"chat_template": {template}}}')
    with pytest.raises(BadInput, match="the chat template or tokenizer_config\\.json can't be read") as caught:
        checkpoints.find(str(folder)).fetch().require_chat()
    assert "\n" not in str(caught.value)


@pytest.mark.fault("models: weights of a function that lie outside the folder")
def test_external_weights_are_looked_for_in_functions_too(tmp_path):
    import onnx

    model = onnx.load_from_string(tiny_models.onnx_graph())
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[6])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=weight)
    opset = [onnx.helper.make_opsetid("", 18)]
    model.functions.append(onnx.helper.make_function("own", "f", [], ["c"], [constant], opset))
    folder = genai_folder_of(tmp_path / "model", model__onnx=model.SerializeToString())
    assert "takes weights from '../secret', which is not in its folder" in refusal(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Logged models


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An sqlite store with a run open; gives its URI."""
    import mlflow

    folder = tmp_path_factory.mktemp("trust")
    uri = sqlite_store(folder)
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("trust", artifact_location=str(folder / "artifacts"))
    with mlflow.start_run(experiment_id=experiment):
        yield uri
    mlflow.set_tracking_uri(None)


@pytest.fixture
def logged(store, int4_export):
    """An ONNX model just logged: its URI, and its folder in the store."""
    info = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4")
    return info.model_uri, stored(info.model_id)


def stored(model_id: str) -> Path:
    import mlflow

    return Path(urlsplit(mlflow.get_logged_model(model_id).artifact_location).path)


def load(uri: str, folder: Path | None = None, trust_code: bool = False) -> loading.OwnModel | loading.OthersModel:
    """A model as `evaluate` loads it."""
    uri = registry.resolve(uri, trust_code)
    recorded = registry.recorded_manifests(uri)
    with registry.local_copy(uri) as found:
        return loading.load("model", uri, folder or found, {}, recorded, trust_code)


def refused(uri: str, **how) -> str:
    with pytest.raises(BadInput) as caught:
        load(uri, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, content: bytes | str) -> None:
    """Another file in the place of one: the cache's may be linked to what was there."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def fit_manifest(folder: Path) -> None:
    """The manifest that fits a folder, as somebody who may write there can make it."""
    written = json.loads((folder / manifest.NAME).read_text())
    (folder / manifest.NAME).unlink()
    manifest.write(folder, written["folder"], {})


def test_a_model_is_loaded_from_what_was_logged(logged):
    uri, folder = logged
    model = load(uri)
    assert model.facts.code_sha256 == wrappers.code_sha256(wrappers.logged_code(uri, folder))
    assert wrappers.own_code() == wrappers.logged_code(uri, folder)
    assert isinstance(model, loading.OwnModel) and isinstance(model.wrapper, chat_model.SmallLanguageModel)
    assert registry.recorded_manifests(uri) == (model.facts.manifest_sha256,)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *manifest.check(folder).files,
        *manifest.ADDED,
        manifest.NAME,
    }


def test_the_settings_that_are_logged_are_the_rebuilt_ones(logged, int4_export):
    text = (logged[1] / "artifacts" / "onnx" / genai_config.NAME).read_bytes()
    assert text == genai_config.rebuilt(genai_config.read(int4_export.folder))


def test_what_mlflow_adds_to_a_folder_changes_nothing(logged):
    uri, folder = logged
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "chat_model.cpython-311.pyc").write_bytes(b"never run")
    (folder / "registered_model_meta").write_text("model_name: x\nmodel_version: '1'\n")
    assert load(uri).wrapper is not None


CHANGED = "is missing or was changed since the model was logged"
ADDED = "was added since the model was logged"
TAMPERED = {
    "models: a wrapper that was edited": ("chat_model.py", CHANGED),
    "models: a part of the wrapper that was edited": ("chat_parts/sampling.py", CHANGED),
    "models: an MLmodel that was edited": ("MLmodel", CHANGED),
    "models: requirements that were edited": ("requirements.txt", CHANGED),
    "models: a chat template that was added": ("artifacts/onnx/chat_template2.jinja", ADDED),
    "models: a file that was added beside the weights": ("code/slm.py", ADDED),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.fault(name)) for name in TAMPERED])
@pytest.mark.parametrize("fitted", [False, True])
def test_a_logged_folder_that_was_changed_is_refused_with_its_manifest_rewritten_too(logged, name, fitted):
    uri, folder = logged
    path, line = TAMPERED[name]
    before = (folder / path).read_text() if (folder / path).exists() else ""
    (folder / path).parent.mkdir(exist_ok=True)
    rewrite(folder / path, f"{before}\n# more\n")
    if fitted:
        fit_manifest(folder)
        assert "differ from the logged files (manifest" in refused(uri)
    else:
        assert f"{path} {line}" in refused(uri)


@pytest.mark.fault("models: a logged file that is a link elsewhere")
def test_a_link_in_the_place_of_a_logged_file_is_refused(logged, tmp_path):
    uri, folder = logged
    path = folder / "artifacts" / "onnx" / "tokenizer.json"
    shutil.copy(path, tmp_path / "tokenizer.json")
    path.unlink()
    path.symlink_to(tmp_path / "tokenizer.json")
    assert f"artifacts/onnx/tokenizer.json {CHANGED}" in refused(uri)


@pytest.mark.fault("models: a model of a run that was changed and no longer says which model it is")
def test_a_model_named_by_its_run_has_the_files_that_the_server_recorded(logged):
    import mlflow

    uri, folder = logged
    model = mlflow.get_logged_model(uri.rpartition("/")[2])
    named = f"runs:/{model.source_run_id}/{model.name}"
    assert load(named).facts.manifest_sha256 == registry.recorded_manifests(uri)[0]
    description = yaml.safe_load((folder / "MLmodel").read_text())
    description.pop("model_id")
    rewrite(folder / "MLmodel", yaml.safe_dump(description))
    fit_manifest(folder)
    assert "differ from the logged files" in refused(named)


@pytest.mark.fault("registry: a version whose files are another model's")
def test_a_registered_version_keeps_the_manifest_of_its_own_files(store, int4_export, int8_export):
    for export, precision in ((int4_export, "int4"), (int8_export, "int8")):
        logged = model_logging.log_onnx(export, "chat", GENERATION, precision, registered_model_name="swapped")
        from slm.evaluation import scoring

        scoring.scored_uri(logged, export, "swapped", precision)
    first, second = (registry.recorded_manifests(f"models:/swapped/{version}") for version in (1, 2))
    assert len(first) == len(second) == 1 and first != second
    assert load("models:/swapped/1").facts.manifest_sha256 == first[0]
    folders = [stored(registry.version_source(f"models:/swapped/{version}").rpartition("/")[2]) for version in (1, 2)]
    shutil.rmtree(folders[0])
    shutil.copytree(folders[1], folders[0])
    assert "differ from the logged files" in refused("models:/swapped/1")


@pytest.mark.fault("models: kept answers of another model, claimed")
def test_a_description_that_names_another_models_weights_or_template_is_refused(store, logged):
    folder = logged[1]
    for name, value, line in (
        ("model.sha256", "0" * 64, "its weights differ from model.sha256 in its MLmodel"),
        ("chat_template", "{{ messages[0].content }}", "its chat template or tokens differ from those in its MLmodel"),
    ):
        copy = folder.parent / f"claims-{name}"
        shutil.copytree(folder, copy)
        description = yaml.safe_load((copy / "MLmodel").read_text())
        description["metadata"][name] = value
        description.pop("model_id")  # nobody recorded anything of it
        rewrite(copy / "MLmodel", yaml.safe_dump(description))
        fit_manifest(copy)
        assert line in refused(str(copy))


@pytest.mark.fault("models: a file that is exchanged between its check and its loading")
@pytest.mark.parametrize("restored", [False, True])
def test_what_is_loaded_is_what_was_checked(logged, monkeypatch, restored):
    uri, folder = logged
    path = folder / "artifacts" / "onnx" / "tokenizer.json"
    kept, checked = folder / "artifacts" / "onnx" / "kept", manifest.check

    def check_then_exchange(*given):
        found = checked(*given)
        path.rename(kept)
        path.write_bytes(kept.read_bytes() + b"\n")
        return found

    loaded = chat_model.SmallLanguageModel.load_context

    def load_then_restore(self, context):
        loaded(self, context)
        path.unlink()
        kept.rename(path)

    monkeypatch.setattr(manifest, "check", check_then_exchange)
    if restored:
        monkeypatch.setattr(chat_model.SmallLanguageModel, "load_context", load_then_restore)
        assert refused(uri).endswith("its files changed while it was loaded; stop what writes there, and try again")
    else:
        assert refused(uri)  # the second try finds a file more


@pytest.mark.fault("models: weights that are written while the model answers")
def test_no_answer_is_kept_of_a_model_that_was_changed_while_it_answered(logged, tmp_path, monkeypatch):
    from slm.answers import asking, kept_answers
    from slm.engines import answering
    from slm.prompts import prompt_sets

    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))
    uri, folder = logged
    model = load(uri)
    os.link(folder / "artifacts" / "onnx" / "model.onnx.data", tmp_path / "another link")
    model.check_unchanged()  # a link to a file is no change of it
    rewrite(folder / "artifacts" / "onnx" / "model.onnx.data", b"other weights")
    rows = tmp_path / "set.jsonl"
    rows.write_text('{"id": "a", "prompt": "Hi", "expected": "x"}\n')
    with pytest.raises(BadInput, match="its files were changed while it answered"):
        prompt_set = prompt_sets.read_prompt_set(rows, "set", CHECKS)
        asked = asking.questions(model, prompt_set.prompts, GENERATION, 1)
        answering.score(model, prompt_set, asked, GENERATION, "all")
    [kept] = (tmp_path / "cache" / "answers").glob("*.jsonl")
    assert kept_answers._read(kept) == []


@pytest.mark.usefixtures("all_cores")
@pytest.mark.fault("models: weights that are exchanged before a second session opens them")
def test_no_second_session_is_opened_over_other_weights(logged):
    _, folder = logged
    opened = load(logged[0])  # its files are there as long as it is
    runtime = opened.wrapper._runtime
    if runtime._threads == 1:
        pytest.skip("one core has one session")
    path = folder / "artifacts" / "onnx" / "model.onnx.data"
    content = path.read_bytes()
    rewrite(path, bytes([content[0] ^ 1]) + content[1:])
    assert runtime.lanes(1000) == [runtime]


@pytest.mark.usefixtures("all_cores")
def test_another_link_to_the_weights_does_not_keep_a_second_session_from_them(logged, tmp_path):
    _, folder = logged
    opened = load(logged[0])  # its files are there as long as it is
    runtime = opened.wrapper._runtime
    if runtime._threads == 1:
        pytest.skip("one core has one session")
    os.link(folder / "artifacts" / "onnx" / "model.onnx.data", tmp_path / "link")
    assert len(runtime.lanes(1000)) == runtime._threads


@pytest.mark.fault("models: a name that makes two lines of the manifest")
def test_a_file_whose_name_has_a_line_break_is_refused(logged):
    uri, folder = logged
    (folder / "a\nb").touch()
    assert r"'a\nb' is not the name of a file that this project logs" in refused(uri)


# ---------------------------------------------------------------------------------------------------------------------
# Code

CODE = """
from pathlib import Path
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

Path({marker!r}).touch()

class SmallLanguageModel(PythonModel):
    def predict(self, context, model_input, params=None):
        return ["ok" for _ in range(len(model_input))]

set_model(SmallLanguageModel())
"""


def log_code(folder: Path, **log) -> tuple[str, Path]:
    """A model with code of a stranger, logged and registered as `strange`; its URI, and what its code leaves."""
    import mlflow
    from support.python_models import signature

    marker, code = folder / "it-ran", folder / "code.py"
    code.write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    info = mlflow.pyfunc.log_model(
        name="strange",
        python_model=str(code),
        pip_requirements=[],
        signature=signature(("string", "prompt", True)),
        registered_model_name="strange",
        **log,
    )
    marker.unlink(missing_ok=True)  # MLflow runs it as it logs it
    return f"models:/strange/{info.registered_model_version}", marker


@pytest.mark.fault("registry: a version with code, in the process that moves the alias")
def test_code_of_others_runs_with_trust_code_alone(store, tmp_path):
    uri, marker = log_code(tmp_path)
    prompts = tmp_path / "set.jsonl"
    prompts.write_text('{"id": "a", "prompt": "x", "expected": "ok"}\n')
    options = [f"--model_uris={uri}", f"--prompts={prompts}", "--traces=false"]
    done = entry_point("evaluate", *options, MLFLOW_TRACKING_URI=store)
    assert (done.code, done.err) == (
        2,
        f"error: {uri} runs code that was logged with the model; set trust_code=true if you trust the code's author\n",
    )
    assert "Loading" not in done.out and not marker.exists()
    done = entry_point("evaluate", *options, "--trust_code=true", MLFLOW_TRACKING_URI=store)
    assert done.code == 0, done.err
    assert marker.exists()


def with_code(folder: Path, copy: Path, marker: Path, version: str) -> str:
    """A copy of a logged model that says it is of `version`, and whose wrapper leaves `marker`; the code's SHA-256."""
    shutil.copytree(folder, copy)
    own, model = copy / "chat_model.py", copy / "chat_parts" / "model.py"
    unbounded = "def render(*given):\n    raise SystemExit('it renders by itself')"
    rewrite(own, f"{own.read_text()}\nPath({str(marker)!r}).touch()\n")
    rewrite(model, f"{model.read_text()}\n{unbounded}\n")
    description = yaml.safe_load((copy / "MLmodel").read_text())
    description["metadata"]["wrapper"] = {"version": version, "sha256": "0" * 64}
    description.pop("model_id")
    rewrite(copy / "MLmodel", yaml.safe_dump(description))
    fit_manifest(copy)
    return wrappers.code_sha256(wrappers.logged_code(str(copy), copy))


@pytest.mark.fault("registry: code in a model that says it is of this project")
def test_a_model_of_this_version_is_run_by_the_repositorys_wrapper(logged, tmp_path):
    marker = tmp_path / "it-ran"
    with_code(logged[1], tmp_path / "model", marker, chat_model.VERSION)
    model = load(str(tmp_path / "model"))
    assert type(model.wrapper) is chat_model.SmallLanguageModel and not marker.exists()


@pytest.mark.fault("registry: a wrapper of no released version")
def test_a_wrapper_of_no_released_version_is_refused(logged, tmp_path, monkeypatch):
    marker = tmp_path / "it-ran"
    sha256 = with_code(logged[1], tmp_path / "model", marker, "0.0.9")
    line = f"{tmp_path}/model has a wrapper that is not from a released version of this project; log it again, or "
    assert refused(str(tmp_path / "model")) == line + wrappers.REMEDY
    assert not marker.exists()
    load(str(tmp_path / "model"), trust_code=True)
    assert marker.exists()
    monkeypatch.setitem(wrappers.RELEASED, "0.0.9", sha256)
    model = load(str(tmp_path / "model"))
    assert model.facts.code_sha256 == sha256
    [(_, [answer])] = model.wrapper.answers([{"messages": [{"role": "user", "content": "Hi"}]}], {"max_tokens": 2})
    assert answer.output_tokens == 2


@pytest.mark.fault("serving: a model whose files were changed")
def test_the_server_takes_no_model_that_was_changed(logged):
    from slm.serving import versions

    uri, folder = logged
    assert versions.load(uri).wrapper.name == "smollm2-135m-instruct"
    rewrite(folder / "chat_model.py", "raise SystemExit('it ran')\n")
    with pytest.raises(BadInput, match=f"chat_model.py {CHANGED}"):
        versions.load(uri)


def test_the_wrappers_version_is_the_projects_and_changes_once_it_was_released():
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == chat_model.VERSION
    assert wrappers.RELEASED.get(chat_model.VERSION, wrappers.own_sha256()) == wrappers.own_sha256()
    folder = REPOSITORY / "slm" / "models" / wrappers.PARTS
    assert {*wrappers.own_code()} == {"chat_model.py", *(f"chat_parts/{path.name}" for path in folder.glob("*.py"))}


@pytest.mark.fault("schedules: code of others")
def test_no_schedule_trusts_code():
    for path in sorted((REPOSITORY / "schedules").iterdir()):
        assert "trust_code" not in path.read_text(encoding="utf-8").replace("trust_code is left off", "")


@pytest.mark.fault("models: bytecode that was added to a trusted model")
def test_bytecode_in_a_models_folder_is_never_run(store, tmp_path, monkeypatch):
    import importlib.util
    import py_compile

    import mlflow

    monkeypatch.setattr(sys, "pycache_prefix", None)  # an earlier load may have set it
    uri, marker = log_code(tmp_path)
    folder = stored(registry.version_source(uri).rpartition("/")[2])
    [code] = folder.glob("*.py")
    other = tmp_path / "other.py"
    other.write_text(code.read_text().replace("it-ran", "other-ran"))
    cached = Path(importlib.util.cache_from_source(str(code)))
    cached.parent.mkdir(exist_ok=True)
    py_compile.compile(str(other), str(cached), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    mlflow.pyfunc.load_model(str(folder))
    assert (tmp_path / "other-ran").exists()  # as MLflow itself runs it
    (tmp_path / "other-ran").unlink()
    marker.unlink(missing_ok=True)
    load(uri, trust_code=True)
    assert marker.exists() and not (tmp_path / "other-ran").exists()


@pytest.mark.fault("models: settings that are exchanged while they are read")
def test_the_runtime_reads_settings_that_nobody_else_can_write(logged, monkeypatch):
    uri, folder = logged
    place, seen = folder / "artifacts" / "onnx", []

    def kept(self, context):
        seen.append(Path(context.artifacts["onnx"]))
        raise ValueError("far enough")

    monkeypatch.setattr(chat_model.SmallLanguageModel, "load_context", kept)
    assert refused(uri).endswith("can't be loaded: ValueError: far enough")
    [private] = seen
    assert private != place and not private.exists()  # it is gone with the model
    with wrappers._private(place, genai_config.read(place)) as name:
        settings = Path(name) / genai_config.NAME
        assert not settings.is_symlink() and settings.read_bytes() == genai_config.rebuilt(genai_config.read(place))
        assert Path(name).stat().st_mode & 0o777 == 0o700
        assert (Path(name) / "model.onnx").resolve() == (place / "model.onnx").resolve()


# ---------------------------------------------------------------------------------------------------------------------
# Promotion


@pytest.mark.fault("registry: an alias for files that were not scored")
def test_a_version_is_promoted_for_the_files_that_were_scored_alone(store, int4_export):
    import mlflow

    from slm.evaluation import promotion, scoring

    logged = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4", registered_model_name="promoted")
    uri = scoring.scored_uri(logged, int4_export, "promoted", "int4")
    [recorded] = registry.recorded_manifests(uri)
    client = mlflow.MlflowClient()
    with pytest.raises(Unavailable, match="isn't recorded to have the files that were scored"):
        promotion.promote(uri, "champion", "", "0" * 64)
    assert registry.alias_version("promoted", "champion") == ""
    promotion.promote(uri, "champion", "", recorded)
    assert registry.alias_version("promoted", "champion") == "1"
    client.set_model_version_tag("promoted", "1", manifest.TAG, "0" * 64)
    with pytest.raises(Unavailable, match="nothing was moved"):
        promotion.promote(uri, "other", "", recorded)


@pytest.mark.fault("registry: a version without a record of its files")
def test_a_version_that_nobody_recorded_is_not_promoted(store, tmp_path):
    from slm.evaluation import promotion

    uri, _ = log_code(tmp_path)
    assert registry.recorded_manifests(uri) == ()
    with pytest.raises(Unavailable, match="nothing was moved"):
        promotion.promote(uri, "champion", "", "0" * 64)
