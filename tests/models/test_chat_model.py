"""The two wrappers as logged and loaded through pyfunc: one contract, and in fp32 one text."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.commands import REPOSITORY
from support.effort import some
from support.questions import GENERATION, PARIS, some_questions, text

from slm.models import chat_model
from slm.models.chat_parts.fields import FIELDS
from slm.prompts.prompt_sets import read_prompt_set
from slm.scorers.confined import CHECKS

chat_wrappers = pytest.mark.parametrize("name", ["pipeline", "onnx int4"])


@pytest.mark.parametrize("name", ["pipeline", "onnx fp32"])  # int4's words depend on the CPU
def test_a_conversation_is_answered_with_one_openai_chat_completion(models, name):
    [completion] = models[name].predict({"messages": PARIS})
    assert completion["object"] == "chat.completion"
    assert completion["model"] == "smollm2-135m-instruct"
    [choice] = completion["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "stop" and choice["message"]["role"] == "assistant"
    assert "Paris" in choice["message"]["content"]
    usage = completion["usage"]
    assert usage["prompt_tokens"] == 37
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@chat_wrappers
def test_prompt_tokens_are_those_that_transformers_counts(models, checkpoint, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    conversation = [
        {"role": "system", "content": "Be brief."},
        *PARIS,
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Größe? 日本 🎉\n\nnext"},
    ]
    rendered = models[name].unwrap_python_model().render(conversation)
    assert rendered == tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    [completion] = models[name].predict({"messages": conversation, "max_tokens": 1})
    assert completion["usage"]["prompt_tokens"] == len(tokenizer(rendered, add_special_tokens=False)["input_ids"])


@chat_wrappers
def test_max_tokens_cuts_and_says_so(models, name):
    [completion] = models[name].predict({"messages": PARIS, "max_tokens": 1})
    assert completion["choices"][0]["finish_reason"] == "length"
    assert completion["usage"]["completion_tokens"] == 1


@chat_wrappers
def test_a_stop_string_ends_the_answer_and_is_stripped(models, name):
    [whole] = models[name].predict({"messages": PARIS})
    [cut] = models[name].predict({"messages": PARIS, "stop": ["of Fr", "never"]})
    assert text(cut) == text(whole).split("of Fr")[0]
    assert cut["choices"][0]["finish_reason"] == "stop"


@chat_wrappers
def test_n_choices_differ_by_seed_and_the_same_seed_gives_the_same_text(models, name):
    question = {"messages": PARIS, "temperature": 1.5, "n": 3, "seed": 11, "max_tokens": 12}
    [first], [again] = models[name].predict(question), models[name].predict(question)
    contents = [choice["message"]["content"] for choice in first["choices"]]
    assert contents == [choice["message"]["content"] for choice in again["choices"]]
    assert len(set(contents)) > 1
    [other] = models[name].predict(question | {"seed": 12, "n": 1})
    assert text(other) == contents[1]  # choice k of seed s is choice 0 of seed s + k


@chat_wrappers
def test_parameters_hold_per_row_and_answers_keep_their_order(models, name):
    table = pd.DataFrame(
        {"messages": [PARIS, [{"role": "user", "content": "Say hello."}], PARIS], "max_tokens": [1, 3, 64]}
    )
    answers = models[name].predict(table)
    assert [answer["usage"]["completion_tokens"] for answer in answers][:2] == [1, 3]
    assert text(answers[2]) == text(models[name].predict({"messages": PARIS, "max_tokens": 64})[0])


@chat_wrappers
@pytest.mark.fault("prompt sets: a row over the context length")
def test_a_row_that_cannot_be_answered_fails_alone(models, name):
    long = [{"role": "user", "content": "word " * 9000}]
    good, empty, over = models[name].predict([{"messages": PARIS}, {"messages": []}, {"messages": long}])
    assert "Paris" in text(good)
    assert empty["choices"][0]["finish_reason"] == over["choices"][0]["finish_reason"] == "error"
    assert empty["error"]["message"] == "messages must hold at least one message, got an empty conversation"
    assert "the context length is 8192" in over["error"]["message"]


@chat_wrappers
@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"temperature": -1.0}, "temperature must be a number from 0.0 to 2.0, got -1.0"),
        ({"temperature": float("inf")}, "temperature must be a number from 0.0 to 2.0, got inf"),
        ({"top_p": 0.0}, "top_p must be a number from 1e-06 to 1.0, got 0.0"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 1048576, got 0"),
        ({"n": 17}, "n must be a whole number from 1 to 16, got 17"),
        ({"stop": [""]}, "stop must hold non-empty strings, got ['']"),
        ({"presence_penalty": 3}, "presence_penalty must be a number from -2.0 to 2.0, got 3"),
        ({"tools": [{"type": "function"}]}, "tools[0] must have the type 'function' and a function"),
        ({"stream": True}, "call predict_stream instead"),
    ],
)
def test_what_the_model_does_not_do_is_refused_with_a_reason(models, name, extra, reason):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException) as raised:
        models[name].predict({"messages": PARIS} | extra)
    assert reason in str(raised.value)
    assert raised.value.get_http_status_code() == 400


@chat_wrappers
def test_a_stream_says_the_same_as_the_whole_answer(models, name):
    question = {"messages": PARIS, "stop": ["of France"], "max_tokens": 20}
    [whole] = models[name].predict(question)
    chunks = list(models[name].predict_stream(question))
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == text(whole)
    assert len(chunks) > 3
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


@pytest.mark.parametrize("name", ["pipeline", "onnx fp32", "onnx int8", "onnx int4"])
def test_batched_greedy_text_equals_one_by_one(models, name):
    wrapper = models[name].unwrap_python_model()
    questions = some_questions(6)
    batched = {index: answer for index, [answer] in wrapper.answers(questions, batch_size=4)}
    for index, question in enumerate(questions):
        [(_, [alone])] = wrapper.answers([question], batch_size=1)
        assert batched[index].text == alone.text
        assert batched[index].output_tokens == alone.output_tokens


def test_the_pipeline_gives_the_text_that_transformers_generate_gives(models, checkpoint):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    wrapper = models["pipeline"].unwrap_python_model()
    questions = some_questions(6)
    for index, [answer] in wrapper.answers(questions):
        ids = tokenizer.apply_chat_template(
            questions[index]["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, max_new_tokens=24, do_sample=False)
        expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.text == expected


@pytest.mark.slow
def test_in_fp32_both_wrappers_give_the_same_greedy_text(models):
    prompt_set = read_prompt_set(REPOSITORY / "prompts" / "general.jsonl", "", CHECKS)
    prompts = some(prompt_set.prompts[:150], 25)
    rows = [{"messages": list(prompt.messages), "max_tokens": 24} for prompt in prompts]
    ours, theirs = models["pipeline"].predict(rows), models["onnx fp32"].predict(rows)
    differ = [prompt.id for prompt, a, b in zip(prompts, ours, theirs, strict=True) if text(a) != text(b)]
    assert differ == []


def test_the_prompt_schema_is_one_string_in_and_one_out(models):
    model = models["onnx prompt"]
    assert json.loads(model.metadata.signature.to_dict()["inputs"]) == [
        {"type": "string", "name": "prompt", "required": True}
    ]
    prompt = model.unwrap_python_model().render(PARIS)
    [single] = model.predict({"prompt": prompt})
    assert "Paris" in single
    assert model.predict([{"prompt": prompt}, {"prompt": "2"}])[0] == single
    assert model.predict(pd.DataFrame({"prompt": [prompt, prompt]})) == [single, single]
    assert model.predict({"prompt": [prompt, prompt]}) == [single, single]
    assert model.predict(pd.DataFrame({"prompt": ["", prompt]})) == [None, single]
    assert "".join(model.predict_stream({"prompt": prompt})) == single
    assert len(model.predict({"prompt": prompt}, params={"max_tokens": 2})[0]) < len(single)


def test_a_rendered_conversation_reaches_the_prompt_model_as_the_chat_model_gets_it(models):
    prompt = models["onnx prompt"].unwrap_python_model().render(PARIS)
    [completion] = models["onnx int4"].predict({"messages": PARIS})
    assert models["onnx prompt"].predict({"prompt": prompt}) == [text(completion)]


def test_the_chat_template_travels_in_the_metadata(models):
    from slm.models.chat_model import render

    model = models["onnx prompt"]
    facts = model.metadata.metadata
    assert render(facts["chat_template"], facts["special_tokens"], PARIS) == model.unwrap_python_model().render(PARIS)


def test_a_nul_character_does_not_cut_the_prompt(models):
    wrapper = models["onnx prompt"].unwrap_python_model()
    [(_, [answer])] = wrapper.answers([{"prompt": "one\0two", "max_tokens": 1}])
    [(_, [shorter])] = wrapper.answers([{"prompt": "one", "max_tokens": 1}])
    assert answer.prompt_tokens > shorter.prompt_tokens


@pytest.mark.parametrize("name", ["pipeline", "onnx int4"])
def test_both_wrappers_have_the_same_chat_signature(models, name):
    from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA

    signature = models[name].metadata.signature
    names = signature.inputs.input_names()
    assert {*CHAT_MODEL_INPUT_SCHEMA.input_names(), "seed", "response_format", "tool_choice"} <= set(names)
    assert [column.name for column in signature.inputs if column.required] == ["messages"]
    assert signature.outputs == CHAT_MODEL_OUTPUT_SCHEMA
    assert [param.name for param in signature.params] == [entry.name for entry in FIELDS if entry.parameter]
    assert {"max_tokens", "temperature", "top_p", "seed", "stop"} <= {param.name for param in signature.params}
    assert models[name].metadata.metadata["task"] == "llm/v1/chat"


def test_the_transformers_flavor_loads_the_pipeline(logged):
    import mlflow

    pipeline = mlflow.transformers.load_model(logged["pipeline"])
    assert type(pipeline).__name__ == "TextGenerationPipeline"
    [answer] = pipeline(PARIS, max_new_tokens=12, do_sample=False)
    assert "Paris" in answer["generated_text"][-1]["content"]
    [plain] = pipeline("The capital of France is", max_new_tokens=5, do_sample=False, return_full_text=False)
    assert "Paris" in plain["generated_text"]  # task text-generation: a prompt as it stands


def stored(uri: str) -> Path:
    """A logged model's folder in a store on this machine."""
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(uri))


def test_a_store_beside_the_cache_shares_its_weights_and_nothing_else(logged, checkpoint, int4_export):
    for name, place, source, weights in (
        ("pipeline", "model", checkpoint, "model.safetensors"),
        ("onnx int4", "artifacts/onnx", int4_export, "model.onnx.data"),
    ):
        folder = stored(logged[name]) / place
        assert {path.name for path in folder.iterdir()} == source.manifest.keys()
        one_disk = folder.stat().st_dev == source.folder.stat().st_dev
        for path in folder.iterdir():
            assert path.samefile(source.folder / path.name) == (path.name == weights and one_disk)
            assert not path.is_symlink()


def test_a_users_weights_are_copied_so_that_training_on_changes_no_logged_model(logged, checkpoint, tmp_path):
    import shutil

    import mlflow

    from slm.base import cache
    from slm.models import checkpoints, manifest, model_logging

    shutil.copytree(checkpoint.folder, tmp_path / "mine")
    mine = checkpoints.find(str(tmp_path / "mine")).fetch()
    with mlflow.start_run(mlflow.get_logged_model(logged["pipeline"].rpartition("/")[2]).source_run_id):
        folder = stored(model_logging.log_pipeline(mine, GENERATION).model_uri)
    with (mine.folder / "model.safetensors").open("r+b") as file:
        file.write(bytes(100))
    assert cache.manifest_sha256(manifest.check(folder).weights) == checkpoint.sha256


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_linked_where_that_can_be_and_copied_where_it_cannot(tmp_path, monkeypatch, links):
    from slm.base import cache

    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))
    made, _ = cache.folder("one-1.5", {}, lambda folder: (folder / "model.safetensors").touch())
    if not links:  # as between file systems
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
        monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(18, "the same")))
    blob = f"hub/blobs/{'0a' * 32}"
    content = os.urandom(3_000_001)
    for place, linked in (
        (f"cache/{made.name}/model.safetensors", links),
        (f"cache/{made.name}/tokenizer.json", False),
        ("cache/mine/model.safetensors", False),  # a user's, below the cache's root
        ("cache/model.safetensors", False),
        (blob, links),
        ("hub/blobs/41f3", False),
        ("mine/model.safetensors", False),
    ):
        source, target = tmp_path / place, tmp_path / "store" / place
        source.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(content)
        cache.place(source, target)
        assert target.read_bytes() == content
        assert target.samefile(source) == linked
    with pytest.raises(FileExistsError):  # and never written into
        cache.place(tmp_path / "mine/model.safetensors", tmp_path / "store/cache/mine/model.safetensors")
    (tmp_path / "snapshot.safetensors").symlink_to(tmp_path / blob)  # as the hub's cache names its blobs
    cache.place(tmp_path / "snapshot.safetensors", tmp_path / "store" / "model.safetensors")
    assert (tmp_path / "store" / "model.safetensors").samefile(tmp_path / blob) == links


@pytest.mark.parametrize("registry", ["databricks-uc", "uc:http://127.0.0.1:1"])
def test_a_version_in_unity_catalog_is_made_of_a_folder_that_holds_the_weights(tmp_path, monkeypatch, registry):
    from slm.models import model_logging

    assert model_logging._store_here(str(tmp_path)) == tmp_path
    assert model_logging._store_here("s3://bucket/0/models/m-1/artifacts") is None
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    assert model_logging._store_here(str(tmp_path)) is None


def test_a_weight_file_that_was_changed_is_noticed(logged, tmp_path):
    import shutil

    from slm.models import manifest

    folder = tmp_path / "model"
    shutil.copytree(stored(logged["onnx int4"]), folder)
    manifest.check(folder)
    weights = folder / "artifacts" / "onnx" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"artifacts/onnx/model.onnx.data is missing or was changed"):
        manifest.check(folder)


def test_nucleus_sampling_draws_what_the_probabilities_say():
    from scipy.stats import chisquare

    from slm.models.chat_model import Sampling, sample

    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    sampling = Sampling(max_tokens=1, temperature=1.0, top_p=0.9, seed=0, stop=(), n=1)
    drawn = np.bincount([sample(np.log(probabilities), sampling, seed, 0) for seed in range(4000)], minlength=4)
    assert drawn[3] == 0  # outside the nucleus: 0.5 + 0.3 + 0.15 reach 0.9
    kept = probabilities[:3] / probabilities[:3].sum()
    assert chisquare(drawn[:3], kept * 4000).pvalue > 0.001


def test_a_stop_that_is_no_text_is_refused():
    with pytest.raises(chat_model.Refused, match="stop must hold non-empty strings, got \\[5\\]"):
        chat_model.checked({"stop": 5})


@pytest.mark.parametrize(("text", "stop", "size"), [("ab<", "<end>", 1), ("ab", "<end>", 0), ("<en", "<end>", 3)])
def test_what_may_become_a_stop_string_is_held_back(text, stop, size):
    from slm.models.chat_parts.generation import _overlap

    assert _overlap(text, stop) == size


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("onnx int4", {"execution_provider": "abacus"}),
        ("pipeline", {"device": "abacus"}),
        ("pipeline", {"dtype": "f7"}),
    ],
)
def test_what_a_model_runs_on_may_be_changed_where_it_is_loaded(logged, name, wrong):
    import mlflow

    loaded = mlflow.pyfunc.load_model(logged[name], model_config={"batch_size": 3, "threads": 2})
    assert loaded.unwrap_python_model().batch_size == 3
    [completion] = loaded.predict({"messages": PARIS})
    assert "Paris" in text(completion)
    with pytest.raises(Exception, match=r"(?i)abacus|f7"):
        mlflow.pyfunc.load_model(logged[name], model_config=wrong)


@pytest.mark.slow
@chat_wrappers
def test_memory_stays_flat_over_calls(models, name):
    from benchmarks.memory import growth_bytes

    # a leak grows every time; the keys and values of one call take about 2 MB
    assert any(growth_bytes(models[name], calls=25, first=5) < 8e6 for _ in range(3))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("Phi-3.5-mini", "onnx", "int4"), "Phi-3-5-mini-onnx-int4"),
        (("Phi-3.5-mini", "pipeline"), "Phi-3-5-mini-pipeline"),
        (("phi-3", "onnx", "as given"), "phi-3-onnx"),  # a ready folder
        (('50 % "off":it\'s/a\nname', "onnx", "fp32"), "50-off-it-s-a-name-onnx-fp32"),
        (("x" * 500, "pipeline"), "x" * 100 + "-pipeline"),
    ],
)
def test_a_logged_model_is_named_by_checkpoint_form_and_precision(words, named):
    from mlflow.utils.validation import _validate_logged_model_name

    from slm.models import model_logging

    assert model_logging.logged_name(*words) == named
    _validate_logged_model_name(named)
