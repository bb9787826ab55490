"""What it takes to do a run again, as plain values; and what two such records differ in, causes before effects.

A run's record (environment.json) keeps apart what was asked, from which the fingerprint is made and which is known
before anything runs (code, packages, model, template, prompts, parameters, scorers); what it ran on (machine, used);
and what came out (inputs as rendered, outputs). Files, MLflow and clocks are not touched here. Not compared: seconds,
memory, traces, reports, and the addresses under which models were logged.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import PurePath

from slm.base.hashing import digest
from slm.prompts.prompt_rows import canonical_rows
from slm.prompts.prompt_sets import PromptSet

IDENTICAL = "byte-identical on the same kind of CPU"
COMPARABLE = "statistically comparable"
ASKED = ("code", "environment", "model", "template", "prompts", "parameters", "scorers")
CAUSES = ("code", "environment", "machine", "model", "template", "prompts", "parameters", "scorers", "used")
TOLD = ("git_commit", "git_dirty")  # beside the hash of the code, which alone decides
SHOWN = 3  # answers of which both texts are shown
IDS = 5  # ids shown in a line
WIDTH = 60  # characters of a text that are shown
ABSENT = "absent"


# ---------------------------------------------------------------------------------------------------------------------
# Recording


def asked(described: dict, prompt_set: PromptSet, generation: dict, repeats: int, scorers_sha256: str) -> dict:
    """All that is asked of a model, and of whatever asks it: known before a model is loaded.

    `described` is environment.describe(); `scorers_sha256` stands for users' scorers and the judge.
    """
    rows = canonical_rows(prompt_set.prompts)
    texts = [_put(row) for row in rows]
    measures = [{name: value for name, value in row.items() if name not in ("messages", "prompt")} for row in rows]
    return {
        "code": {"sha256": described["code.sha256"]} | {name: described[name] for name in TOLD},
        "environment": {
            "python": described["python"],
            "constraints.sha256": described["constraints.sha256"],
            "packages": described["needed"],
        },
        "prompts": {"rows": len(rows), "sha256": digest(texts)},
        "parameters": generation | {"repeats": repeats},
        "scorers": {"sha256": digest([measures, scorers_sha256])},
    }


def fingerprint(asked: dict, model_identity: str) -> str:
    """One hash over what a result depends on, the machine left out. `asked` is what the function of that name gives."""
    code = {name: value for name, value in asked["code"].items() if name not in TOLD}
    return digest([asked | {"code": code}, model_identity])


def as_json(record: dict) -> str:
    """A record as the text of environment.json."""
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def whole_fingerprint(fingerprints: list[str], baseline: int | None, thresholds: list[dict]) -> str:
    """That of an evaluation: over its models' own, the one that is the baseline, and the gate."""
    return digest([fingerprints, baseline, thresholds])


def record(
    described: dict,
    asked: dict,
    model,
    sent: dict[str, tuple[str, list[int] | None]],
    samples,
    reused: int,
    judged: bool,
) -> dict:
    """A scored model's environment.json. `model` is loading.LoadedModel, `sent` the text and token ids by prompt id."""
    outputs: dict[str, list[str]] = {}
    for sample in samples:
        outputs.setdefault(sample.id, []).append(digest([sample.output, sample.finish_reason, sample.error]))
    first = {sample.id: sample for sample in reversed(samples)}
    ids = [None if tokens is None else [key, tokens] for key, (_, tokens) in sent.items()]
    facts, used = model.facts, dict(model.facts.get("used", {}))
    if used and asked["parameters"]["batch_size"]:
        used["batch_size"] = asked["parameters"]["batch_size"]
    reason = _not_identical(model, judged)
    return {
        "reproducible": f"{COMPARABLE}: {reason}" if reason else IDENTICAL,
        "fingerprint": fingerprint(asked, model.identity),
        "code": asked["code"] | ({"wrapper.sha256": model.code_sha256} if model.code_sha256 else {}),
        "environment": asked["environment"],
        "machine": machine(described),
        "model": facts.get("model", {}) or {"identity": model.identity},
        "template": facts.get("template", {}),
        "prompts": asked["prompts"],
        "parameters": asked["parameters"],
        "scorers": asked["scorers"],
        "used": used,
        "inputs": {
            "rendered.sha256": digest([[key, text] for key, (text, _) in sent.items()]),
            "token_ids.sha256": None if None in ids else digest(ids),
        },
        "outputs": {"sha256": digest(outputs), "answers": len(samples), "reused": reused},
        "known_as": {"label": model.label, "uri": model.uri, "sha256": model.sha256} | facts.get("origin", {}),
        "platform": described["platform"],
        "packages": described["packages"],
        "rows": [
            {
                "id": key,
                "asked": _short(first[key].messages),
                "rendered": _short(text),
                "token_ids": None if tokens is None else _short(tokens),
                "outputs": [one[:16] for one in outputs[key]],
            }
            for key, (text, tokens) in sent.items()
        ],
    }


def whole_record(described: dict, models: list[tuple[str, dict]], baseline: int | None, thresholds: list[dict]) -> dict:
    """An evaluation's environment.json, from its models' run ids and records."""
    records = [one for _, one in models]
    worst = next((one["reproducible"] for one in records if one["reproducible"] != IDENTICAL), IDENTICAL)
    return {
        "reproducible": worst,
        "fingerprint": whole_fingerprint([one["fingerprint"] for one in records], baseline, thresholds),
        "code": {"sha256": described["code.sha256"]} | {name: described[name] for name in TOLD},
        "environment": records[0]["environment"],
        "machine": machine(described),
        "gate": {"baseline": baseline, "thresholds.sha256": digest(thresholds)},
        "outputs": {"sha256": digest([one["outputs"]["sha256"] for one in records])},
        "models": [
            {"run_id": run_id, "label": one["known_as"]["label"], "fingerprint": one["fingerprint"]}
            for run_id, one in models
        ],
        "platform": described["platform"],
        "packages": described["packages"],
    }


def again(tags: dict, given: dict, defaults: dict, records: list[dict], baseline: int | None) -> str:
    """The command that does a run again, from its tags and parameters: what they resolved to, and nothing promoted.

    Answers that the first run left are not reused. A run that no git URL was given for is done again in a clone.
    """
    chosen = {name: value for name, value in given.items() if value != defaults.get(name)}
    for name in ("alias", "registered_model_name", "slot", "force"):
        chosen.pop(name, None)
    if chosen.get("model_uris"):  # an alias may have moved since
        uris = [one["known_as"]["uri"] for one in records]
        chosen["model_uris"] = ",".join(uri for place, uri in enumerate(uris) if place != baseline)
        if baseline is not None:
            chosen["baseline"] = uris[baseline]
    elif str(records[0]["known_as"].get("source")).startswith("hf:"):
        chosen["revision"] = records[0]["known_as"]["revision"]
    if "resume" in given:
        chosen["resume"] = "false"
    url, commit = tags.get("mlflow.source.git.repoURL"), tags.get("mlflow.source.git.commit", "")
    command = ["mlflow", "run", *((url, "-v", commit) if url else (".",))]
    command += ["-e", tags.get("mlflow.project.entryPoint") or PurePath(tags.get("mlflow.source.name", "main")).stem]
    return shlex.join([*command, *(word for name, value in chosen.items() for word in ("-P", f"{name}={value}"))])


def machine(described: dict) -> dict:
    return {name: described[name] for name in ("cpu", "cpu_model", "cpu_flags", "cores", "gpus")}


def _not_identical(model, judged: bool) -> str:
    """Why the same bytes can't be promised, even on the same kind of CPU; "" where they can."""
    used = model.facts.get("used", {})
    device = used.get("device") or used.get("execution_provider") or ""
    if not model.sha256:
        return "an endpoint answered"
    if not used:
        return "the model runs code of its own"
    if device != "cpu":
        return f"it ran on {device}"
    if used["dtype"] in ("bf16", "fp16"):
        return f"{used['dtype']} rounds with the company a prompt is answered in"
    if model.facts["template"]["tells_date"]:
        return "its chat template tells the date"
    return "a judge scored the answers" if judged else ""


def _put(row: dict) -> list:
    return [row["id"], row.get("messages") or row.get("prompt")]


def _short(content: object) -> str:
    return digest(content)[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


@dataclass(frozen=True)
class Scored:
    """A scored model as its run left it: environment.json, and samples.jsonl's lines."""

    record: dict
    samples: list[dict]

    @property
    def label(self) -> str:
        return self.record["known_as"]["label"]


@dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ, and each one's value, shortened."""

    what: str
    first: str
    second: str


@dataclass(frozen=True)
class Comparison:
    """`differences` begins with the causes, in the order of CAUSES, and ends with the effects, answers and scores.

    `same` says whether every answer and score is the same, bytes and all; seconds and the model's address may differ.
    """

    differences: tuple[Difference, ...]
    asked_alike: bool
    same: bool
    answers: int  # of the first run
    conclusion: str


def compare(first: Scored, second: Scored) -> Comparison:
    """What two scored models' runs differ in."""
    ours, theirs = first.record, second.record
    causes = []
    for group in CAUSES:
        causes += _group(group, ours, theirs)
    rows = [{row["id"]: row for row in one["rows"]} for one in (ours, theirs)]
    inputs = [
        Difference(f"{what} ({_ids(*rows, key)})", _shown(ours["inputs"].get(name)), _shown(theirs["inputs"].get(name)))
        for what, key, name in (
            ("rendered prompts", "rendered", "rendered.sha256"),
            ("token ids", "token_ids", "token_ids.sha256"),
        )
        if ours["inputs"].get(name) != theirs["inputs"].get(name)
    ]
    effects, same = _answers(first, second)
    alike = ours["fingerprint"] == theirs["fingerprint"]
    conclusion = _conclusion(ours, theirs, [*causes, *inputs], effects, same)
    return Comparison((*causes, *inputs, *effects), alike, same, len(first.samples), conclusion)


def gate_differences(first: dict, second: dict) -> list[Difference]:
    """What two evaluations' own records differ in, beside their models."""
    return _group("gate", first, second)


def _group(name: str, first: dict, second: dict) -> list[Difference]:
    ours, theirs = _flat(first.get(name, {})), _flat(second.get(name, {}))
    found = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if key in TOLD or ours.get(key, ABSENT) == theirs.get(key, ABSENT):
            continue
        what, values = f"{name}.{key}", [_shown(side.get(key, ABSENT)) for side in (ours, theirs)]
        if what == "code.sha256":
            values = [_commit(value, side) for value, side in zip(values, (ours, theirs), strict=True)]
        if what == "prompts.sha256":
            rows = [{row["id"]: row for row in one["rows"]} for one in (first, second)]
            what = f"{what} ({_ids(*rows, 'asked')})"
        found.append(Difference(what, *values))
    return found


def _answers(first: Scored, second: Scored) -> tuple[list[Difference], bool]:
    """The differing answers, the first of them with both texts, and scores; and whether there are none of either."""
    ours, theirs = ({(line["id"], line["repeat"]): line for line in one.samples} for one in (first, second))
    both = [key for key in ours if key in theirs]
    answer = [key for key in both if any(ours[key][name] != theirs[key][name] for name in ("output", "finish_reason"))]
    found = []
    if answer or ours.keys() != theirs.keys():
        keys = answer + [key for key in [*ours, *theirs] if key not in ours or key not in theirs]
        told = _listed([key[0] for key in keys])
        found.append(Difference(f"answers ({len(keys)} of {max(len(ours), len(theirs))}: {told})", "", ""))
    for key in answer[:SHOWN]:
        found.append(Difference(f"  {key[0]}", *_texts(ours[key]["output"], theirs[key]["output"])))
    kept = [[{**line, "latency_seconds": 0, "model": ""} for line in one.samples] for one in (first, second)]
    scores = [key for key in both if ours[key]["scores"] != theirs[key]["scores"]]
    if scores:
        means = [_mean_score(one.samples) for one in (first, second)]
        gap = "" if None in means else f", {means[1] - means[0]:+.3f}"
        what = f"score ({len(scores)} answers scored differently{gap})"
        found.append(Difference(what, *("n/a" if mean is None else f"{mean:.3f}" for mean in means)))
    same = kept[0] == kept[1]
    if not same and not found:
        found.append(Difference("samples.jsonl, beside answers and scores", "", ""))
    return found, same


def _mean_score(samples: list[dict]) -> float | None:
    """The mean over prompts of the mean of each answer's scores, as score/mean is."""
    rows: dict[str, list[float]] = {}
    for line in samples:
        scored = [value for value in line["scores"].values() if value is not None]
        if scored:
            rows.setdefault(line["id"], []).append(sum(scored) / len(scored))
    means = [sum(values) / len(values) for values in rows.values()]
    return sum(means) / len(means) if means else None


def _conclusion(ours: dict, theirs: dict, causes: list[Difference], effects: list[Difference], same: bool) -> str:
    if same and not causes:
        return f"asked alike (fingerprint {ours['fingerprint'][:12]}), and the answers and scores are byte-identical"
    if same:
        return f"first difference: {causes[0].what}; the answers and scores are byte-identical all the same"
    if causes:
        return f"first difference: {causes[0].what}"
    reason = next((one["reproducible"] for one in (ours, theirs) if one["reproducible"] != IDENTICAL), "")
    why = f"as can happen: {reason}" if reason else "where byte-identical was promised: please report this"
    return f"first difference: {effects[0].what}; all else is alike, {why}"


def _flat(content: dict, before: str = "") -> dict:
    found = {}
    for key, value in content.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def _ids(ours: dict, theirs: dict, key: str) -> str:
    """`2 of 24: a, b`: the prompts of which a row's `key` differs, those of one side alone among them."""
    every = [*ours, *(one for one in theirs if one not in ours)]
    found = [one for one in every if ours.get(one, {}).get(key) != theirs.get(one, {}).get(key)]
    return f"{len(found)} of {len(every)}: {_listed(found)}" if found else "in their order"


def _listed(ids: list[str]) -> str:
    return ", ".join(ids[:IDS]) + (", …" if len(ids) > IDS else "")


def _texts(first: str, second: str) -> tuple[str, str]:
    """Both texts from shortly before they part, cut to WIDTH."""
    part = next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    start = max(part - WIDTH // 3, 0)

    def cut(text: str) -> str:
        piece = text[start : start + WIDTH]
        return ("…" if start else "") + repr(piece)[1:-1] + ("…" if start + WIDTH < len(text) else "")

    return cut(first), cut(second)


def _commit(value: str, code: dict) -> str:
    commit = code.get("git_commit", "")[:10]
    return value + (f" ({commit}{' and changes' if code.get('git_dirty') else ''})" if commit else "")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else "unknown" if value is None else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and not text.strip("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}…"
