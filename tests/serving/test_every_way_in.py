"""One table of requests, each through every way in: predict, predict_stream, MLflow's /invocations, and `serve`.

MLflow's scoring server and `serve` run in this process, as the applications that their commands start.
"""

import json

import pytest
from support.questions import PARIS
from support.schemas import SCHEMAS

CITY = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMAS["a judge with a score"]}}
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of it?"}]}
]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FINE = {  # request -> (finish reason, what else holds)
    "nothing else": ({}, "length"),
    "max_completion_tokens": ({"max_completion_tokens": 1, "max_tokens": 9}, "length"),
    "temperature": ({"temperature": 1, "seed": 3}, None),
    "top_p": ({"temperature": 1.0, "top_p": 0.5, "seed": 3}, None),
    "top_k": ({"temperature": 1, "top_k": 1}, "length"),
    "top_k, all": ({"temperature": 1, "top_k": -1, "seed": 1}, None),
    "min_p": ({"temperature": 1, "min_p": 1}, "length"),
    "stop": ({"stop": [" capital"]}, "stop"),
    "n": ({"n": 2, "temperature": 1.2, "seed": 4}, None),
    "n, greedy": ({"n": 3}, "length"),
    "frequency_penalty": ({"frequency_penalty": 2}, None),
    "presence_penalty": ({"presence_penalty": -1.5}, None),
    "repetition_penalty": ({"repetition_penalty": 1.3}, None),
    "logit_bias": ({"logit_bias": {"504": -100}}, None),
    "logprobs": ({"logprobs": True}, "length"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 2}, "length"),
    "json_object": ({"response_format": {"type": "json_object"}}, None),
    "json_schema": ({"response_format": CITY, "max_tokens": 60}, "stop"),
    "text": ({"response_format": {"type": "text"}}, "length"),
    "parts": ({"messages": PARTS}, None),
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, *PARIS]}, None),
    "a tool's answer": ({"messages": [*PARIS, {"role": "tool", "tool_call_id": "c", "content": "Paris"}]}, None),
    "empty entries": ({"messages": [PARIS[0] | {"tool_calls": [], "refusal": None}]}, "length"),
    "no tools": ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, "length"),
    "labels": ({"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}, "length"),
    "nulls": ({"seed": None, "logit_bias": None, "tools": None, "response_format": None}, "length"),
}
REFUSED = {  # request -> the line
    "near miss": ({"max_token": 3}, "max_token: there is no such field (did you mean 'max_tokens'?)"),
    "unknown": ({"beams": 3}, "beams: there is no such field"),
    "temperature, type": ({"temperature": [1]}, "temperature"),
    "temperature": ({"temperature": 2.5}, "temperature must be a number from 0.0 to 2.0, got 2.5"),
    "top_p": ({"top_p": 1.5}, "top_p must be a number from 1e-06 to 1.0, got 1.5"),
    "top_k": ({"top_k": -2}, "top_k must be a whole number from -1 to 1048576, got -2"),
    "min_p": ({"min_p": 1.5}, "min_p must be a number from 0.0 to 1.0, got 1.5"),
    "frequency_penalty": ({"frequency_penalty": 2.5}, "frequency_penalty must be a number from -2.0 to 2.0, got 2.5"),
    "presence_penalty": ({"presence_penalty": -3}, "presence_penalty must be a number from -2.0 to 2.0, got -3"),
    "repetition_penalty": (
        {"repetition_penalty": 0.0},
        "repetition_penalty must be a number from 0.01 to 10.0, got 0.0",
    ),
    "max_completion_tokens": ({"max_completion_tokens": 0}, "max_completion_tokens must be a whole number from 1"),
    "n": ({"n": 17}, "n must be a whole number from 1 to 16, got 17"),
    "stop": ({"stop": [""]}, "stop must hold non-empty strings, got ['']"),
    "logit_bias, token": ({"logit_bias": {"Paris": 1}}, "logit_bias: 'Paris' is not a token id"),
    "logit_bias, size": ({"logit_bias": {"5": 200}}, "logit_bias: 5 must have a number from -100 to 100, got 200"),
    "logit_bias, vocabulary": ({"logit_bias": {"99999": 1}}, "logit_bias: token 99999 is not in the vocabulary"),
    "logprobs": ({"logprobs": 3}, "logprobs must be true or false, got 3"),
    "top_logprobs alone": ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
    "top_logprobs": (
        {"logprobs": True, "top_logprobs": 30},
        "top_logprobs must be a whole number from 0 to 20, got 30",
    ),
    "response_format": (
        {"response_format": {"type": "xml"}},
        "response_format.type: 'xml' is none of text, json_object",
    ),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        'response_format: the schema can\'t be used: Unimplemented keys: ["not"]',
    ),
    "no schema": (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema.schema must be a JSON schema",
    ),
    "stream_options": ({"stream_options": {"usage": True}}, "stream"),
    "audio": ({"audio": {"voice": "x"}}, "audio: {'voice': 'x'} is not supported by this model: answers are text"),
    "modalities": ({"modalities": ["audio"]}, "modalities: ['audio'] is not supported by this model: answers are text"),
    "reasoning_effort": ({"reasoning_effort": "high"}, "reasoning_effort: 'high' is not supported by this model"),
    "prediction": ({"prediction": {"content": "x"}}, "prediction: {'content': 'x'} is not supported by this model"),
    "web_search_options": ({"web_search_options": {"a": 1}}, "web_search_options: {'a': 1} is not supported"),
    "custom_inputs": ({"custom_inputs": {"a": 1}}, "custom_inputs: {'a': 1} is not supported by this model"),
    "user": ({"user": 5}, "user must be text, got 5"),
    "role": ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role: 'narrator' is none of"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content: only parts of text, not 'image_url'",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0] must have a content"),
    "tool without a call": (
        {"messages": [*PARIS, {"role": "tool", "content": "x"}]},
        "messages[1].tool_call_id is missing",
    ),
    "lost calls": (
        {"messages": [*PARIS, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        "tools: the model's chat template ignores tools; ask without tools and calls, or use another model",
    ),
    "a misspelled entry": ({"messages": [PARIS[0] | {"nme": "x"}]}, "messages[0].nme is not supported"),
    "an empty conversation": ({"messages": []}, "messages must hold at least one message, got an empty conversation"),
}
pytestmark = pytest.mark.slow
SERVING = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"
WAYS = ("predict", "predict_stream", "/invocations", "serve", "serve, streamed")


@pytest.fixture(scope="module", params=["pipeline", "onnx fp32"])
def asked(request, models):
    """A function: (way in, request) -> (completion, "") or (None, the reason of a refusal)."""
    import mlflow.pyfunc.scoring_server as scoring_server
    from fastapi.testclient import TestClient
    from mlflow.exceptions import MlflowException

    from slm.serving import http_app, versions

    model = models[request.param]
    wrapper = model.unwrap_python_model()
    name = wrapper.name
    app = http_app.build(versions.Loaded(wrapper, {}, (wrapper.name,), ""))
    served = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SERVING, "true")  # so that what MLflow sets is undone here
        patch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "600")  # a busy machine takes more than the usual 60 s
        scoring = TestClient(scoring_server.init(model), raise_server_exceptions=False)

    def ask(way, fields):
        body = {"messages": PARIS, "max_tokens": 3} | fields
        if way == "/invocations":
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(SERVING, "true")
                reply = scoring.post("/invocations", json=body)
            return (reply.json(), "") if reply.status_code == 200 else (None, reply.json()["message"])
        if way.startswith("serve"):
            streamed = {"stream": True} if "streamed" in way else {}
            reply = served.post("/v1/chat/completions", json=body | streamed)
            if reply.status_code != 200:
                assert reply.status_code == 400
                return None, reply.json()["error"]["message"]
            if not streamed:
                return reply.json(), ""
            lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
            assert lines.pop() == "[DONE]"
            return joined([json.loads(line) for line in lines]), ""
        try:
            if way == "predict":
                return model.predict(body)[0], ""
            return joined(list(model.predict_stream(body | {"stream": True}))), ""
        except MlflowException as refused:
            return None, str(refused)

    with served:
        yield ask
    wrapper.name = name


def joined(chunks: list[dict]) -> dict:
    """The completion that a stream's chunks make."""
    choices: dict[int, dict] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"index": part["index"], "message": {"content": ""}})
            choice["message"]["content"] += part["delta"].get("content", "")
            if part["finish_reason"]:
                choice["finish_reason"] = part["finish_reason"]
            for entry in (part.get("logprobs") or {"content": []})["content"]:
                choice.setdefault("logprobs", {"content": []})["content"].append(entry)
    return {"choices": [choices[index] for index in sorted(choices)]}


@pytest.mark.parametrize("case", FINE)
def test_a_field_is_honoured_alike_on_every_way_in(asked, case):
    fields, finish_reason = FINE[case]
    found = {}
    for way in WAYS:
        completion, reason = asked(way, fields)
        assert completion, (way, reason)
        choices = completion["choices"]
        assert len(choices) == fields.get("n", 1), way
        assert finish_reason in (None, choices[0]["finish_reason"]), way
        assert ("logprobs" in choices[0]) == bool(fields.get("logprobs")), way
        found[way] = [
            (
                choice["message"]["content"],
                choice["finish_reason"],
                [entry["token"] for entry in choice.get("logprobs", {}).get("content", [])],
            )
            for choice in choices
        ]
    assert all(choices == found["predict"] for choices in found.values()), found


@pytest.mark.parametrize("case", REFUSED)
def test_a_field_is_refused_alike_on_every_way_in(asked, case):
    fields, expected = REFUSED[case]
    for way in WAYS:
        completion, reason = asked(way, fields)
        assert completion is None, way
        assert expected in reason, way


def test_there_are_sixty_requests():
    assert len(FINE) + len(REFUSED) >= 60
