"""The record of a run, the command that repeats the run, and the changes between two records: all as plain data."""

import copy
import hashlib
import json
import shlex
from dataclasses import replace

import pytest
from support.scored import facts, prompts, scored

from slm.answers.forms import Form
from slm.verdict import reproduction
from slm.verdict.reproduction import Change, Scored

CODE, CONSTRAINTS = "c0de" * 16, "feed" * 16
DESCRIBED = {
    "python": "3.11.7",
    "platform": "Linux",
    "cpu": "x86_64",
    "cpu_model": "a CPU",
    "cpu_flags": ["avx2"],
    "cores": 2,
    "gpus": [],
    "code.sha256": CODE,
    "git_commit": "0123456789abcdef",
    "git_dirty": False,
    "constraints.sha256": CONSTRAINTS,
    "needed": {"mlflow": "3.1"},
    "packages": {"mlflow": "3.1", "pytest": "9.0"},
}
MACHINE = {"cpu": "x86_64", "cpu_model": "a CPU", "cpu_flags": ["avx2"], "cores": 2, "gpus": []}
TOLD = {"git_commit": "0123456789abcdef", "git_dirty": False}
ENVIRONMENT = {"python": "3.11.7", "constraints.sha256": CONSTRAINTS, "packages": {"mlflow": "3.1"}}
GENERATION = {"max_tokens": 8, "batch_size": 0}
USER = [{"role": "user", "content": "Größe?"}]


def sha(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def two_prompts():
    two = prompts(2)
    chat = replace(two.prompts[1], prompt=None, messages=tuple(USER), cluster="c")
    return replace(two, prompts=(two.prompts[0], chat))


def asked() -> dict:
    return reproduction.asked(DESCRIBED, two_prompts(), GENERATION, 3, "5c0re")


def test_what_is_asked_is_the_code_the_packages_the_prompts_the_parameters_and_the_scorers():
    call = [{"contains": {}}]
    first = {"id": "p0", "expected": ["yes"], "scorers": call, "tags": ["all"]}
    measures = [first, first | {"id": "p1", "cluster": "c"}]
    assert asked() == {
        "code": {"sha256": CODE} | TOLD,
        "environment": ENVIRONMENT,
        "prompts": {"rows": 2, "sha256": sha([["p0", "Question 0"], ["p1", USER]])},
        "parameters": {"max_tokens": 8, "batch_size": 0, "repeats": 3},
        "scorers": {"sha256": sha([measures, "5c0re"])},
    }


def test_a_fingerprint_is_the_hash_of_what_is_asked_without_the_commit():
    content = asked()
    content["code"] = {"sha256": CODE}
    assert reproduction.fingerprint(asked(), "identity") == sha([content, "identity"])
    committed = asked() | {"code": {"sha256": CODE, "git_commit": "f", "git_dirty": True}}
    assert reproduction.fingerprint(committed, "identity") == sha([content, "identity"])
    assert reproduction.whole_fingerprint(["f1", "f2"], 1, [{"max": 1}]) == sha([["f1", "f2"], 1, [{"max": 1}]])


TEMPLATE = {"tokenizer.sha256": None, "chat_template.sha256": "7e", "tells_date": False}
USED = {"runtime": "transformers", "device": "cpu", "dtype": "fp32", "threads": 2, "batch_size": 4}
ORIGIN = {"source": "hf:a/b", "revision": "1234", "files": {"w": "00"}}


def own_model(**changes):
    record = {"model": {"precision": "fp32"}, "template": TEMPLATE, "used": USED, "origin": ORIGIN}
    return replace(
        facts(label="m/2", uri="models:/m/2", sha256="ab", code_sha256="cd", identity="1d", record=record), **changes
    )


def answered(model, token_ids=(1, 2)):
    """A model's answers to the two prompts, of which the first was asked twice."""
    made = scored([{"contains": 1.0}, {"contains": 0.0}], two_prompts(), model=model)
    one, two = made.samples
    again = replace(one, repeat=1, output="other", finish_reason="length")
    sent = {"p0": ("<Question 0>", list(token_ids)), "p1": ("<Größe?>", None if token_ids == () else [3])}
    return replace(made, samples=(one, again, two), sent=sent, reused=1)


def one_answer(output="text", finish_reason="stop", error=None) -> str:
    return sha([output, finish_reason, error])


def test_a_record_has_all_that_a_repeat_needs_and_all_that_came_out():
    found = reproduction.record(DESCRIBED, asked(), answered(own_model()), judged=False)
    first = [one_answer(), one_answer("other", "length")]
    assert found == {
        "reproducible": "byte-identical on the same kind of CPU",
        "fingerprint": reproduction.fingerprint(asked(), "1d"),
        "code": {"sha256": CODE, "wrapper.sha256": "cd"} | TOLD,
        "environment": ENVIRONMENT,
        "machine": MACHINE,
        "model": {"precision": "fp32"},
        "template": TEMPLATE,
        "prompts": asked()["prompts"],
        "parameters": asked()["parameters"],
        "scorers": asked()["scorers"],
        "used": USED,
        "inputs": {
            "rendered.sha256": sha([["p0", "<Question 0>"], ["p1", "<Größe?>"]]),
            "token_ids.sha256": sha([["p0", [1, 2]], ["p1", [3]]]),
        },
        "outputs": {"sha256": sha({"p0": first, "p1": [one_answer()]}), "answers": 3, "reused": 1},
        "known_as": {"label": "m/2", "uri": "models:/m/2", "sha256": "ab"} | ORIGIN,
        "platform": "Linux",
        "packages": {"mlflow": "3.1", "pytest": "9.0"},
        "rows": [
            {
                "id": "p0",
                "asked": sha([{"role": "user", "content": "Question 0"}])[:16],
                "rendered": sha("<Question 0>")[:16],
                "token_ids": sha([1, 2])[:16],
                "outputs": [one[:16] for one in first],
            },
            {
                "id": "p1",
                "asked": sha([{"role": "user", "content": None}])[:16],
                "rendered": sha("<Größe?>")[:16],
                "token_ids": sha([3])[:16],
                "outputs": [one_answer()[:16]],
            },
        ],
    }


def test_a_record_of_an_endpoint_says_what_is_unknown():
    endpoint = facts(label="e", uri="http://host/v1#m", identity="http://host/v1#m", form=Form("messages", True))
    found = reproduction.record(DESCRIBED, asked(), answered(endpoint, ()), judged=False)
    assert found["reproducible"] == "statistically comparable: an endpoint answered"
    assert found["model"] == {"identity": "http://host/v1#m"} and found["template"] == found["used"] == {}
    assert found["code"] == {"sha256": CODE} | TOLD
    assert found["inputs"]["token_ids.sha256"] is None and found["rows"][1]["token_ids"] is None
    assert found["known_as"] == {"label": "e", "uri": "http://host/v1#m", "sha256": ""}


def test_a_given_batch_size_is_the_one_that_was_used():
    given = asked()
    given["parameters"] = given["parameters"] | {"batch_size": 1}
    found = reproduction.record(DESCRIBED, given, answered(own_model()), judged=False)
    assert found["used"] == USED | {"batch_size": 1}
    others = own_model(record={})
    assert reproduction.record(DESCRIBED, given, answered(others), judged=False)["used"] == {}


@pytest.mark.parametrize(
    ("provider", "reproducible"),
    [
        ("cpu", "byte-identical on the same kind of CPU"),
        ("cuda", "statistically comparable: it ran on cuda"),
        (None, "statistically comparable: it ran on "),
    ],
)
def test_an_onnx_model_is_byte_identical_on_its_cpu_provider_alone(provider, reproducible):
    used = {"runtime": "onnxruntime-genai", "execution_provider": provider, "dtype": "int4"}
    model = own_model(record={"used": used, "template": TEMPLATE})
    assert reproduction.record(DESCRIBED, asked(), answered(model), False)["reproducible"] == reproducible


def test_a_record_is_written_as_json_that_a_person_can_read():
    assert reproduction.as_json({"a": {"b": "Größe"}}) == '{\n "a": {\n  "b": "Größe"\n }\n}\n'


def test_an_evaluations_record_has_its_models_and_its_gate():
    first = reproduction.record(DESCRIBED, asked(), answered(own_model()), judged=False)
    second = reproduction.record(DESCRIBED, asked(), answered(own_model(label="m/1")), judged=True)
    rules = [{"metric": "score/mean", "min": 0.5}]
    found = reproduction.whole_record(DESCRIBED, [("r1", first), ("r2", second)], 1, rules)
    fingerprint = reproduction.fingerprint(asked(), "1d")
    assert found == {
        "reproducible": "statistically comparable: a judge scored the answers",
        "fingerprint": sha([[fingerprint, fingerprint], 1, rules]),
        "code": {"sha256": CODE} | TOLD,
        "environment": ENVIRONMENT,
        "machine": MACHINE,
        "gate": {"baseline": 1, "thresholds.sha256": sha(rules)},
        "outputs": {"sha256": sha([first["outputs"]["sha256"], second["outputs"]["sha256"]])},
        "models": [
            {"run_id": "r1", "label": "m/2", "fingerprint": fingerprint},
            {"run_id": "r2", "label": "m/1", "fingerprint": fingerprint},
        ],
        "platform": "Linux",
        "packages": {"mlflow": "3.1", "pytest": "9.0"},
    }
    alone = reproduction.whole_record(DESCRIBED, [("r1", first)], None, [])
    assert alone["reproducible"] == "byte-identical on the same kind of CPU"


# ---------------------------------------------------------------------------------------------------------------------
# The command that repeats a run


@pytest.mark.parametrize(
    ("tags", "given", "known_as", "command"),
    [
        (
            {},
            {"model": "a/b", "alias": "champion", "registered_model_name": "m", "slot": "8:00"},
            [{"source": "hf:a/b", "revision": "1234", "uri": "models:/m-1"}],
            "mlflow run . --env-manager local -e main -P model=a/b -P revision=1234",
        ),
        (
            {"mlflow.source.name": "/there/entrypoints/onnx.py", "mlflow.project.env": "virtualenv"},
            {"model": "/a/folder", "resume": "true", "max_tokens": "8"},
            [{"source": "file:/a/folder", "revision": "1234"}],
            "mlflow run /there --env-manager virtualenv -e onnx -P model=/a/folder -P resume=false",
        ),
        (
            {
                "mlflow.project.entryPoint": "evaluate",
                "mlflow.source.name": "file:///my clone",
                "mlflow.source.git.repoURL": "https://host/p",  # of the clone's remote
                "mlflow.source.git.commit": "c0ffee",
            },
            {},
            [{}],
            "mlflow run '/my clone' --env-manager local -e evaluate",
        ),
        (
            {"mlflow.project.entryPoint": "evaluate", "mlflow.source.name": "main.py"},
            {"model_uris": "models:/a@x,models:/b@x"},
            [{"uri": "models:/a/1", "source": "hf:a/b"}, {"uri": "models:/b/2"}],
            "mlflow run . --env-manager local -e evaluate -P model_uris=models:/a/1,models:/b/2",
        ),
        (
            {"mlflow.source.name": "entrypoints/evaluate.py"},
            {"model_uris": "models:/a/1", "baseline": "models:/a@champion", "thresholds": "gate.yaml"},
            [{"uri": "models:/a/1"}],  # the first champion
            "mlflow run . --env-manager local -e evaluate -P model_uris=models:/a/1",
        ),
        (
            {"mlflow.source.name": "entrypoints/evaluate.py"},
            {"model_uris": "models:/a/1", "force": "true", "stop": 'it\'s "so" $HOME'},  # a model beside itself
            [{"uri": "models:/a/1"}],
            "mlflow run . --env-manager local -e evaluate -P model_uris=models:/a/1 -P force=true "
            "-P 'stop=it'\"'\"'s \"so\" $HOME'",
        ),
        (
            {
                "mlflow.project.entryPoint": "main",
                "mlflow.source.name": "git://host/p",
                "mlflow.source.git.repoURL": "git://host/p",
            },
            {},
            [{}],
            "mlflow run git://host/p -v '' --env-manager local -e main",
        ),
    ],
)
def test_the_command_has_what_was_chosen_and_resolved_and_nothing_that_promotes(tags, given, known_as, command):
    records = [{"known_as": known} for known in known_as]
    found = reproduction.again(tags, given, {"max_tokens": "8", "model": "smollm2"}, records, None)
    assert found == command and shlex.split(found)


# ---------------------------------------------------------------------------------------------------------------------
# The changes between two runs


def line(key: str, output: str = "yes", repeat: int = 0, model: str = "m1", **scores) -> dict:
    return {
        "id": key,
        "repeat": repeat,
        "output": output,
        "finish_reason": "stop",
        "scores": scores or {"s": 1.0},
        "latency_seconds": 0.5,
        "model": model,
    }


def run(samples=None, **changes) -> Scored:
    """A run of two prompts. A change is `group__name=value`, with a dot for each further `__`."""
    record = copy.deepcopy(
        {
            "reproducible": reproduction.IDENTICAL,
            "fingerprint": "f" * 64,
            "code": {"sha256": CODE} | TOLD,
            "environment": {"python": "3.11", "packages": {"mlflow": "3.1"}},
            "machine": {"cpu": "x86_64"},
            "model": {"precision": "int4"},
            "template": {"tells_date": False},
            "prompts": {"sha256": "9" * 64},
            "parameters": {"max_tokens": 8},
            "scorers": {"sha256": "5" * 64},
            "used": {"threads": 2},
            "inputs": {"rendered.sha256": "a" * 64, "token_ids.sha256": None},
            "known_as": {"label": "m/2"},
            "rows": [{"id": key, "asked": "q", "rendered": "r", "token_ids": "t"} for key in ("a", "b")],
        }
    )
    for name, value in changes.items():
        group, _, key = name.partition("__")
        if key:
            record[group][key.replace("__", ".")] = value
        else:
            record[group] = value
    return Scored(record, [line("a"), line("b")] if samples is None else samples)


ALIKE = f"the fingerprints are equal ({'f' * 12}), and the answers and scores are byte-identical"
STILL = "; the answers and scores are still byte-identical"


def test_two_runs_that_differ_in_seconds_and_addresses_alone_are_alike():
    other = run([line("a", model="m9") | {"latency_seconds": 9.0}, line("b")])
    found = reproduction.compare(run(), other)
    assert (found.changes, found.asked_alike, found.same, found.answers) == ((), True, True, 2)
    assert found.conclusion == ALIKE and run().label == "m/2"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"code__sha256": "0" * 64}, Change("code.sha256", f"{CODE[:12]} (0123456789)", f"{'0' * 12} (0123456789)")),
        (
            {"code": {"sha256": "0" * 64, "git_commit": "fedcba98765", "git_dirty": True}},
            Change("code.sha256", f"{CODE[:12]} (0123456789)", f"{'0' * 12} (fedcba9876 and changes)"),
        ),
        ({"code": {"sha256": "0" * 64}}, Change("code.sha256", f"{CODE[:12]} (0123456789)", "0" * 12)),
        ({"code__wrapper__sha256": "2" * 64}, Change("code.wrapper.sha256", "absent", "2" * 12)),
        (
            {"environment__packages": {"mlflow": "3.2"}},
            Change("environment.packages.mlflow", "3.1", "3.2"),
        ),
        ({"environment__packages": {}}, Change("environment.packages.mlflow", "3.1", "absent")),
        ({"machine__cpu": "arm64"}, Change("machine.cpu", "x86_64", "arm64")),
        ({"model__precision": None}, Change("model.precision", "int4", "unknown")),
        ({"template__tells_date": True}, Change("template.tells_date", "false", "true")),
        ({"parameters__stop": ["ä", "b"]}, Change("parameters.stop", "absent", '["ä", "b"]')),
        ({"parameters__stop": "x" * 60}, Change("parameters.stop", "absent", "x" * 60)),
        ({"parameters__stop": "x" * 61}, Change("parameters.stop", "absent", "x" * 60 + "…")),
        ({"parameters__stop": "x" * 64}, Change("parameters.stop", "absent", "x" * 60 + "…")),
        ({"parameters__stop": "f" * 63}, Change("parameters.stop", "absent", "f" * 60 + "…")),
        ({"scorers__sha256": "1" * 64}, Change("scorers.sha256", "5" * 12, "1" * 12)),
        ({"used__threads": 4}, Change("used.threads", "2", "4")),
        ({"prompts__sha256": "1" * 64}, Change("prompts.sha256 (only the order differs)", "9" * 12, "1" * 12)),
        (
            {"prompts__sha256": "1" * 64, "rows": [{"id": "b", "asked": "q"}, {"id": "c", "asked": "q"}]},
            Change("prompts.sha256 (2 of 3: a, c)", "9" * 12, "1" * 12),
        ),
    ],
)
def test_a_changed_cause_is_named_with_both_its_values(changes, told):
    found = reproduction.compare(run(), run(**changes, fingerprint="e" * 64))
    assert found.changes == (told,) and found.same and not found.asked_alike
    assert found.conclusion == f"first difference: {told.what}{STILL}"


def test_causes_come_before_effects_in_their_order():
    causes = {"used__threads": 4, "code__sha256": "0" * 64, "machine__cpu": "arm64", "scorers__sha256": "1" * 64}
    causes |= {"template__tells_date": True, "environment__python": "3.12", "model__precision": "fp32"}
    causes |= {"prompts__sha256": "1" * 64, "parameters__max_tokens": 9}
    inputs = {"inputs__rendered__sha256": "b" * 64, "inputs__token_ids__sha256": "c" * 64}
    rows = [{"id": "a", "asked": "q", "rendered": "x", "token_ids": "y"}, *run().record["rows"][1:]]
    found = reproduction.compare(run(), run([line("a", "no"), line("b")], rows=rows, **causes, **inputs))
    assert [change.what for change in found.changes] == [
        "code.sha256",
        "environment.python",
        "machine.cpu",
        "model.precision",
        "template.tells_date",
        "prompts.sha256 (only the order differs)",
        "parameters.max_tokens",
        "scorers.sha256",
        "used.threads",
        "rendered prompts (1 of 2: a)",
        "token ids (1 of 2: a)",
        "answers (1 of 2: a)",
        "  a",
    ]
    assert found.changes[9:11] == (
        Change("rendered prompts (1 of 2: a)", "a" * 12, "b" * 12),
        Change("token ids (1 of 2: a)", "unknown", "c" * 12),
    )
    assert found.conclusion == "first difference: code.sha256" and not found.same


def effects(first: list[dict], second: list[dict]) -> list[tuple[str, str, str]]:
    found = reproduction.compare(run(first), run(second))
    return [(change.what, change.first, change.second) for change in found.changes]


def test_answers_that_differ_are_listed_and_three_of_them_shown():
    ids = "abcdefg"
    before, after = [line(key) for key in ids], [line(key, f"no {key}") for key in ids]
    assert effects(before, after) == [
        ("answers (7 of 7: a, b, c, d, e, …)", "", ""),
        *((f"  {key}", "yes", f"no {key}") for key in "abc"),
    ]
    assert effects(before[:5], after[:5])[0] == ("answers (5 of 5: a, b, c, d, e)", "", "")


def test_answers_of_one_run_alone_are_counted_and_another_end_is_another_answer():
    assert effects([line("a")], [line("a"), line("b", repeat=0), line("a", repeat=1)]) == [
        ("answers (2 of 3: b, a)", "", "")
    ]
    assert effects([line("a"), line("b")], [line("a")]) == [("answers (1 of 2: b)", "", "")]
    cut = line("a") | {"finish_reason": "length"}
    assert effects([line("a")], [cut]) == [("answers (1 of 1: a)", "", ""), ("  a", "yes", "yes")]


def test_scores_that_differ_are_counted_with_the_change_of_the_mean_over_prompts():
    before = [line("a", s=1.0, t=0.0), line("a", repeat=1, s=1.0, t=1.0), line("b", s=0.0, t=None)]
    after = [line("a", s=1.0, t=1.0), line("a", repeat=1, s=1.0, t=1.0), line("b", s=0.5, t=None)]
    # a: (0.5 + 1) / 2 = 0.75 and b: 0, so 0.375; then a: 1 and b: 0.5, so 0.75
    assert effects(before, after) == [("score (2 answers scored differently, +0.375)", "0.375", "0.750")]
    unscored = [line("a", s=None)]
    assert effects([line("a", s=1.0)], unscored) == [("score (1 answers scored differently)", "1.000", "n/a")]
    assert effects(unscored, [line("a", s=0.0)]) == [("score (1 answers scored differently)", "n/a", "0.000")]


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        ("yes", "no\n'it'", ("yes", "no\\n'it'")),
        ("x" * 60, "x" * 59, ("…" + "x" * 21, "…" + "x" * 20)),
        ("x" * 100 + "a" + "y" * 39, "x" * 100 + "b" + "y" * 40, ("…" + "x" * 20 + "a" + "y" * 39, None)),
        ("a" + "y" * 59, "b" + "y" * 60, ("a" + "y" * 59, "b" + "y" * 59 + "…")),
        ("x" * 20 + "a", "x" * 20 + "b", ("x" * 20 + "a", "x" * 20 + "b")),
        ("x" * 21 + "a", "x" * 21 + "b", ("…" + "x" * 20 + "a", "…" + "x" * 20 + "b")),
    ],
)
def test_two_texts_are_shown_from_20_characters_before_their_first_difference(first, second, shown):
    [_, told] = effects([line("a", first)], [line("a", second)])
    expected = [shown[0], shown[1] or "…" + "x" * 20 + "b" + "y" * 39 + "…"]
    assert list(told[1:]) == expected


def test_without_a_known_cause_the_record_says_whether_other_answers_are_expected():
    other = [line("a", "no"), line("b")]
    found = reproduction.compare(run(), run(other))
    assert found.conclusion == (
        "first difference: answers (1 of 2: a); all else is alike, but byte-identical was promised: please report this"
    )
    reason = "statistically comparable: it ran on cuda"
    for first, second in ((run(reproducible=reason), run(other)), (run(), run(other, reproducible=reason))):
        assert reproduction.compare(first, second).conclusion == (
            f"first difference: answers (1 of 2: a); all else is alike, this is expected: {reason}"
        )


def test_another_difference_of_the_samples_is_told_too():
    other = [line("a") | {"reasons": {"s": "x"}}, line("b")]
    assert effects([line("a"), line("b")], other) == [("samples.jsonl, beside answers and scores", "", "")]


def test_the_gates_of_two_evaluations_are_compared():
    first = {"gate": {"baseline": None, "thresholds.sha256": "1" * 64}}
    second = {"gate": {"baseline": 1, "thresholds.sha256": "1" * 64}}
    assert reproduction.gate_changes(first, second) == [Change("gate.baseline", "unknown", "1")]
    assert reproduction.gate_changes(first, first) == reproduction.gate_changes({}, {}) == []
    assert reproduction.gate_changes({}, first)[1] == Change("gate.thresholds.sha256", "absent", "1" * 12)
