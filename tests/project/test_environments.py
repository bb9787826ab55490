"""Environments: what a logged model asks for is enough to serve it, and the project's own file builds one."""

import re
import sys

import pytest
import yaml
from packaging.requirements import Requirement
from support.commands import LINKS, REPOSITORY, call

ASK = """
import sys, mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
answer = model.predict({"messages": [{"role": "user", "content": "What is the capital of France?"}]})
print(answer[0]["choices"][0]["message"]["content"])
"""


def pins(name: str) -> dict[str, str]:
    """Package -> version, of the lines that hold for this Python and platform."""
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        need.name: str(need.specifier).removeprefix("==")
        for need in parsed
        if not need.marker or need.marker.evaluate()
    }


def test_conda_yaml_is_python_pip_and_the_locked_requirements():
    content = yaml.safe_load((REPOSITORY / "conda.yaml").read_text(encoding="utf-8"))
    assert content["dependencies"] == [
        "python=3.11",
        "pip",
        {"pip": ["-r locked.txt"]},
    ]


def test_every_requirement_is_pinned_and_the_constraints_agree():
    constraints = {name.lower(): version for name, version in pins("constraints.txt").items()}
    for name, version in (pins("requirements.txt") | pins("requirements-test.txt")).items():
        assert constraints[name.split("[")[0]] == version


def test_what_is_installed_here_is_what_the_constraints_say():
    import importlib.metadata

    installed = {
        re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in importlib.metadata.distributions()
    }
    for name, version in pins("constraints.txt").items():
        if name in installed:
            assert installed[name].split("+")[0] == version, name


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "absent"), [("onnx", ["torch", "transformers"]), ("pipeline", [])])
def test_a_fresh_environment_with_only_the_logged_requirements_answers(
    tracking, checkpoint, int4_export, tmp_path, wrapper, absent
):
    from support.questions import GENERATION

    from slm.models import model_logging

    with tracking.start_run():
        if wrapper == "onnx":
            logged = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4")
        else:
            logged = model_logging.log_pipeline(checkpoint, GENERATION)
    folder = tracking.artifacts.download_artifacts(logged.model_uri)
    call(sys.executable, "-m", "uv", "venv", "-q", "--python", sys.executable, "fresh", cwd=tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    install = (sys.executable, "-m", "uv", "pip", "install", "-q", "--python", python, "-r", "requirements.txt")
    done = call(*install, cwd=folder, **LINKS)
    assert done.code == 0, done.err
    done = call(
        python, "-c", ASK, folder, cwd=tmp_path, PYTHONPATH="", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/other.db"
    )
    assert "Paris" in done.out, done.err
    assert "mismatch" not in done.err
    for name in absent:
        assert call(python, "-c", f"import {name}", cwd=tmp_path).code == 1


@pytest.mark.slow
def test_mlflow_run_builds_the_environment_with_uv_and_does_the_job(git_server, tmp_path):
    done = call(
        "mlflow",
        "run",
        git_server.url,
        "-e",
        "onnx",
        "--env-manager",
        "uv",
        "-P",
        "max_tokens=8",
        cwd=tmp_path,
        MLFLOW_ENV_ROOT=str(tmp_path / "envs"),
        MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db",
        **LINKS,
    )
    assert done.code == 0, done.err[-3000:]
    assert "score, over all (24)" in done.out
