"""Which runtime answers for an ONNX GenAI folder: the choice, what refuses it, and where the answer is recorded."""

import json
from pathlib import Path

import pytest
from support.databases import sqlite_store
from support.token_ids import greedy

from slm.answers import loading
from slm.base.errors import BadInput
from slm.models import model_logging, onnx_export
from slm.models.chat_model import ONNX_RUNTIMES, onnx_runtime
from slm.models.chat_parts.genai_runtime import unsupported

GENERATION = {"max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}


def test_the_named_runtime_answers_and_both_give_the_same_tokens(fp32_export):
    prompts = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2], [1, 9690, 198]]
    found = {}
    for name in ("auto", *ONNX_RUNTIMES):
        runtime = onnx_runtime(fp32_export.folder, {"runtime": name})
        assert runtime.library == ("onnxruntime" if name == "auto" else name)
        found[name] = [greedy(runtime, [prompt], [8])[0] for prompt in prompts]
    assert found["onnxruntime"] == found["onnxruntime-genai"] == found["auto"]


def changed(folder: Path, target: Path, change) -> Path:
    """The folder, with another genai_config.json."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    content = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    change(content)
    (target / "genai_config.json").unlink()
    (target / "genai_config.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def of_decoder(**entries):
    return lambda content: content["model"]["decoder"].update(entries)


CHANGES = {
    "none": (lambda content: None, ""),
    "buffers are not shared": (
        lambda content: content["search"].update(past_present_share_buffer=False),
        "which has past_present_share_buffer false",
    ),
    "caches hold a window": (
        of_decoder(sliding_window={"window_size": 16, "layers": [0, 1]}),
        "whose caches hold a window of the context",
    ),
    "a window in no cache": (of_decoder(sliding_window={"window_size": 16, "layers": []}), ""),
    "a GPU": (of_decoder(session_options={"provider_options": [{"cuda": {}}]}), "which is for a GPU"),
    "another input": (of_decoder(inputs={"inputs_embeds": "inputs_embeds"}), "whose graph has other inputs"),
    "several graphs": (of_decoder(pipeline=[]), "which has several graphs"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_a_folder_that_onnxruntime_cant_run_is_refused_by_its_reason(int4_export, tmp_path, change, reason):
    folder = changed(int4_export.folder, tmp_path / "changed", change)
    assert unsupported(folder, {}) == reason
    if reason:
        with pytest.raises(ValueError, match=r"^runtime: onnxruntime can't run this folder, ") as refusal:
            onnx_runtime(folder, {"runtime": "onnxruntime"})
        assert str(refusal.value).endswith(f"{reason}; write runtime=onnxruntime-genai")


def test_an_export_for_a_gpu_can_be_run_by_the_providers_choice(int4_export):
    assert unsupported(int4_export.folder, {"execution_provider": "cuda"}) == "which is for a GPU"
    with pytest.raises(BadInput, match=r"^runtime: onnxruntime runs on the CPU here, not on cuda; leave runtime=auto$"):
        onnx_export.check("int4", "cuda", "onnxruntime")
    onnx_export.check("int4", "cuda", "onnxruntime-genai")


@pytest.fixture
def log(int4_export, tmp_path):
    """Logs the export with a runtime, and gives the URI and the folder."""
    import mlflow

    mlflow.set_tracking_uri(sqlite_store(tmp_path))
    experiment = mlflow.create_experiment("runtimes", artifact_location=str(tmp_path / "artifacts"))

    def logged(**generation) -> tuple[str, Path]:
        with mlflow.start_run(experiment_id=experiment):
            info = model_logging.log_onnx(int4_export, "chat", GENERATION | generation, "int4")
        return info.model_uri, Path(mlflow.artifacts.download_artifacts(info.model_uri))

    yield logged
    mlflow.set_tracking_uri(None)


def test_a_logged_model_keeps_its_runtime_and_a_caller_may_choose_another(log):
    import mlflow

    uri, folder = log(runtime="onnxruntime-genai")
    for chosen, expected in (("auto", "onnxruntime-genai"), ("onnxruntime", "onnxruntime")):
        model = loading.load("onnx", uri, folder, {"runtime": chosen})
        assert model.facts.record["model"]["runtime"] == expected
    plain = mlflow.pyfunc.load_model(uri, model_config={"runtime": "onnxruntime"}).unwrap_python_model()
    assert plain._runtime.library == "onnxruntime"


def test_a_model_from_before_the_choice_takes_no_other_runtime(log, monkeypatch):
    settings = {name: dict(entries) for name, entries in model_logging.SETTINGS.items()}
    del settings["onnx"]["runtime"]
    monkeypatch.setattr(model_logging, "SETTINGS", settings)
    uri, folder = log()
    assert loading.load("onnx", uri, folder, {"runtime": "auto"}).facts.record["model"]["runtime"] == "onnxruntime"
    with pytest.raises(BadInput, match="was logged before a runtime could be chosen; log it again, or leave runtime="):
        loading.load("onnx", uri, folder, {"runtime": "onnxruntime-genai"})
