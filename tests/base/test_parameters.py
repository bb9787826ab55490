"""MLproject, argparse and the logged parameters are one thing; a mistake in one costs one line."""

import os
import subprocess
import sys

import pytest
import yaml
from support.commands import REPOSITORY, entry_point, in_process, without_gpu

from slm.base.errors import BadInput
from slm.base.parameters import ENTRY_POINTS, PARAMETERS, parse, stop_strings

PROJECT = yaml.safe_load((REPOSITORY / "MLproject").read_text(encoding="utf-8"))["entry_points"]


def as_text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name", [*ENTRY_POINTS, "main"])
def test_mlproject_and_argparse_have_the_same_names_and_defaults(name):
    declared = {key: as_text(entry["default"]) for key, entry in PROJECT[name]["parameters"].items()}
    module = "evaluate" if name == "main" else name
    assert declared == {key: as_text(value) for key, value in vars(parse(module, "", [])).items()}


@pytest.mark.parametrize("name", [*ENTRY_POINTS, "main"])
def test_every_declared_parameter_appears_in_its_command_unquoted(name):
    words = PROJECT[name]["command"].split()
    module = "evaluate" if name == "main" else name
    assert words[:3] == ["python", "-m", f"entrypoints.{module}"]
    assert words[3:] == [f"--{key}={{{key}}}" for key in PROJECT[name]["parameters"]]


def test_entry_point_files_fit_on_two_screens():
    for name in ENTRY_POINTS:
        assert len((REPOSITORY / "entrypoints" / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--promts=x", "promts: there is no such parameter; did you mean prompts?"),
        ("--foo_bar=3", "foo_bar: there is no such parameter"),
        ("--max_tokens=many", "max_tokens: 'many' is not a whole number"),
        ("--max_tokens=0", "max_tokens: 0 is out of range; 1 to 1.04858e+06"),
        ("--max_tokens=-1", "max_tokens: -1 is out of range; 1 to 1.04858e+06"),
        ("--temperature=nan", "temperature: nan is out of range; 0 to 2"),
        ("--temperature=inf", "temperature: inf is out of range; 0 to 2"),
        ("--top_p=0", "top_p: 0 is out of range; 1e-06 to 1"),
        ("--repeats=0", "repeats: 0 is out of range; 1 to 1000"),
        ("--resume=perhaps", "resume: 'perhaps' is neither true nor false"),
        ("--dtype=fp23", "dtype: 'fp23' is none of auto, fp32, bf16, fp16; did you mean fp32?"),
        ("--precision=int5", "precision: 'int5' is none of int4, int8, fp16, bf16, fp32; did you mean int8?"),
        ("--engine=sparc", "engine: 'sparc' is none of local, spark; did you mean spark?"),
    ],
)
def test_a_wrong_parameter_is_one_line(argument, line):
    with pytest.raises(BadInput) as raised:
        parse("evaluate", "", [argument])
    assert str(raised.value) == line


@pytest.mark.parametrize(
    ("given", "texts"),
    [("", []), ("\n", ["\n"]), ("[", ["["]), ('["a", "b"]', ["a", "b"]), ("[END]", ["[END]"])],
)
def test_stop_is_one_text_or_a_json_list(given, texts):
    assert stop_strings(given) == texts


def test_stop_refuses_a_list_of_something_else():
    with pytest.raises(BadInput, match="must be a list of non-empty texts"):
        stop_strings("[1]")


@without_gpu
@pytest.mark.parametrize(
    ("name", "option", "line"),
    [
        (
            "onnx",
            "--execution_provider=cuda",
            "execution_provider: 'cuda' needs an NVIDIA GPU, and nvidia-smi lists none",
        ),
        ("evaluate", "--execution_provider=cuda", "execution_provider: 'cuda' needs an NVIDIA GPU"),
        ("pipeline", "--device=cuda", "device: 'cuda' isn't there: torch 2."),
        ("evaluate", "--device=cuda:1", "device: 'cuda:1' isn't there: torch 2."),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line_before_anything_is_exported(tmp_path, name, option, line):
    done = in_process(name, option, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {line}") and done.err.count("\n") == 1
    assert not [*tmp_path.iterdir()]


@without_gpu
@pytest.mark.slow
def test_what_an_export_would_be_made_for_is_ignored_for_a_ready_folder(int4_export, tracking_server):
    options = ("--execution_provider=cuda", "--precision=fp32", "--max_tokens=1")
    done = entry_point("onnx", f"--model={int4_export.folder}", *options, MLFLOW_TRACKING_URI=tracking_server)
    assert done.code == 0 and "Exporting" not in done.out, done.out + done.err


@without_gpu
def test_a_gpu_without_the_cuda_builds_of_onnxruntime_is_one_line(tmp_path):
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'NVIDIA H200, 570.86.15, 143771 MiB'\n")
    listing.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = entry_point("onnx", "--execution_provider=cuda", PATH=path)
    line = "error: execution_provider: 'cuda' needs onnxruntime's CUDA builds; requirements-cuda.txt says how\n"
    assert (done.code, done.out, done.err) == (2, "", line)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_and_a_typo_answer_without_importing_anything_heavy(name):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{name}', '--help']\n"
        "try: runpy.run_module('entrypoints." + name + "', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'mlflow', 'torch', 'transformers', 'onnxruntime_genai', 'pandas', 'numpy', 'scipy', 'fastapi'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"--{parameter.name} " in done.stdout for parameter in PARAMETERS if name in parameter.entry_points)


@pytest.mark.parametrize(
    ("name", "option", "line"),
    [
        ("evaluate", "--promts=x", "error: promts: there is no such parameter; did you mean prompts?"),
        (
            "evaluate",
            "--prompts=nowhere.jsonl",
            "error: prompts: 'nowhere.jsonl' does not exist, from the repository's root or from here",
        ),
        (
            "pipeline",
            "--model=smollm2-135m",
            "error: model: 'smollm2-135m' was not found as an embedded name, a folder, a .gguf file or a hub id "
            "(org/name); "
            "did you mean smollm2-135m-instruct?",
        ),
        ("onnx", "--alias=champion", "error: alias: is a parameter of evaluate, not of onnx"),
        ("onnx", "--model=./nowhere", "error: model: ./nowhere does not exist"),
        ("onnx", "--precision=fp16", "error: precision: 'fp16' can't be exported for cpu; one of int4, int8, fp32"),
        ("evaluate", "--fields=question", "error: fields: 'question' is not theirs:ours; write question:prompt,"),
        (
            "pipeline",
            "--fields=question:promt",
            "error: fields: 'question:promt' names no field of a row (did you mean",
        ),
        ("onnx", "--fields=question:prompt", "error: fields: no row has 'question' for prompt; there are cluster, "),
        ("onnx", "--expected_pattern=(", "error: expected_pattern: '(' is not a regular expression: "),
        ("evaluate", "--expected_pattern=#### (.+)", "error: smoke.jsonl line "),
        ("pipeline", "--save_weights=false", "error: save_weights: false needs a hub id to refer to"),
        ("evaluate", "--thresholds=gone.yaml", "error: thresholds: 'gone.yaml' does not exist"),
        ("evaluate", "--scorers=exact", "error: scorers: 'exact' is no built-in scorer"),
        ("serve", "--port=5005", "error: model_uri: is empty; name a logged chat model, as models:/name@alias"),
        ("evaluate", "--alias=champion", "error: alias: needs a gate; add thresholds=gates/default.yaml"),
    ],
)
@pytest.mark.fault("parameters: a typo, one line and no run")
def test_bad_input_is_one_line_exit_2_and_no_run(tmp_path, name, option, line):
    done = in_process(name, option, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(line) and done.err.count("\n") == 1
    assert not (tmp_path / "mlflow.db").exists()
