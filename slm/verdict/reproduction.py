"""Records what a repeat of a run needs, as plain values, and lists the changes between two records.

A run's record (environment.json) has three parts:

- the inputs: code, packages, model, template, prompts, parameters, scorers. They are known before the run generates
  anything, and the fingerprint is made from them.
- what the run used: machine, used
- the results: the rendered inputs, outputs

Changes are listed with causes before effects. This module uses no files, no MLflow and no clock. Not compared:
seconds, memory, traces, reports, and the addresses of logged models.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from slm.base.hashing import digest
from slm.prompts.prompt_rows import canonical_rows
from slm.prompts.prompt_sets import PromptSet

if TYPE_CHECKING:  # these import scipy, and `compare` needs neither
    from slm.answers.asking import ModelFacts
    from slm.verdict.scored_model import ScoredModel

Record = dict[str, Any]  # plain data, as in environment.json

IDENTICAL = "byte-identical on the same kind of CPU"
COMPARABLE = "statistically comparable"
ASKED = ("code", "environment", "model", "template", "prompts", "parameters", "scorers")
CAUSES = ("code", "environment", "machine", "model", "template", "prompts", "parameters", "scorers", "used")
TOLD = ("git_commit", "git_dirty")  # recorded for the reader; only the hash of the code is compared
SHOWN = 3  # number of differing answers whose texts are shown
IDS = 5  # most ids in a line
WIDTH = 60  # most characters that are shown of a text
ABSENT = "absent"


# ---------------------------------------------------------------------------------------------------------------------
# Recording


def asked(described: Record, prompt_set: PromptSet, generation: Record, repeats: int, scorers_sha256: str) -> Record:
    """All that is asked of a model, and of whatever asks it: known before a model is loaded.

    `described` is environment.describe(). `scorers_sha256` is the hash of the user's scorers and the judge.
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
        "prompts": {"rows": len(rows), "sha256": digest(texts)}
        | ({"system_prompt.sha256": prompt_set.system.sha256} if prompt_set.system else {})
        | ({"texts.sha256": prompt_set.texts.sha256} if prompt_set.texts else {}),
        "parameters": generation | {"repeats": repeats},
        "scorers": {"sha256": digest([measures, scorers_sha256])},
    }


def fingerprint(asked: Record, model_identity: str) -> str:
    """One hash over everything that a result depends on, except the machine. `asked` is the result of `asked()`."""
    code = {name: value for name, value in asked["code"].items() if name not in TOLD}
    return digest([asked | {"code": code}, model_identity])


def as_json(record: Record) -> str:
    """The text of environment.json for a record."""
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def whole_fingerprint(fingerprints: list[str], baseline: int | None, thresholds: list[Record]) -> str:
    """An evaluation's fingerprint: one hash over its models' fingerprints, the baseline's place and the gate."""
    return digest([fingerprints, baseline, thresholds])


def record(
    described: Record,
    asked: Record,
    scored: "ScoredModel",
    judged: bool,
) -> Record:
    """A scored model's environment.json. `judged` means that a judge scored the answers."""
    model, samples, sent = scored.model, scored.samples, scored.sent
    outputs: dict[str, list[str]] = {}
    for sample in samples:
        outputs.setdefault(sample.id, []).append(digest([sample.output, sample.finish_reason, sample.error]))
    first = {sample.id: sample for sample in reversed(samples)}
    ids = [None if tokens is None else [key, tokens] for key, (_, tokens) in sent.items()]
    facts, used = model.record, dict(model.record.get("used", {}))
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
        "outputs": {"sha256": digest(outputs), "answers": len(samples), "reused": scored.reused},
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


def whole_record(
    described: Record,
    models: list[tuple[str, Record]],
    baseline: int | None,
    thresholds: list[Record],
) -> Record:
    """An evaluation's environment.json. `models` has the run id and the record of each model."""
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


def again(
    tags: Record,
    given: Record,
    defaults: Record,
    records: list[Record],
    baseline: int | None,
) -> str:
    """The command that does a run again, from its tags and parameters: what they resolved to, and nothing promoted.

    The command names the resolved versions. It registers and promotes no model, and it reuses no kept answers. A run
    of a git URL has the URL and the commit in its command. A run of a folder has the folder: the folder may hold what
    is in no commit, and `mlflow run FOLDER -v COMMIT` would check the commit out in the folder.
    """
    chosen = {name: value for name, value in given.items() if value != defaults.get(name)}
    for name in ("alias", "registered_model_name", "slot"):
        chosen.pop(name, None)
    if chosen.get("model_uris"):  # an alias may point to another version now
        uris = [one["known_as"]["uri"] for one in records]
        chosen["model_uris"] = ",".join(uri for place, uri in enumerate(uris) if place != baseline)
        if baseline is not None:
            chosen["baseline"] = uris[baseline]
        elif chosen.pop("baseline", ""):  # a first champion had none, and is the champion now
            chosen.pop("thresholds", None)  # its rules against a baseline can't be decided
    elif str(records[0]["known_as"].get("source")).startswith("hf:"):
        chosen["revision"] = records[0]["known_as"]["revision"]
    if "resume" in given:
        chosen["resume"] = "false"
    name, url, commit = (tags.get(f"mlflow.source.{key}", "") for key in ("name", "git.repoURL", "git.commit"))
    folder = PurePath(name.removeprefix("file://"))  # of a run by hand, the entry script
    command = ["mlflow", "run"]
    if folder.is_absolute():
        command += [str(folder.parent.parent if folder.suffix == ".py" else folder)]
    else:  # MLflow gives a folder the URL of its git remote too
        command += [url, "-v", commit] if url else ["."]
    command += ["--env-manager", tags.get("mlflow.project.env", "local")]  # MLflow sets no tag for `local`
    command += ["-e", tags.get("mlflow.project.entryPoint") or folder.stem or "main"]
    return shlex.join([*command, *(word for name, value in chosen.items() for word in ("-P", f"{name}={value}"))])


def machine(described: Record) -> Record:
    return {name: described[name] for name in ("cpu", "cpu_model", "cpu_flags", "cores", "gpus")}


def _not_identical(model: "ModelFacts", judged: bool) -> str:
    """Why a repeat may give other bytes, even on the same kind of CPU. "" if the bytes are the same."""
    used = model.record.get("used", {})
    device = used.get("device") or used.get("execution_provider") or ""
    if not model.sha256:
        return "an endpoint answered"
    if not used:
        return "the model runs code of its own"
    if device != "cpu":
        return f"it ran on {device}"
    if used["dtype"] in ("bf16", "fp16"):
        return f"{used['dtype']} rounding depends on the other prompts in the batch"
    if model.record["template"]["tells_date"]:
        return "its chat template tells the date"
    return "a judge scored the answers" if judged else ""


def _put(row: Record) -> list[Any]:
    return [row["id"], row.get("messages") or row.get("prompt")]


def _short(content: object) -> str:
    return digest(content)[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


@dataclass(frozen=True)
class Scored:
    """The files of a scored model's run: environment.json, and the lines of samples.jsonl."""

    record: Record
    samples: list[Record]

    @property
    def label(self) -> str:
        return str(self.record["known_as"]["label"])


@dataclass(frozen=True)
class Change:
    """One change between two runs: what changed, and the shortened value of each run."""

    what: str
    first: str
    second: str


@dataclass(frozen=True)
class Comparison:
    """The changes between two runs.

    `changes` has the causes in the order of CAUSES, then the rendered prompts and token ids, then answers and
    scores. `asked_alike` means that the fingerprints are equal. `same` means that all lines of samples.jsonl are equal,
    except the seconds and the model's address.
    """

    changes: tuple[Change, ...]
    asked_alike: bool
    same: bool
    answers: int  # number of answers in the first run
    conclusion: str


def compare(first: Scored, second: Scored) -> Comparison:
    """The changes between the runs of two scored models."""
    ours, theirs = first.record, second.record
    causes = []
    for group in CAUSES:
        causes += _group(group, ours, theirs)
    rows = [{row["id"]: row for row in one["rows"]} for one in (ours, theirs)]
    inputs = [
        Change(
            f"{what} ({_ids(rows[0], rows[1], key)})",
            _shown(ours["inputs"].get(name)),
            _shown(theirs["inputs"].get(name)),
        )
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


def gate_changes(first: Record, second: Record) -> list[Change]:
    """The changes between the gates of two evaluations: the baseline's place and the thresholds."""
    return _group("gate", first, second)


def _group(name: str, first: Record, second: Record) -> list[Change]:
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
            what = f"{what} ({_ids(rows[0], rows[1], 'asked')})"
        found.append(Change(what, *values))
    return found


def _answers(first: Scored, second: Scored) -> tuple[list[Change], bool]:
    """The changes in answers and scores, and whether all samples are equal. The first SHOWN answers have both texts."""
    ours, theirs = ({(line["id"], line["repeat"]): line for line in one.samples} for one in (first, second))
    both = [key for key in ours if key in theirs]
    answer = [key for key in both if any(ours[key][name] != theirs[key][name] for name in ("output", "finish_reason"))]
    found = []
    if answer or ours.keys() != theirs.keys():
        keys = answer + [key for key in [*ours, *theirs] if key not in ours or key not in theirs]
        told = _listed([key[0] for key in keys])
        found.append(Change(f"answers ({len(keys)} of {max(len(ours), len(theirs))}: {told})", "", ""))
    for key in answer[:SHOWN]:
        found.append(Change(f"  {key[0]}", *_texts(ours[key]["output"], theirs[key]["output"])))
    kept = [[{**line, "latency_seconds": 0, "model": ""} for line in one.samples] for one in (first, second)]
    scores = [key for key in both if ours[key]["scores"] != theirs[key]["scores"]]
    if scores:
        means = [_mean_score(one.samples) for one in (first, second)]
        gap = "" if means[0] is None or means[1] is None else f", {means[1] - means[0]:+.3f}"
        what = f"score ({len(scores)} answers scored differently{gap})"
        found.append(Change(what, *("n/a" if mean is None else f"{mean:.3f}" for mean in means)))
    same = kept[0] == kept[1]
    if not same and not found:
        found.append(Change("samples.jsonl, beside answers and scores", "", ""))
    return found, same


def _mean_score(samples: list[Record]) -> float | None:
    """The mean over prompts of each answer's mean score, as in the metric score/mean. None if nothing was scored."""
    rows: dict[str, list[float]] = {}
    for line in samples:
        scored = [value for value in line["scores"].values() if value is not None]
        if scored:
            rows.setdefault(line["id"], []).append(sum(scored) / len(scored))
    means = [sum(values) / len(values) for values in rows.values()]
    return sum(means) / len(means) if means else None


def _conclusion(ours: Record, theirs: Record, causes: list[Change], effects: list[Change], same: bool) -> str:
    if same and not causes:
        return f"the fingerprints are equal ({ours['fingerprint'][:12]}), and the answers and scores are byte-identical"
    if same:
        return f"first difference: {causes[0].what}; the answers and scores are still byte-identical"
    if causes:
        return f"first difference: {causes[0].what}"
    reason = next((one["reproducible"] for one in (ours, theirs) if one["reproducible"] != IDENTICAL), "")
    why = f"this is expected: {reason}" if reason else "but byte-identical was promised: please report this"
    return f"first difference: {effects[0].what}; all else is alike, {why}"


def _flat(content: Record, before: str = "") -> Record:
    found: Record = {}
    for key, value in content.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def _ids(ours: Record, theirs: Record, key: str) -> str:
    """`2 of 24: a, b`: the ids of the rows with different `key`. A row of only one side counts as different."""
    every = [*ours, *(one for one in theirs if one not in ours)]
    found = [one for one in every if ours.get(one, {}).get(key) != theirs.get(one, {}).get(key)]
    return f"{len(found)} of {len(every)}: {_listed(found)}" if found else "only the order differs"


def _listed(ids: list[str]) -> str:
    return ", ".join(ids[:IDS]) + (", …" if len(ids) > IDS else "")


def _texts(first: str, second: str) -> tuple[str, str]:
    """Both texts, cut to WIDTH characters. They start shortly before the first different character."""
    part = next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    start = max(part - WIDTH // 3, 0)

    def cut(text: str) -> str:
        piece = text[start : start + WIDTH]
        return ("…" if start else "") + repr(piece)[1:-1] + ("…" if start + WIDTH < len(text) else "")

    return cut(first), cut(second)


def _commit(value: str, code: Record) -> str:
    commit = code.get("git_commit", "")[:10]
    return value + (f" ({commit}{' and changes' if code.get('git_dirty') else ''})" if commit else "")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else "unknown" if value is None else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and not text.strip("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}…"
