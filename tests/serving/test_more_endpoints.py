"""/v1/completions, /tokenize, /detokenize and /v1/responses, through the openai client and by hand."""

import json
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest
from support.openai_servers import NAME, ask, content, here
from support.questions import PARIS

pytestmark = pytest.mark.slow
FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def model(wrapper):
    return wrapper.unwrap_python_model()


@pytest.fixture(scope="module")
def served(model):
    with here(model) as (address, client):
        yield address, client


@pytest.fixture
def client(served):
    return served[1]


def post(address: str, path: str, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
        return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def complete(client, prompt, **options):
    return client.completions.create(model=NAME, prompt=prompt, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Completions


def test_a_rendered_conversation_continues_as_the_chat_api_answers_it(client, model):
    answer = ask(client, PARIS, max_tokens=12)
    text = model.render(PARIS)
    for prompt in (text, model.token_ids(text)):
        done = complete(client, prompt, max_tokens=12)
        assert done.choices[0].text == content(answer)
        assert done.choices[0].finish_reason == answer.choices[0].finish_reason
        assert done.usage.total_tokens == answer.usage.total_tokens


def test_several_prompts_have_n_choices_each_in_their_order_whole_and_streamed(client):
    prompts, options = ["One two", "Monday Tuesday"], {"max_tokens": 4}
    alone = [complete(client, prompt, **options).choices[0].text for prompt in prompts]
    assert len(set(alone)) == 2
    for extra in ({}, {"temperature": 1e-6}):  # the second one draws each choice, always the likeliest token
        whole = complete(client, prompts, n=2, **options, **extra)
        assert [choice.text for choice in whole.choices] == [alone[0], alone[0], alone[1], alone[1]]
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        texts = [""] * 4
        *chunks, last = complete(
            client, prompts, n=2, stream=True, stream_options={"include_usage": True}, **options, **extra
        )
        for chunk in chunks:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [choice.text for choice in whole.choices]
        assert last.choices == [] and last.usage == whole.usage
        assert sorted(chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason) == [0, 1, 2, 3]


def test_no_token_is_generated_with_max_tokens_0(client):
    done = complete(client, FRANCE, max_tokens=0, echo=True)
    assert (done.choices[0].text, done.usage.completion_tokens) == (FRANCE, 0)


def test_an_echo_has_the_log_probabilities_of_the_prompts_tokens(client, model):
    ids = model.token_ids(FRANCE)
    [(_, scores)] = model.token_scores([(ids[:1], ids[1:])])
    found = complete(client, ids, max_tokens=1, echo=True, logprobs=2).choices[0].logprobs
    assert "".join(found.tokens[:-1]) == FRANCE
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert np.allclose(found.token_logprobs[1:-1], scores.log_probabilities, atol=1e-6)
    for place, likeliest in enumerate(scores.likeliest, 1):
        values = found.top_logprobs[place]
        assert (found.token_logprobs[place] == max(values.values())) == likeliest
        assert len(values) == 2 + (found.tokens[place] not in sorted(values, key=values.get)[-2:])
    assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())  # the greedy token
    for offset, token in zip(found.text_offset, found.tokens[:-1], strict=False):
        assert FRANCE[offset:].startswith(token)


def test_a_prompt_is_read_between_the_steps_of_an_answer(client, model, monkeypatch):
    """A long prompt whose log probabilities are computed does not stop the stream of another request."""
    monkeypatch.setattr(model._runtime, "_at_once", lambda span: 16)
    stream = ask(client, [{"role": "user", "content": "Count to fifty."}], stream=True, max_tokens=40)
    next(stream)
    reading, order = type(model._runtime)._run_piece, []
    step = type(model._runtime).next_logits

    def piece(self, *words):
        order.append("piece")
        return reading(self, *words)

    def next_logits(self, *words):
        order.append("step")
        return step(self, *words)

    monkeypatch.setattr(type(model._runtime), "_run_piece", piece)
    monkeypatch.setattr(type(model._runtime), "next_logits", next_logits)
    complete(client, "one two three four five " * 40, max_tokens=0, echo=True, logprobs=1)
    list(stream)
    between = order[order.index("piece") : len(order) - order[::-1].index("piece")]
    assert between.count("piece") > 8 and "piece,piece,piece" not in ",".join(between)


REFUSED = {
    "suffix": ({"suffix": "x"}, "suffix: text after the answer is not supported by this model"),
    "best_of": ({"best_of": 3}, "best_of: 3 is not supported by this model; use n"),
    "unknown": ({"extra_body": {"temprature": 1}}, "temprature: there is no such field (did you mean 'temperature'?)"),
    "nothing": ({"max_tokens": 0}, "max_tokens: 0 needs echo: true"),
    "cap": ({"max_tokens": 5000}, "max_tokens: 5000 is more than the 4096 allowed here"),
    "range": ({"temperature": 3}, "temperature must be a number from 0.0 to 2.0, got 3.0"),
    "no prompt": ({"prompt": []}, "prompt: must hold a text or token ids, got nothing"),
    "an empty prompt": ({"prompt": ["a", ""]}, "prompt: must hold a text or token ids, got nothing"),
    "many": ({"prompt": ["a"] * 65}, "prompt: 65 prompts; at most 64"),
    "id": ({"prompt": [49152]}, "prompt: token 49152 is not in the vocabulary, which has 49152 tokens"),
    "context": ({"prompt": [5] * 8192}, "the prompt has 8192 tokens; the context length is 8192"),
    "echo": ({"echo": True, "stream": True}, "echo: not supported in a stream"),
    "logprobs": ({"logprobs": 1, "stream": True}, "logprobs: not supported in a stream"),
    "usage": ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options: needs stream: true"),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_completion_that_is_not_served_is_refused_in_one_line(client, options, reason):
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, **({"prompt": "a"} | options))
    assert raised.value.body["message"] == reason


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def test_tokens_and_texts_are_each_others(served, model):
    address, _ = served
    for text in ("Hello world", "Größe 日本 🎉", "a\0b"):
        status, told = post(address, "/tokenize", {"prompt": text, "model": NAME})
        assert (status, told["tokens"]) == (200, model.token_ids(text))
        assert (told["count"], told["max_model_len"], told["token_strs"]) == (len(told["tokens"]), 8192, None)
        assert post(address, "/detokenize", {"tokens": told["tokens"]}) == (200, {"prompt": text})
    told = post(address, "/tokenize", {"prompt": "Hello world", "return_token_strs": True})[1]
    assert told["token_strs"] == ["Hello", " world"]
    told = post(address, "/tokenize", {"messages": PARIS})[1]
    assert told["tokens"] == model.prepare({"messages": PARIS})[0].prompt


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/tokenize", {}, "give either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": PARIS}, "give either prompt or messages"),
        ("/tokenize", {"messages": []}, "messages must hold at least one message"),
        ("/tokenize", {"prompt": "a", "return_token_str": True}, "return_token_str: there is no such field (did you"),
        ("/tokenize", {"messages": PARIS, "add_special_tokens": True}, "add_special_tokens: not with messages"),
        ("/tokenize", {"messages": PARIS, "add_generation_prompt": False}, "add_generation_prompt: false is not"),
        ("/detokenize", {"tokens": [-1]}, "tokens: token -1 is not in the vocabulary"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0: Input should be a valid integer"),
    ],
)
def test_a_request_for_tokens_that_makes_no_sense_is_refused(served, path, body, reason):
    status, told = post(served[0], path, body)
    assert status == 400 and told["error"]["message"].startswith(reason)


# ---------------------------------------------------------------------------------------------------------------------
# Responses


EVENTS = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
ENDS = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


@pytest.mark.parametrize(("max_tokens", "status"), [(20, "completed"), (1, "incomplete")])
def test_a_response_is_the_chat_apis_answer_whole_and_streamed(client, max_tokens, status):
    question = PARIS[0]["content"]
    system = [{"role": "system", "content": "Answer in one sentence."}]
    answer = ask(client, [*system, *PARIS], max_tokens=max_tokens)
    options = {"model": NAME, "instructions": system[0]["content"], "max_output_tokens": max_tokens}
    for given in (
        question,
        [{"role": "user", "content": question}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": question}]}],
    ):
        whole = client.responses.create(input=given, **options)
        assert (whole.output_text, whole.status) == (content(answer), status)
        assert whole.usage.total_tokens == answer.usage.total_tokens
    assert (whole.incomplete_details.reason if whole.incomplete_details else "") == (
        "max_output_tokens" if status == "incomplete" else ""
    )
    events = list(client.responses.create(input=question, stream=True, **options))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert [event.type for event in events] == [
        *EVENTS, *["response.output_text.delta"] * len(deltas), *ENDS, f"response.{status}"
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == whole.output_text and events[-1].response.usage == whole.usage
    if status == "completed":  # the client's own reader of the events wants no other end
        with client.responses.stream(input=question, **options) as stream:
            assert stream.get_final_response().output_text == whole.output_text


def test_a_conversation_goes_on_with_what_a_response_holds(client):
    first = client.responses.create(model=NAME, input=PARIS, max_output_tokens=20)
    turns = [*PARIS, *(item.model_dump() for item in first.output), {"role": "user", "content": "And of Italy?"}]
    second = client.responses.create(model=NAME, input=turns, max_output_tokens=8)
    told = [*PARIS, {"role": "assistant", "content": first.output_text}, turns[-1]]
    assert second.output_text == content(ask(client, told, max_tokens=8))


def test_a_response_keeps_to_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "city", "schema": schema, "strict": True}
    made = client.responses.create(model=NAME, input=PARIS, text={"format": form}, max_output_tokens=40)
    assert made.status == "completed" and list(json.loads(made.output_text)) == ["city"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: this server keeps no responses; send the whole"),
        ({"conversation": "conv_1"}, "conversation: this server keeps no responses"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: 'web_search' is not supported by this model"),
        ({"background": True}, "background: True is not supported by this model"),
        ({"reasoning": {"effort": "low"}}, "reasoning: {'effort': 'low'} is not supported by this model"),
        ({"include": ["x"]}, "include: ['x'] is not supported by this model"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type: 'item_reference' is not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content: only parts of text"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role: 'robot' is none of system"),
        ({"max_output_tokens": 0}, "max_output_tokens must be a whole number from 1 to 4096, got 0"),
        ({"extra_body": {"max_tokens": 3}}, "max_tokens: there is no such field (did you mean 'max_output_tokens'?)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_response_that_is_not_served_is_refused_in_one_line(client, options, reason):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            client.responses.create(**({"model": NAME, "input": "x", "stream": stream} | options))
        assert raised.value.body["message"].startswith(reason) and "\n" not in raised.value.body["message"]


def test_another_model_is_not_found_anywhere(served):
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        status, told = post(served[0], path, body | {"model": "gpt-4"})
        assert (status, told["error"]["code"]) == (404, "model_not_found")
