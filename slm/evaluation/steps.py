"""The steps that the entry points share: what was asked for, checked; one model scored in a run of its own; the end.

A scored model gets a child run with its metrics, samples and reports; the parent, which `mlflow run` made, gets the
comparison and the verdict.
"""

import argparse
import atexit
import datetime
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

from slm.answers import endpoints
from slm.base import console, credentials, environment, model_uri, parameters
from slm.base.errors import BadInput, Unavailable
from slm.models import checkpoints, manifest
from slm.prompts import prompt_sets, readers
from slm.scorers import scorer_calls
from slm.tracking import downloads, earlier_runs, lifecycle, mlflow_client, registry, run_records, unsent
from slm.verdict import gate, reproduction

MEASURED = ("output_tokens_per_second", "latency_seconds", "peak_memory_bytes")  # metrics of the generating itself
URI_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/")
SPARK_BYTES = 16 * readers.FILE_BYTES  # of a prompt set that the driver downloads; Spark reads others by itself


def read_prompts(args: argparse.Namespace) -> prompt_sets.PromptSet:
    """The prompt set that `prompts` names, with those of `scorers` added to each row's own.

    Raises:
        BadInput: it isn't there, a row of it is wrong, or a scorer or judge is.
        Unavailable: the judge doesn't answer.
    """
    given = args.prompts
    if getattr(args, "engine", "local") == "spark":
        return _read_on_spark(args)
    with ExitStack() as stack:
        if "://" in given or given.startswith(URI_SCHEMES):
            path = stack.enter_context(downloads.file(given))
        else:
            path = checkpoints.located(given)
            if path is None:
                raise BadInput(f"prompts: {given!r} does not exist, from the repository's root or from here")
        asked = scorer_calls.read(getattr(args, "scorers", ""), getattr(args, "judge", ""))
        return scorer_calls.add(asked, prompt_sets.read_prompt_set(path, given, scorer_calls.IN_ROWS))


def _read_on_spark(args: argparse.Namespace) -> prompt_sets.PromptSet:
    from slm.engines.spark import prompt_frame

    check_engine(args)
    location = given = args.prompts
    if given.startswith((*URI_SCHEMES, "http://", "https://")):
        copies = ExitStack()  # Spark reads a file again and again
        atexit.register(copies.close)
        location = f"file://{copies.enter_context(downloads.file(given, SPARK_BYTES))}"
    elif "://" not in given:
        path = checkpoints.located(given)
        if path is None:
            raise BadInput(f"prompts: {given!r} does not exist, from the repository's root or from here")
        location = f"file://{path.resolve()}"
    return prompt_frame.read_prompts(location, given, args.spark_master, args.scorers, args.repeats)


def check_engine(args: argparse.Namespace) -> None:
    """What engine=spark doesn't do.

    Raises:
        BadInput: it was asked to.
    """
    if args.engine != "spark":
        if args.spark_master:
            raise BadInput(f"spark_master: {args.spark_master!r} needs engine=spark")
        return
    if args.judge:
        raise BadInput("judge: is not asked from Spark's workers; leave it empty, or engine local")
    uris = [uri.strip() for uri in (*args.model_uris.split(","), args.baseline)]
    for uri in filter(endpoints.is_endpoint, uris):
        raise BadInput(f"engine: spark scores logged models, and {uri} is an endpoint; leave engine local")


def check_devices(args: argparse.Namespace) -> None:
    """What `device` and `execution_provider` ask for, where this machine does the work.

    Raises:
        BadInput: it has no such GPU, or the installed packages can't use it.
    """
    if getattr(args, "engine", "local") == "spark":
        return
    device = getattr(args, "device", "auto")
    if device.startswith("cuda"):
        import torch

        if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
            seen = f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here"
            raise BadInput(f"device: {device!r} isn't there: {seen}; leave auto, or install torch's CUDA build")
    exports = not getattr(args, "model_uris", "")
    if exports and getattr(args, "execution_provider", "cpu") == "cuda":
        if not environment.gpus():
            raise BadInput("execution_provider: 'cuda' needs an NVIDIA GPU, and nvidia-smi lists none; leave cpu")
        if environment.installed_as("onnxruntime-genai") == "onnxruntime-genai":
            raise BadInput("execution_provider: 'cuda' needs onnxruntime's CUDA builds; requirements-cuda.txt says how")


def read_gate(args: argparse.Namespace) -> tuple[gate.Threshold, ...]:
    """The thresholds that `thresholds` names; none where it is empty.

    Raises:
        BadInput: the file isn't there, or is no gate.
    """
    if not args.thresholds:
        return ()
    path = checkpoints.located(args.thresholds)
    if path is None or not path.is_file():
        raise BadInput(f"thresholds: {args.thresholds!r} does not exist")
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(gate.GATE_CHARACTERS + 1)
    except OSError as error:
        raise BadInput(f"thresholds: {args.thresholds!r} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"thresholds: {args.thresholds!r} is not UTF-8; save it as UTF-8") from None
    return gate.read_thresholds(text, path.name)


def generation(args: argparse.Namespace) -> dict:
    """How answers are generated, and on what: the parameters that the logged model takes as its defaults."""
    names = ("max_tokens", "temperature", "top_p", "seed", "batch_size", "dtype", "device")
    chosen = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return chosen | {"stop": parameters.stop_strings(args.stop)}


def scored_uri(logged, checkpoint: checkpoints.Checkpoint, registered_model_name: str, precision: str = "") -> str:
    """The URI under which a model that was just logged is scored: its registered version, described, where it is one.

    `logged` is the ModelInfo that MLflow gave.
    """
    from slm.report import summary

    if not registered_model_name:
        return logged.model_uri
    version = str(logged.registered_model_version)
    tags = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "precision": precision,
        "model.sha256": checkpoint.sha256,
        "git_commit": environment.describe()["git_commit"],
        manifest.TAG: next(iter(registry.recorded_manifests(logged.model_uri)), ""),
    }
    words = [f"{checkpoint.name}, as {'a transformers pipeline' if not precision else f'ONNX, {precision}'}."]
    words += [f"From {checkpoint.source}" + (f" at {checkpoint.revision}." if checkpoint.revision else ".")]
    tags = {name: value for name, value in tags.items() if value}
    registry.tag_version(registered_model_name, version, tags, summary.escaped(" ".join(words)))
    return f"models:/{registered_model_name}/{version}"


def score_model(
    label: str,
    uri: str,
    prompt_set: prompt_sets.PromptSet,
    args: argparse.Namespace,
    thresholds: tuple[gate.Threshold, ...] = (),
):
    """Loads what `uri` names and scores it in a child run named `label`; the scored model, without its memory."""
    from slm.answers import loading
    from slm.engines import local

    options = generation(args)
    repeats = getattr(args, "repeats", 1)
    asked = scorer_calls.read(getattr(args, "scorers", ""), getattr(args, "judge", ""))
    resume = getattr(args, "resume", False)
    reuse = _reuse(resume, thresholds)
    asked_for = reproduction.asked(environment.describe(), prompt_set, options, repeats, asked.sha256)
    with lifecycle.child_run(label) as child, ExitStack() as stack:
        if getattr(args, "engine", "local") == "spark":
            scored, sent = _score_on_spark(
                label, uri, prompt_set, asked_for, reuse, child.info.run_id, args.row_timeout, args.trust_code
            )
            model = scored.model
        else:
            with console.step(f"Loading {label}"):
                folder = stack.enter_context(registry.local_copy(uri))  # a stranger's may read files later on
                settings = {name: options.get(name) for name in ("dtype", "device")}
                settings |= {"row_timeout": args.row_timeout}
                trust_code = getattr(args, "trust_code", False)
                model = loading.load(label, uri, folder, settings, registry.recorded_manifests(uri), trust_code)
            with console.progress(f"Scoring {label}", len(prompt_set.prompts) * repeats) as advance:
                score_answer = stack.enter_context(scorer_calls.opened(asked, resume))
                scored = local.score(model, prompt_set, options, repeats, reuse, advance, score_answer)
            sent = {prompt.id: loading.sent(model, prompt, options) for prompt in prompt_set.prompts}
        judged = bool(asked.judge)
        record = reproduction.record(
            environment.describe(), asked_for, model, sent, scored.samples, scored.reused, judged
        )
        if scored.reused:
            rows = int(scored.metrics["rows"])
            console.out.print(f"{label}: {scored.reused} of {rows} answers are reused (resume=true)")
        tags = {
            "prompts.sha256": prompt_set.sha256,
            "model.sha256": model.sha256,
            "model.uri": model.uri,
            "model.name": model.name,
            **({"judge": asked.judge.uri} if asked.judge else {}),
            "fingerprint": record["fingerprint"],
            "outputs.sha256": record["outputs"]["sha256"],
        }
        with unsent.kept(child.info.run_id, scored, tags):
            run_records.log_scored(scored, run_records.log_dataset(prompt_set), tags)
        mlflow_client.quiet_mlflow().log_text(_as_json(record), "evaluation/environment.json")
    return local.release(replace(scored, record=record)), child.info.run_id


def _score_on_spark(
    label: str,
    uri: str,
    prompt_set,
    asked_for: dict,
    reuse: str,
    run_id: str,
    row_timeout: float,
    trust_code: bool,
) -> tuple:
    """What Spark's workers make of a model; and what the shown prompts were sent to it as."""
    from slm.engines.spark import job, scoring, worker

    if not prompt_set.is_whole:  # its prompts are a sample
        asked_for["prompts"] = {"rows": prompt_set.rows, "sha256": prompt_set.sha256}
    told = job.job(label, uri, prompt_set, asked_for["parameters"], row_timeout, trust_code)
    with console.step(f"Loading {label} on a worker"):
        model = scoring.described(prompt_set, told)
    fingerprint = reproduction.fingerprint(asked_for, model.identity)
    run_records.tag_active_run({"engine": "spark", "fingerprint": fingerprint})  # now, for the run that takes over
    with console.step(f"Scoring {label} on {prompt_set.rows:,} prompts in {prompt_set.buckets} parts"):
        scored = scoring.score(told, model, prompt_set, run_id, fingerprint, reuse)
    rows = int(scored.metrics["rows"])
    if len(scored.samples) < rows:
        told = f"of {rows:,} answers, samples.jsonl and the report show {len(scored.samples):,}"
        console.out.print(f"{label}: {told}; all are in {worker.FOLDER}, and in every figure")
    return scored, scored.sent


def _reuse(resume: bool, thresholds: tuple[gate.Threshold, ...]) -> str:
    """Which kept answers may be used; a gate on speed or memory wants them measured now, the baseline's as well."""
    if not resume:
        return "none"
    return "interrupted" if any(rule.metric.startswith(MEASURED) for rule in thresholds) else "all"


def fingerprint(
    prompt_set: prompt_sets.PromptSet, model_identity: str, options: dict, repeats: int, scorers_sha256: str
) -> str:
    """One hash over what a result depends on: model, prompts, parameters, scorers, this project's code and packages.

    It can be had before a model is loaded: loading.identity reads the first from what MLflow says of a logged one.
    """
    asked = reproduction.asked(environment.describe(), prompt_set, options, repeats, scorers_sha256)
    return reproduction.fingerprint(asked, model_identity)


def conclude(
    title: str,
    results: Sequence[tuple],
    thresholds: tuple[gate.Threshold, ...],
    prompt_set: prompt_sets.PromptSet,
    baseline: int | None = None,
) -> gate.Verdict:
    """Compares and gates what was scored, logs verdicts and reports into the child runs and the parent, prints all.

    `results` holds (scored model, its run id); `baseline` is the place of the one that the others are compared with.
    """
    from slm.report import html_page, plots, summary
    from slm.verdict import estimation

    mlflow = mlflow_client.quiet_mlflow()
    client, parent = mlflow.MlflowClient(), mlflow.active_run().info.run_id
    found = judge(title, [scored for scored, _ in results], thresholds, prompt_set, baseline)
    for scored, compared, verdict, (_, run_id) in zip(
        found.models, found.differences, found.verdicts, results, strict=True
    ):
        if compared:
            with mlflow.start_run(run_id=run_id, nested=True):
                mlflow.log_metrics(estimation.difference_metrics(compared), model_id=scored.model.model_id)
        client.set_tag(run_id, "gate", verdict.state)
        _tag_version(scored, verdict, found)
    machine, rules = environment.describe(), [asdict(rule) for rule in thresholds]
    whole = reproduction.whole_record(machine, [(run_id, scored.record) for scored, run_id in results], baseline, rules)
    started = client.get_run(parent).data
    given = {name.removeprefix("cfg."): value for name, value in started.params.items() if name.startswith("cfg.")}
    defaults = {parameter.name: str(parameter.default) for parameter in parameters.PARAMETERS}
    records = [scored.record for scored, _ in results]
    whole["again"] = reproduction.again(started.tags, given, defaults, records, baseline)
    tags = {"gate": found.verdict.state, "prompts.sha256": prompt_set.sha256}
    mlflow.set_tags(tags | {"fingerprint": whole["fingerprint"], "outputs.sha256": whole["outputs"]["sha256"]})
    artifacts = {
        "report.md": summary.markdown(found),
        "report.html": html_page.render(found),
        "junit.xml": summary.junit(found),
    }
    client.log_text(parent, _as_json(whole), "evaluation/environment.json")
    mlflow.set_tag("mlflow.note.content", artifacts["report.md"])  # the run page's description
    for run_id in (parent, *(run_id for _, run_id in results)):
        for name, text in artifacts.items():
            client.log_text(run_id, text, f"evaluation/{name}")
    for name, figure in plots.figures(found).items():
        mlflow.log_figure(figure, f"evaluation/plots/{name}.png")  # log_image's charts hide under the parameters
    console.out.print()
    console.out.print(summary.table(found))
    for remark in summary.remarks(found):
        console.out.print(remark, markup=False)
    for check in found.verdict.checks:
        console.out.print(f"  {check.state:12} {check.metric} {check.rule}: {check.reason}", markup=False)
    state, server = found.verdict.state, credentials.scrubbed(mlflow.get_tracking_uri())
    console.out.print(f"gate: [bold]{state}[/bold]   run: {parent}   tracking: {server}")
    if hasattr(prompt_set, "frame"):
        from slm.engines.spark import prompt_frame

        prompt_frame.release(prompt_set)
    return found.verdict


def _as_json(record: dict) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def judge(title, models, thresholds, prompt_set, baseline=None):
    """What was scored, compared with the baseline and gated, as a report; earlier runs' figures are looked up."""
    from slm.report import summary

    against = None if baseline is None else models[baseline]
    differences, verdicts = [], []
    for place, scored in enumerate(models):
        compare = against is not None and place != baseline
        differences.append(_differences(scored, against, prompt_set) if compare else {})
        gated = () if place == baseline and len(models) > 1 else thresholds
        figures = against.metrics if compare else None
        verdicts.append(gate.decide(gated, scored.metrics | scored.estimates, differences[-1], figures))
    machine = environment.describe()
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "run": mlflow_client.quiet_mlflow().active_run().info.run_id,
        "commit": machine["git_commit"][:12] + (" and uncommitted changes" if machine["git_dirty"] else ""),
        "machine": f"{machine['cpu']}, {machine['cores']} cores",
    }
    history = tuple(earlier_runs.history(prompt_set.sha256, scored.model.name, scored.estimates) for scored in models)
    return summary.Report(
        title=title,
        prompt_set=prompt_set,
        models=tuple(models),
        verdict=worst(verdicts),
        verdicts=tuple(verdicts),
        baseline=baseline,
        differences=tuple(differences),
        history=history,
        facts={name: value for name, value in facts.items() if value},
    )


def _differences(candidate, baseline, prompt_set) -> dict:
    if hasattr(candidate, "buckets"):
        from slm.engines.spark import sums

        return sums.differences(candidate, baseline)
    from slm.verdict import estimation

    return estimation.differences(candidate, baseline, prompt_set)


def _tag_version(scored, verdict: gate.Verdict, found) -> None:
    """What was found, on the registered version that was scored, where it is one."""
    from slm.report import summary
    from slm.verdict import scored_model

    version = scored.model.version
    if version:
        tags = {"prompts": found.prompt_set.name, "prompts.sha256": found.prompt_set.sha256, "gate": verdict.state}
        tags |= {"evaluation.run": found.facts["run"], "git_commit": environment.describe()["git_commit"]}
        tags[manifest.TAG] = scored.model.manifest_sha256  # equal to what is recorded, where something is
        for name, figure in scored.estimates.items():
            if "/" not in name:
                tags[name if name == scored_model.OVERALL else f"score.{name}"] = summary.estimate(figure)
        registry.tag_version(*version, {name: value for name, value in tags.items() if value})


def worst(verdicts: Sequence[gate.Verdict]) -> gate.Verdict:
    """One verdict over several models: the worst state, and every check."""
    checks = tuple(check for verdict in verdicts for check in verdict.checks)
    states = {check.state for check in checks}
    return gate.Verdict(next((s for s in ("regress", "inconclusive", "pass") if s in states), "none"), checks)


def show_answers(results: Sequence[tuple], prompt_set: prompt_sets.PromptSet) -> None:
    """The answers in MLflow's evaluation view; a row that didn't get there is told, and costs nothing else."""
    from slm.report import traces

    experiment = mlflow_client.quiet_mlflow().active_run().info.experiment_id
    for scored, run_id in results:
        start = time.time()
        shown = traces.log(scored.samples, prompt_set.prompts, run_id, experiment, scored.model.model_id, start)
        if shown.reason:
            console.out.print(f"{scored.model.label}: {shown}", markup=False)


def alias_version(uri: str, alias: str) -> str:
    """The version that `alias` has now, of the registered model that `uri` names a version of; "" where none."""
    version = model_uri.registered_version(uri)
    return registry.alias_version(version[0], alias) if version and alias else ""


def promote(uri: str, alias: str, before: str, manifest_sha256: str) -> None:
    """Moves the registry alias to the version that `uri` names; `before` is the version it had when the run began.

    The version must be recorded to have the files that were scored, by the hash of their manifest.

    Raises:
        Unavailable: somebody else moved it since, or recorded other files.
    """
    name, version = model_uri.registered_version(uri)
    if set(registry.recorded_manifests(uri)) != {manifest_sha256}:
        raise Unavailable(
            f"alias: {uri} isn't recorded to have the files that were scored ({manifest.TAG} "
            f"{manifest_sha256[:12]}); nothing was moved: run again"
        )
    now = registry.alias_version(name, alias)
    if now != before:
        moved = f"was {before or 'not set'} when this run began and is {now or 'not set'} now"
        raise Unavailable(f"alias: {name}@{alias} {moved}; version {version} passed and nothing was moved: run again")
    registry.set_alias(name, alias, version)
    console.out.print(f"{name}@{alias} is now version {version}" + (f", was {before}" if before != version else ""))
