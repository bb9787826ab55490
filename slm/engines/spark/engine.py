"""The engine that answers prompts on Apache Spark. Its functions are those of slm/engines/engine.py's Engine.

Prompt sets and models may outgrow one machine. Spark reads the prompt set. Its workers validate each row, load the
logged model, answer and score, with the code that engine=local runs.

Not covered: YAML prompt sets, endpoints, judges, Spark Connect.
"""

import atexit
from contextlib import ExitStack
from dataclasses import replace

from slm.answers import endpoints
from slm.base import console
from slm.base.errors import BadInput
from slm.base.parameters import Parameters
from slm.engines import texts
from slm.engines.engine import Request
from slm.engines.spark import comparison, job, prompt_frame, scoring, sums, worker
from slm.models import checkpoints
from slm.prompts import prompt_sets, readers, row_mapping, system_prompts
from slm.tracking import downloads, frozen_prompts, run_records, system_text, tags
from slm.verdict import reproduction
from slm.verdict.statistics import Difference

DOWNLOAD_BYTES = 16 * readers.FILE_BYTES  # of a prompt set that the driver downloads; Spark reads others by itself


def check(args: Parameters) -> None:
    if args.judge:
        raise BadInput("judge: is not asked from Spark's workers; leave it empty, or engine local")
    uris = [uri.strip() for uri in (*args.model_uris.split(","), args.baseline)]
    for uri in filter(endpoints.is_endpoint, uris):
        raise BadInput(f"engine: spark scores logged models, and {uri} is an endpoint; leave engine local")


def read_prompts(args: Parameters) -> prompt_frame.SparkPromptSet:
    location = given = args.prompts
    system = system_text.read(args.system_prompt)
    mapping = row_mapping.read(args.fields, args.expected_pattern, system)
    if frozen := frozen_prompts.file(args, DOWNLOAD_BYTES):
        location = f"file://{frozen}"
    elif given.startswith((*downloads.URI_SCHEMES, "http://", "https://")):
        copies = ExitStack()  # Spark reads a file again and again
        atexit.register(copies.close)
        location = f"file://{copies.enter_context(downloads.file(given, DOWNLOAD_BYTES))}"
    elif "://" not in given:
        location = f"file://{checkpoints.existing('prompts', given).resolve()}"
    found = prompt_frame.read_prompts(location, given, args.spark_master, args.scorers, args.repeats, mapping)
    if told := prompt_sets.unnamed_note(found.unnamed):
        console.out.print(f"{found.name}: {told}", markup=False)
    if found.left_out:
        console.out.print(f"{found.name}: {row_mapping.left_out_note(found.left_out)}", markup=False)
    if system and (kept := system_prompts.note(found.prompts, system)):
        among = "" if found.is_whole else f"of the {len(found.prompts):,} rows that the report shows, "
        console.out.print(f"{found.name}: {among}{kept}", markup=False)
    return found


def score(request: Request, prompt_set: prompt_frame.SparkPromptSet) -> sums.SparkScoredModel:
    """Beyond the shown answers, figures come from sums that the workers make. All answers are in the artifacts."""
    label, asked = request.label, request.record
    if not prompt_set.is_whole:  # its prompts are a sample
        asked["prompts"] = {"rows": prompt_set.rows, "sha256": prompt_set.sha256}
    parameters = asked["parameters"]
    task = job.job(label, request.uri, prompt_set, parameters, request.row_timeout, request.trust_code)
    with console.step(f"Loading {label} on a worker"):
        model = scoring.described(prompt_set, task)
    fingerprint = reproduction.fingerprint(asked, model.identity)
    run_records.tag_active_run({tags.ENGINE: "spark", tags.FINGERPRINT: fingerprint})  # now, for a run that takes over
    with console.step(f"Scoring {label} on {prompt_set.rows:,} prompts in {prompt_set.buckets} parts"):
        scored = scoring.score(task, model, prompt_set, request.run_id, fingerprint, request.reuse)
    rows = int(scored.metrics["rows"])
    if len(scored.samples) < rows:
        shown = f"of {rows:,} answers, samples.jsonl and the report show {len(scored.samples):,}"
        console.out.print(f"{label}: {shown}; all are in {worker.FOLDER}, and in every figure")
    against = None
    if request.reference and request.is_baseline:
        request.reference.elsewhere = comparison.baseline(task, scored, prompt_set, request.reference.is_sample)
    elif request.reference:
        against = request.reference.elsewhere
        with console.step(f"Comparing {label} token by token on a worker"):
            scored = replace(scored, fidelity=comparison.compared(against, task, prompt_set))
    if prompt_set.texts:
        with console.step(f"Reading texts with {label} on a worker"):
            scored = texts.added(scored, comparison.with_texts(against, task, prompt_set, request.reuse))
    return scored


def differences(
    candidate: sums.SparkScoredModel, baseline: sums.SparkScoredModel, prompt_set: prompt_frame.SparkPromptSet
) -> dict[str, Difference]:
    return sums.differences(candidate, baseline)


def release(prompt_set: prompt_frame.SparkPromptSet) -> None:
    prompt_frame.release(prompt_set)
