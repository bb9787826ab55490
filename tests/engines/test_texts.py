"""The perplexity of texts: held against transformers' forward pass and lm-evaluation-harness's windows."""

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
from support.damage import not_a_number
from support.scored import prompts, report, scored

from slm.base import parameters
from slm.base.errors import BadInput
from slm.engines import distributions, texts
from slm.evaluation import requests
from slm.prompts.texts import Document, TextSet, read_texts
from slm.report import summary
from slm.verdict import gate, perplexity
from slm.verdict.perplexity import TextScores

FACTS = {"sha256": "0" * 64, "uri": "m", "identity": "m", "is_chat": True, "label": "m"}
SET = TextSet(
    "weather",
    (
        Document("line 1", "The rain fell on the roof of the house, and the wind was cold. " * 4),
        Document("line 2", "The capital of France is Paris. The capital of Italy is Rome."),
        Document("line 3", "Two plus two is four, and four plus four is eight.", "sums"),
    ),
    "0" * 64,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def own(models):
    from slm.answers import loading

    def opened(name):
        facts = types.SimpleNamespace(**FACTS | {"identity": name})
        return loading.OwnModel(facts, models[name].unwrap_python_model(), 0.0, lambda: None)

    return {name: opened(name) for name in ("pipeline", "onnx fp32", "onnx int4")}


def measured(model, reuse="none", reference=None, is_baseline=False, text_set=SET):
    return texts.measured(model, text_set, {}, reuse, reference, is_baseline)


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 15, 40])
def test_the_windows_are_those_of_the_harness(count):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(100, 100 + count))
    theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 5, 7, 1)]
    assert list(texts.windows(5, ids, 8)) == theirs
    assert [token for _, continuation in theirs for token in continuation] == ids


@pytest.mark.parametrize(("name", "close"), [("pipeline", 1e-4), ("onnx fp32", 1e-3)])
@pytest.mark.parametrize("window", [texts.WINDOW, 16])
def test_the_figures_are_those_of_transformers_own_forward_pass(
    own, checkpoint, cache, monkeypatch, name, close, window
):
    import torch
    import transformers

    monkeypatch.setattr(texts, "WINDOW", window)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
    found = measured(own[name])
    for nll, count, document in zip(found.nlls, found.tokens, SET.documents, strict=True):
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        whole, size, expected = [own[name].first_token(), *ids], window - 1, 0.0
        for begin in range(0, len(ids), size):
            end = min(begin + size, len(ids))
            start = max(0, end - size)
            with torch.inference_mode():
                logits = model(torch.tensor([whole[start : end + 1]])).logits[0, :-1]
            every = torch.log_softmax(logits, -1)[range(end - start), whole[start + 1 : end + 1]]
            expected -= float(every[begin - start :].double().sum())
        assert count == len(ids)
        assert nll / count == pytest.approx(expected / count, abs=close)


def test_a_model_without_finite_probabilities_has_no_perplexity_and_the_report_says_why(own, cache):
    why = "gives no probability (NaN), or the probability 0, for a token of line 1"
    reference = distributions.Reference()
    with not_a_number(own["pipeline"]):
        found = measured(own["pipeline"])
        measured(own["pipeline"], reference=reference, is_baseline=True)
    assert found == TextScores("weather", reason=f"it {why}")
    assert perplexity.estimates(found) == {} == perplexity.plain_figures(found)
    said = report([scored([{}], prompts(1), texts=found)], prompts(1), gate.Verdict("none", ())).remarks
    assert f"m: perplexity is not measured, because it {why}" in said
    beside = measured(own["onnx fp32"], reference=reference)
    assert beside.compared.reason == f"the baseline, m, {why}" and perplexity.plain_figures(beside)


def test_read_texts_are_not_read_again_and_others_are(own, cache, monkeypatch):
    model = own["onnx int4"]
    monkeypatch.setattr(texts, "WINDOW", 16)
    monkeypatch.setattr(texts, "TOGETHER", 2)
    first = measured(model, "all")
    read = []
    monkeypatch.setattr(type(model), "token_scores", lambda self, rows, see: read.append(rows) or iter(()))
    assert measured(model, "all") == first and read == []
    more = TextSet("more", (*SET.documents, Document("line 4", "New.")), "1" * 64)
    measured(model, "all", text_set=more)
    assert len(read) == 1 and len(read[0]) == 1


def test_the_number_of_windows_that_are_read_at_once_changes_nothing(own, cache, monkeypatch):
    monkeypatch.setattr(texts, "WINDOW", 16)
    whole = measured(own["onnx fp32"])
    monkeypatch.setattr(texts, "TOGETHER", 1)
    np.testing.assert_allclose(measured(own["onnx fp32"]).nlls, whole.nlls, rtol=1e-5)


def test_fidelity_on_texts_is_0_beside_itself_and_the_difference_of_the_nlls_beside_another(own, cache, monkeypatch):
    monkeypatch.setattr(texts, "WINDOW", 16)
    reference = distributions.Reference()
    baseline = measured(own["onnx fp32"], reference=reference, is_baseline=True)
    assert baseline.compared is None
    itself = perplexity.pair_estimates(measured(own["onnx fp32"], reference=reference))
    assert itself["fidelity/texts/kl"].mean == 0 and itself["fidelity/texts/top1"].mean == 1
    other = measured(own["onnx int4"], reference=reference)
    found = perplexity.pair_estimates(other)
    gap = perplexity.estimates(other)["nll"].mean - perplexity.estimates(baseline)["nll"].mean
    assert found["fidelity/texts/kl"].mean > 0
    assert found["fidelity/texts/nll_difference"].mean == pytest.approx(gap, abs=1e-3)
    assert perplexity.plain_pair_figures(other)["fidelity/texts/tokens"] == sum(other.tokens)
    assert len(set(other.windows.values())) == 3 and "sums" in other.windows.values()  # windows of a text are related
    reference.close()


def test_a_shorter_context_than_the_baselines_windows_is_said(own, cache):
    reference = distributions.Reference()
    measured(own["onnx fp32"], reference=reference, is_baseline=True)

    class Short(type(own["onnx fp32"])):
        def context_length(self):
            return 16

    short = Short(own["onnx fp32"].facts, own["onnx fp32"].wrapper, 0.0, lambda: None)
    found = measured(short, reference=reference)
    assert found.tokens == measured(own["onnx fp32"]).tokens
    assert found.compared.reason.startswith("its context has 16 tokens, and a text has ")
    reference.close()


def test_a_model_that_cannot_be_read_says_why():
    from slm.answers import loading

    endpoint = loading.EndpointModel(types.SimpleNamespace(label="far"), None, 0.0)
    reference = distributions.Reference()
    found = measured(endpoint, reference=reference, is_baseline=True)
    assert found.reason == "it is an endpoint" and perplexity.estimates(found) == perplexity.plain_figures(found) == {}
    assert reference.reason == "the baseline, far, is an endpoint"


# Figures --------------------------------------------------------------------------------------------------------------


def test_the_perplexity_weighs_every_token_alike_and_one_text_has_no_interval():
    scores = TextScores("t", (10.0, 2.0), (4, 2), (None, None))
    assert perplexity.plain_figures(scores) == {"perplexity": pytest.approx(math.exp(2)), "nll/tokens": 6.0}
    nll = perplexity.estimates(scores)["nll"]
    assert nll.mean == 2 and nll.ci95_low < 2 < nll.ci95_high and nll.n == 2
    assert math.isnan(perplexity.estimates(TextScores("t", (10.0,), (4,), (None,)))["nll"].ci95_low)
    assert math.isnan(perplexity.estimates(TextScores("t", (10.0, 2.0), (4, 2), ("a", "a")))["nll"].ci95_low)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_plain_file_is_one_text_and_jsonl_has_one_per_row(tmp_path):
    plain, rows = tmp_path / "book.txt", tmp_path / "rows.jsonl"
    plain.write_text("One.\n\nTwo.", encoding="utf-8")
    rows.write_text('{"text": "One.", "page": 7}\n\n{"text": "Two.", "cluster": "b"}\n', encoding="utf-8")
    assert read_texts(plain).documents == (Document("text", "One.\n\nTwo."),)
    assert read_texts(rows).documents == (Document("line 1", "One."), Document("line 3", "Two.", "b"))
    assert read_texts(rows).sha256 != read_texts(plain).sha256


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b" \n", "a.txt: has no text; write a plain text, or JSONL rows with `text`"),
        ("a.txt", b"a\xff", "a.txt line 1: byte 0xff is not UTF-8; save as UTF-8"),
        ("a.txt", b"a\0b", "a.txt: `text` has a NUL character in it; remove it"),
        ("a.jsonl", b'{"prompt": "a"}', "a.jsonl line 1: `text` is missing; write a text that is not empty"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl line 1: `text` is ''; write a text that is not empty"),
        ("a.jsonl", b'["a"]', "a.jsonl line 1: is ['a']; write rows such as"),
        ("a.jsonl", b'{"text": "a", "cluster": 3}', "a.jsonl line 1: `cluster` is 3; write a text"),
        ("a.jsonl", b'{"text": "a"', "a.jsonl line 1: not JSON"),
        ("a.gz", b"\x1f\x8b123", "a.gz: is compressed with gzip; unpack it first"),
    ],
)
def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as refused:
        texts.read(str(tmp_path / name))
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"texts: '.*none.txt' does not exist"):
        texts.read(str(tmp_path / "none.txt"))
    with pytest.raises(BadInput, match="is a folder"):
        texts.read(str(tmp_path))


# Gates and refusals ---------------------------------------------------------------------------------------------------


def rules(text: str):
    return gate.read_thresholds(text, "gate.yaml")


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("nll/mean: {max_drop: 0.1}", "nll/mean takes `min` or `max`; compare with perplexity"),
        ("fidelity/texts/kl/mean: {max_ratio: 2}", "compares with the baseline already"),
        ("perplexty: {max: 3}", "did you mean 'perplexity'"),
    ],
)
def test_a_rule_that_the_texts_can_not_give_is_refused(rule, told):
    with pytest.raises(BadInput, match=told):
        gate.check_names(rules(rule), {"contains"}, (), 1, has_texts=True)


def test_rules_on_texts_are_known_and_need_texts():
    text = "perplexity: {max: 20, max_ratio: 1.1}\nnll/mean: {max: 3}\nfidelity/texts/kl/mean: {max: 0.1}"
    gate.check_names(rules(text), {"contains"}, (), 1, has_texts=True)
    args = parameters.parse("evaluate", "", ["--model_uris=models:/a/1", "--baseline=models:/a/2"])
    for line in text.split("\n"):
        with pytest.raises(BadInput, match=f"thresholds: {line.split(':')[0]} needs texts"):
            requests.check_gate(args, rules(line), prompts(2))


def test_a_missing_figure_of_texts_is_inconclusive_with_its_reason():
    decided = gate.decide(rules("nll/mean: {max: 3}"), {"rows": 2.0}, {}, no_texts="it is an endpoint").checks
    assert [(check.state, check.reason) for check in decided] == [("inconclusive", "not measured: it is an endpoint")]
    nll = perplexity.estimates(TextScores("t", (10.0,), (4,), (None,)))
    assert gate.decide(rules("nll/mean: {max: 3}"), {"rows": 2.0, **nll}, {}).state == "inconclusive"


def test_the_console_says_what_was_read_and_what_was_not():
    measured_texts = TextScores("book", (10.0,), (4,), (None,))
    models = [
        scored([{"contains": 1.0}] * 2, prompts(2), texts=text)
        for text in (measured_texts, TextScores("book", reason="it is an endpoint"))
    ]
    told = summary.text_remarks(report(models, prompts(2), gate.Verdict("none", ())))
    assert told == [
        "m: -log p 2.500 nats per token, 4 tokens of 1 text in book; texts of one cluster have no interval",
        "m: perplexity is not measured, because it is an endpoint",
    ]
    [line] = [line for line in summary.lines(models) if line.label.startswith("perplexity")]
    assert line.cells == ("12.18", "n/a")


@pytest.mark.slow
def test_evaluate_shows_logs_and_gates_the_perplexity(logged, tmp_path, monkeypatch, capsys):
    import mlflow

    from entrypoints import evaluate

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.get_tracking_uri())
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))
    rows, one = tmp_path / "weather.jsonl", tmp_path / "one.jsonl"
    rows.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in SET.documents))
    one.write_text(json.dumps({"id": "a", "prompt": "What is the capital of France?", "expected": "Paris"}))
    limits = tmp_path / "gate.yaml"
    limits.write_text(
        "perplexity: {max: 1000, max_ratio: 2}\nnll/mean: {max: 20}\nfidelity/texts/top1/mean: {min: 0.01}\n"
    )
    told = [f"--{name}={value}" for name, value in {
        "model_uris": logged["onnx int4"], "baseline": logged["onnx fp32"], "prompts": one, "max_tokens": 2,
        "texts": rows, "thresholds": limits, "traces": "false",
    }.items()]  # fmt: skip
    code = evaluate.main(told)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "perplexity of the texts" in out and " tokens of 3 texts in weather" in out and "on the texts: KL " in out
    [run_id] = [line.split("run: ")[1].split()[0] for line in out.splitlines() if line.startswith("gate: ")]
    client = mlflow.MlflowClient()
    parent = client.get_run(run_id)
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    for run in (parent, *children):
        assert run.data.metrics["perplexity"] == pytest.approx(math.exp(run.data.metrics["nll/mean"]))
        assert run.data.metrics["nll/ci95_low"] < run.data.metrics["nll/mean"] < run.data.metrics["nll/ci95_high"]
    assert sum("fidelity/texts/kl/mean" in run.data.metrics for run in children) == 1
    page = Path(client.download_artifacts(run_id, "evaluation/report.html", str(tmp_path)))
    assert page.read_text(encoding="utf-8").count("<dt>perplexity of the texts, ") == 2
