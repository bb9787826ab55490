"""MLflow's own serving commands over the logged wrappers."""

import json
import os
import sys
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

import pytest
from support.commands import LINKS, call, free_port, mlflow_command, running_warm
from support.questions import PARIS, text

pytestmark = pytest.mark.slow

MANY_TURNS = [
    {"role": "assistant" if turn % 2 else "user", "content": f"Turn {turn}: say something about the number {turn}."}
    for turn in range(21)
]
# request -> what the answer must hold; one table for both wrappers, in process and served
REQUESTS = {
    "plain": ({}, {"finish_reason": "stop", "contains": "Paris"}),
    "cut at one token": ({"max_tokens": 1}, {"finish_reason": "length", "completion_tokens": 1}),
    "two choices": ({"n": 2, "max_tokens": 4}, {"choices": 2, "finish_reason": "length", "completion_tokens": 8}),
    "two stop strings": ({"stop": ["zzz", " Paris"]}, {"finish_reason": "stop", "lacks": "Paris"}),
    "seeded": ({"temperature": 1.0, "seed": 5, "max_tokens": 8}, {}),
    "unicode": (
        {"messages": [{"role": "user", "content": "Größe 日本語 🎉 \u0000 end"}], "max_tokens": 4},
        {"finish_reason": "length"},
    ),
    "twenty turns": ({"messages": MANY_TURNS, "max_tokens": 4}, {"finish_reason": "length"}),
}
REFUSED = {
    "empty conversation": ({"messages": []}, "messages must hold at least one message"),
    "messages are text": ({"messages": "hello"}, "messages"),
    "no messages": ({"prompt": "hello"}, "messages"),
    "negative temperature": ({"messages": PARIS, "temperature": -1.0}, "temperature must be a number from 0.0 to 2.0"),
    "no JSON": ("{", "valid JSON"),
}


@pytest.fixture(scope="module", params=["pipeline", "onnx int4"])
def served(request, logged, tmp_path_factory):
    """(wrapper, port) of a `mlflow models serve` over one logged model."""
    import mlflow

    folder = tmp_path_factory.mktemp("served")
    port = free_port()
    command = ["mlflow", "models", "serve", "-m", logged[request.param]]
    command += ["--port", str(port), "--host", "127.0.0.1", "--env-manager", "local"]
    with running_warm(
        command, f"http://127.0.0.1:{port}/ping", cwd=folder, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri()
    ):
        yield request.param, port


def invoke(port: int, payload) -> tuple[int, object]:
    body = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def check(completion: dict, expected: dict) -> None:
    assert completion["object"] == "chat.completion"
    assert set(completion) == {"id", "object", "created", "model", "choices", "usage"}
    choices, usage = completion["choices"], completion["usage"]
    assert len(choices) == expected.get("choices", 1)
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    if "finish_reason" in expected:
        assert {choice["finish_reason"] for choice in choices} == {expected["finish_reason"]}
    if "completion_tokens" in expected:
        assert usage["completion_tokens"] == expected["completion_tokens"]
    assert expected.get("contains", "") in text(completion)
    assert expected.get("lacks", "\0") not in text(completion)


@pytest.fixture(scope="module")
def here(models):
    """What a wrapper answers to a case of REQUESTS in this process. Each is asked once."""

    @cache
    def answered(name: str, case: str) -> dict:
        [completion] = models[name].predict({"messages": PARIS} | REQUESTS[case][0])
        return completion

    return answered


@pytest.mark.parametrize("name", ["pipeline", "onnx int4"])
@pytest.mark.parametrize("case", REQUESTS)
def test_the_chat_contract_holds_in_process(here, name, case):
    check(here(name, case), REQUESTS[case][1])


@pytest.mark.parametrize("case", REQUESTS)
def test_the_chat_contract_holds_served_with_the_same_text(served, here, case):
    name, port = served
    request, expected = REQUESTS[case]
    status, completion = invoke(port, {"messages": PARIS} | request)
    assert status == 200, completion
    check(completion, expected)
    assert completion["choices"] == here(name, case)["choices"]


@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_payload_is_refused_with_400_and_a_readable_message(served, case):
    payload, message = REFUSED[case]
    status, answer = invoke(served[1], payload)
    assert status == 400
    assert message in answer


def test_mlflow_models_predict_answers(logged, tmp_path):
    import mlflow

    (tmp_path / "input.json").write_text(json.dumps({"messages": PARIS}))
    done = mlflow_command(
        "models", "predict", "-m", logged["onnx int4"], "-i", "input.json", "--env-manager", "local",
        cwd=tmp_path, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri(),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "Paris" in done.out


@pytest.mark.parametrize("env_manager", ["local", "uv"])
def test_mlflow_models_predict_in_python_answers_in_the_environment_that_is_asked_for(logged, tmp_path, env_manager):
    import mlflow

    code = (
        "import sys, mlflow; mlflow.models.predict(sys.argv[1], input_data={'messages': [{'role': 'user', 'content':"
        " 'What is the capital of France?'}]}, output_path='out.json', env_manager=sys.argv[2])"
    )
    done = call(
        sys.executable, "-c", code, logged["onnx int4"], env_manager, cwd=tmp_path, timeout=900, **LINKS,
        MLFLOW_TRACKING_URI=mlflow.get_tracking_uri(),
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    assert "Paris" in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize(("name", "runtime"), [("pipeline", "transformers=="), ("onnx int4", "onnxruntime-genai==")])
def test_mlflow_models_generate_dockerfile_holds_the_model_and_its_requirements(logged, tmp_path, name, runtime):
    import mlflow

    done = mlflow_command(
        "models", "generate-dockerfile", "-m", logged[name], "-d", "image",
        cwd=tmp_path, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri(),
    )  # fmt: skip
    assert done.code == 0, done.err
    copied = [line.split() for line in (tmp_path / "image" / "Dockerfile").read_text().splitlines() if "COPY" in line]
    assert copied and all((tmp_path / "image" / source).exists() for _, source, _ in copied)
    [requirements] = list((tmp_path / "image").rglob("requirements.txt"))
    assert runtime in requirements.read_text()


def test_mlflow_models_build_docker_gives_the_engine_the_model_and_a_dockerfile(logged, tmp_path):
    """No engine is at hand: a program in its place keeps what MLflow asks of it."""
    import mlflow

    engine = tmp_path / "bin" / "docker"
    engine.parent.mkdir()
    engine.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nfor last; do :; done\nls "$last" >> {tmp_path}/context\n'
    )
    engine.chmod(0o755)
    done = call(
        "mlflow", "models", "build-docker", "-m", logged["onnx int4"], "-n", "phi3", cwd=tmp_path,
        MLFLOW_TRACKING_URI=mlflow.get_tracking_uri(), PATH=os.pathsep.join(
            [str(engine.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    assert "build -t phi3" in (tmp_path / "asked").read_text()
    assert {"Dockerfile", "model_dir"} <= set((tmp_path / "context").read_text().split())


@pytest.mark.parametrize("name", ["pipeline", "onnx int4"])
def test_concurrent_calls_from_threads_give_the_serial_answers(models, name):
    from concurrent.futures import ThreadPoolExecutor

    questions = [
        {"messages": [{"role": "user", "content": f"What is {number} plus {number}?"}], "max_tokens": 6}
        for number in range(6)
    ]

    def ask(question):
        return text(models[name].predict(question)[0])

    serial = [ask(question) for question in questions]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, questions)) == serial
