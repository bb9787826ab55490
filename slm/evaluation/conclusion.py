"""The end of an evaluation: compare, gate, log and show. Each step is a function, and `finish` calls them in order."""

import datetime
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from slm.base import console, credentials, environment, parameters
from slm.base.parameters import Parameters
from slm.engines import engine
from slm.evaluation.scoring import Result
from slm.models import manifest
from slm.prompts import prompt_sets
from slm.report import summary
from slm.tracking import earlier_runs, frozen_prompts, mlflow_client, registry, run_records, system_text, tags
from slm.verdict import estimation, fidelity, gate, perplexity, reproduction, scored_model, statistics
from slm.verdict.scored_model import OVERALL

HEADLINE = (  # the metrics that the parent run has too, of the candidate
    *(f"{OVERALL}/{figure}" for figure in ("mean", "ci95_low", "ci95_high")),
    *(f"difference/{OVERALL}/{figure}" for figure in ("mean", "ci95_low", "ci95_high")),
    *(f"fidelity/{name}/{figure}" for name in ("kl", "top1") for figure in ("mean", "ci95_low", "ci95_high")),
    *(f"{perplexity.NLL}/{figure}" for figure in ("mean", "ci95_low", "ci95_high")),
    "perplexity",
    "rows",
    "rows_failed",
    "rows_unscored",
    "rows_cut/share",
    "output_tokens_per_second",
    "latency_seconds/p95",
)
COLOURS = {"pass": "bold green", "regress": "bold red", "inconclusive": "bold yellow", "none": "bold"}


def finish(
    title: str,
    results: Sequence[Result],
    args: Parameters,
    prompt_set: prompt_sets.PromptSet,
    thresholds: tuple[gate.Threshold, ...] = (),
    baseline: int | None = None,
    is_first: bool = False,
) -> gate.Verdict:
    """Compares and gates the scored models, logs reports into the child runs and the active run, and prints the table.

    `baseline` is the place in `results` of the model that the others are compared with. `is_first` is as in
    `gate.decide`.
    """
    used = engine.chosen(args)
    report = compared(title, [scored for scored, _ in results], used, prompt_set, thresholds, baseline, is_first)
    tag_models(report, results)
    record_run(report, results, args, thresholds)
    put_headline(report)
    upload_reports(report, [run_id for _, run_id in results])
    show(report)
    used.release(prompt_set)
    return report.verdict


def compared(
    title: str,
    models: Sequence[scored_model.ScoredModel],
    used: engine.Engine,
    prompt_set: prompt_sets.PromptSet,
    thresholds: tuple[gate.Threshold, ...],
    baseline: int | None,
    is_first: bool = False,
) -> summary.Report:
    """Compares the models with the baseline and applies the gate. Looks up the figures of earlier runs."""
    against = None if baseline is None else models[baseline]
    differences: list[dict[str, statistics.Difference]] = []
    changes: list[dict[str, statistics.Estimate]] = []
    verdicts = []
    clusters = {prompt.id: prompt.cluster for prompt in prompt_set.prompts}
    for place, scored in enumerate(models):
        other = None if place == baseline else against
        differences.append({} if other is None else used.differences(scored, other, prompt_set))
        gated = () if place == baseline and len(models) > 1 else thresholds
        figures: dict[str, Any] = {**scored.metrics, **scored.estimates}
        theirs = None if other is None else other.metrics
        # flips are counted prompt by prompt, so all answers must be at hand
        whole = other is not None and all(len(model.samples) == model.metrics["rows"] for model in (scored, other))
        changes.append(estimation.changes(scored, other, prompt_set) if other and whole else {})
        not_compared = "fidelity=off"
        if scored.fidelity:
            changes[-1] |= fidelity.estimates(scored.fidelity, clusters)
            figures |= fidelity.plain_figures(scored.fidelity)
            not_compared = scored.fidelity.reason
        no_texts = ""
        if scored.texts:
            changes[-1] |= perplexity.pair_estimates(scored.texts)
            figures |= perplexity.estimates(scored.texts) | perplexity.plain_pair_figures(scored.texts)
            no_texts = perplexity.unread(scored.texts)
        figures |= changes[-1]
        verdicts.append(gate.decide(gated, figures, differences[-1], theirs, is_first, not_compared, no_texts))
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
        verdict=gate.worst(verdicts),
        verdicts=tuple(verdicts),
        baseline=baseline,
        differences=tuple(differences),
        changes=tuple(changes),
        history=history,
        facts={name: value for name, value in facts.items() if value},
    )


def tag_models(report: summary.Report, results: Sequence[Result]) -> None:
    """Writes differences and verdicts into each model's child run, and onto its registered version."""
    mlflow = mlflow_client.quiet_mlflow()
    client = mlflow.MlflowClient()
    for place, (scored, verdict, (_, run_id)) in enumerate(zip(report.models, report.verdicts, results, strict=True)):
        if report.baseline not in (None, place):
            with mlflow.start_run(run_id=run_id, nested=True):
                mlflow.log_metrics(pair_metrics(report, place), model_id=scored.model.model_id)
        client.set_tag(run_id, tags.GATE, verdict.state)
        if scored.model.version:
            tag_version(scored.model.version, scored, verdict, report, is_baseline=place == report.baseline)


def pair_metrics(report: summary.Report, place: int) -> dict[str, float]:
    """The metrics of a model beside the baseline: differences, flips and fidelity."""
    found = estimation.difference_metrics(report.differences[place]) | fidelity.as_metrics(report.changes[place])
    compared = report.models[place].fidelity
    found |= fidelity.plain_figures(compared) if compared else {}
    texts = report.models[place].texts
    return found | (perplexity.plain_pair_figures(texts) if texts else {})


def tag_version(
    version: tuple[str, str],
    scored: scored_model.ScoredModel,
    verdict: gate.Verdict,
    report: summary.Report,
    is_baseline: bool,
) -> None:
    """Writes scores and verdict onto a scored registered version, in the place of an earlier evaluation's.

    The tags tell of the evaluation that judged the version. So an evaluation in which it is the baseline, or which has
    no gate, doesn't replace those of one that judged it.
    """
    earlier = registry.version_tags(*version)
    is_judged = earlier.get(tags.GATE, "none") != "none"
    if not (tags.EVALUATION_RUN in earlier and (is_baseline or (is_judged and verdict.state == "none"))):
        found = {tags.PROMPTS: report.prompt_set.name, tags.PROMPTS_SHA256: report.prompt_set.sha256}
        found |= {tags.GATE: verdict.state, tags.EVALUATION_RUN: report.facts["run"]}
        found[tags.GIT_COMMIT] = environment.describe()["git_commit"]
        found[manifest.TAG] = scored.model.manifest_sha256  # equal to the recorded hash, if there is one
        for name, figure in scored.estimates.items():
            if scored_model.is_of_a_scorer(name, scored.estimates):
                found[tags.of_score(name, scored_model.OVERALL)] = summary.estimate(figure)
        found = {name: value for name, value in found.items() if value}
        stale = [name for name in earlier if tags.is_of_score(name) and name not in found]
        registry.tag_version(*version, found, removed=stale)


def record_run(
    report: summary.Report, results: Sequence[Result], args: Parameters, thresholds: tuple[gate.Threshold, ...]
) -> None:
    """Writes the active run's tags and environment.json, with everything that a repeat of the run needs."""
    mlflow = mlflow_client.quiet_mlflow()
    run_id = mlflow.active_run().info.run_id
    records = [scored.record for scored, _ in results]
    rules = [asdict(rule) for rule in thresholds]
    models = [(child, scored.record) for scored, child in results]
    whole = reproduction.whole_record(environment.describe(), models, report.baseline, rules)
    started = mlflow.MlflowClient().get_run(run_id).data
    plain = {name.removeprefix("cfg."): value for name, value in started.params.items() if name.startswith("cfg.")}
    given = {name: value for name, value in (started.params | plain).items() if not name.startswith("cfg.")}
    given["prompts"] = frozen_prompts.address(args, run_id)
    if system := report.prompt_set.system:
        given["system_prompt"] = system.source
        if system.source.startswith(system_text.REGISTRY):
            mlflow.MlflowClient().link_prompt_version_to_run(run_id, system.source)
    defaults = {name: parameters.written(default) for name, default in parameters.DEFAULTS.items()}
    whole["again"] = reproduction.again(started.tags, given, defaults, records, report.baseline)
    found = {tags.GATE: report.verdict.state, tags.PROMPTS_SHA256: report.prompt_set.sha256}
    found |= run_records.system_prompt(report.prompt_set)
    mlflow.set_tags(found | {tags.FINGERPRINT: whole["fingerprint"], tags.OUTPUTS_SHA256: whole["outputs"]["sha256"]})
    mlflow.MlflowClient().log_text(run_id, reproduction.as_json(whole), "evaluation/environment.json")


def put_headline(report: summary.Report) -> None:
    """Gives the active run what MLflow's table of runs shows: the name, the headline figures and the dataset.

    The figures are those of the candidate, or of the first one.
    """
    mlflow = mlflow_client.quiet_mlflow()
    place = report.candidates[0]
    figures = report.models[place].metrics | pair_metrics(report, place)
    kept = {name: figures[name] for name in HEADLINE if name in figures}
    run_id, now = mlflow.active_run().info.run_id, int(time.time() * 1000)
    metrics = [mlflow.entities.Metric(name, value, now, 0) for name, value in kept.items()]
    mlflow.MlflowClient().log_batch(run_id, metrics)  # log_metrics would link them to a model that the run logged
    run_records.log_dataset(report.prompt_set)
    run_records.name_run(run_id, summary.run_name(report))


def upload_reports(report: summary.Report, child_runs: Sequence[str]) -> None:
    """Uploads report.md, report.html and junit.xml into every run, and describes it. The active run also gets plots.

    `child_runs` has the order of the models.
    """
    from slm.report import html_page, plots

    mlflow = mlflow_client.quiet_mlflow()
    artifacts = {
        "report.md": summary.markdown(report),
        "report.html": html_page.render(report),
        "junit.xml": summary.junit(report),
    }
    description = f"**{summary.escaped(html_page.headline(report))}.**\n\n{artifacts['report.md']}"
    mlflow.set_tag(tags.NOTE, description)
    for place, run_id in enumerate(child_runs):
        told = f"**{summary.escaped(html_page.model_headline(report, place))}.**"
        mlflow.MlflowClient().set_tag(run_id, tags.NOTE, told)
    for run_id in (mlflow.active_run().info.run_id, *child_runs):
        for name, text in artifacts.items():
            mlflow.MlflowClient().log_text(run_id, text, f"evaluation/{name}")
    for name, figure in plots.figures(report).items():
        mlflow.log_figure(
            figure, f"evaluation/plots/{name}.png"
        )  # MLflow shows images of log_image below the parameters


def show(report: summary.Report) -> None:
    """Prints the table, the remarks, the rules and the verdict."""
    console.out.print()
    console.out.print(summary.table(report))
    for remark in report.remarks:
        console.out.print(remark, markup=False, style="yellow" if remark.startswith("warning: ") else None)
    for check in report.verdict.checks:
        console.out.print(f"  {check.state:12} {check.metric} {check.rule}: {check.reason}", markup=False)
    mlflow = mlflow_client.quiet_mlflow()
    server, run = credentials.scrubbed(mlflow.get_tracking_uri()), mlflow.active_run().info
    colour = COLOURS[report.verdict.state]
    verdict = f"gate: [{colour}]{report.verdict.state}[/{colour}]   run: {report.facts['run']}   tracking: {server}"
    console.out.print(verdict)
    console.out.print(f"report: {credentials.scrubbed(report_place(server, run))}", markup=False)


def report_place(server: str, run) -> str:
    """Where the report is: its file where this machine stores it, else the run's page, else the artifact's URI."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    if is_local_uri(run.artifact_uri):
        return f"{local_file_uri_to_path(run.artifact_uri)}/evaluation/report.html"
    if server.startswith(("http://", "https://")):
        return (
            f"{server.rstrip('/')}/#/experiments/{run.experiment_id}/runs/{run.run_id}/artifacts/evaluation/report.html"
        )
    return f"{run.artifact_uri}/evaluation/report.html"


def show_answers(results: Sequence[Result], prompt_set: prompt_sets.PromptSet) -> None:
    """Writes the answers to MLflow's evaluation view. Prints how many rows failed; they change nothing else."""
    from slm.report import traces

    experiment = mlflow_client.quiet_mlflow().active_run().info.experiment_id
    for scored, run_id in results:
        start = time.time()
        model_id = scored.model.model_id
        shown = traces.log(
            scored.samples, prompt_set.prompts, run_id, experiment, model_id, start, compared=scored.fidelity
        )
        if shown.reason:
            console.out.print(f"{scored.model.label}: {shown}", markup=False)
