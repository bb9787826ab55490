"""Reads prompt sets that go on changing: MLflow's traces of an experiment, and MLflow's evaluation datasets.

    traces:phi3-production?days=7&limit=200
    datasets:support-questions

The rows are written as JSONL, and the rooms below read that file as any prompt set. slm/tracking/frozen_prompts.py
keeps the file for the run. Traces that evaluations wrote are left out: their prompts are from a prompt set.

Not covered: traces whose root span has the inputs of a program of the user's own, with the chat in a span below it.
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from slm.base.errors import BadInput
from slm.base.hashing import digest
from slm.base.wording import counted, did_you_mean, quoted
from slm.prompts import chat_requests
from slm.prompts.prompt_sets import ROWS
from slm.tracking import mlflow_client

TRACES, DATASETS = "traces:", "datasets:"
SCHEMES = (TRACES, DATASETS)
LIMIT = 1000  # rows, unless the address says another number
MOST_TRACES = 100_000  # of an experiment, the newest first
PAGE = 500  # descriptions of traces in one answer of the server
TOGETHER = 64  # traces that are read at once, by READERS threads
READERS = 8
SESSION = "mlflow.trace.session"
OF_AN_EVALUATION = "mlflow.eval.requestId"  # a tag
LOST = "spans that can't be read"
HAS = {chat_requests.NO_CHAT: "without a chat"}


@dataclass(frozen=True)
class Traces:
    """What `traces:EXPERIMENT?days=7&limit=200&seed=0&filter=…` asks for."""

    experiment: str  # a name or an id
    days: float = math.inf
    limit: int = LIMIT
    seed: int = 0
    filter: str = ""  # in MLflow's language


def is_live(given: str) -> bool:
    """Whether a prompt set is read from traces or from a dataset."""
    return given.startswith(SCHEMES)


def name_of(given: str) -> str:
    """The name of the set's file, without the suffix."""
    plain = f"traces-{read(given).experiment}" if given.startswith(TRACES) else given.removeprefix(DATASETS)
    return re.sub(r"[^\w.-]+", "-", plain)[:100].strip(".-") or "prompts"


def read(given: str) -> Traces:
    """Reads an address of traces.

    Raises:
        BadInput: it names no experiment, or an option is unknown or has an impossible value.
    """
    name, _, options = given.removeprefix(TRACES).partition("?")
    if not name.strip():
        raise BadInput(f"prompts: {quoted(given)} names no experiment; write traces:NAME?days=7")
    found: dict[str, Any] = {}
    for option, text in parse_qsl(options, keep_blank_values=True):
        kinds = {"days": float, "limit": int, "seed": int, "filter": str}
        if option in found:
            raise BadInput(f"prompts: {option} of the traces is given twice")
        if option not in kinds:
            hint = did_you_mean(option, kinds)
            raise BadInput(f"prompts: traces have no option {quoted(option)}{hint}; there are {', '.join(kinds)}")
        try:
            found[option] = kinds[option](text)
        except ValueError:
            raise BadInput(f"prompts: {option}={text} of the traces is no number; write one such as 7") from None
    asked = Traces(unquote(name), **found)
    if not (asked.days > 0 and 1 <= asked.limit <= ROWS):
        raise BadInput(f"prompts: traces take days above 0 and a limit from 1 to {ROWS:,}; not {quoted(options)}")
    return asked


def written(given: str, folder: Path) -> tuple[Path, str]:
    """Writes the rows into a JSONL file in `folder`. Returns the file, and a line on what the rows are of.

    Raises:
        BadInput: there is no such experiment or dataset, or no row.
    """
    rows, told = _of_traces(read(given)) if given.startswith(TRACES) else _of_dataset(given.removeprefix(DATASETS))
    if not rows:
        raise BadInput(f"there is no row: {told}")
    path = folder / f"{name_of(given)}.jsonl"
    with path.open("x", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    return path, told


# ---------------------------------------------------------------------------------------------------------------------
# Traces


def _of_traces(asked: Traces) -> tuple[list[dict[str, Any]], str]:
    """At most `limit` rows, drawn by the seed. A trace keeps its place in the draw when others are added.

    A row has what people said of its conversation in any trace, drawn or not.
    """
    client = mlflow_client.quiet_mlflow().MlflowClient()
    infos = list(_described(client, asked))
    answered = [info for info in infos if info.state == "OK" and OF_AN_EVALUATION not in info.tags]
    evaluated = sum(OF_AN_EVALUATION in info.tags for info in infos)
    answered.sort(key=lambda info: digest([asked.seed, info.trace_id]))
    rows: dict[str, dict[str, Any]] = {}
    left: Counter[str] = Counter()
    looked = repeated = 0
    for info, inputs in _with_inputs(client, answered):
        if len(rows) == asked.limit:
            break
        looked += 1
        try:
            row = _row(info, inputs)
        except chat_requests.LeftOut as why:
            left[str(why)] += 1
            continue
        if row["id"] in rows:
            repeated += 1
            _merge(rows[row["id"]], row)
        else:
            rows[row["id"]] = row
    for info, inputs in _with_inputs(client, [info for info in answered[looked:] if any(_said(info))]):
        with suppress(chat_requests.LeftOut):
            row = _row(info, inputs)
            if row["id"] in rows:
                _merge(rows[row["id"]], row)
    failed = len(infos) - len(answered) - evaluated
    told = [f"{failed:,} failed"] if failed else []
    told += [f"{evaluated:,} of evaluations"] if evaluated else []
    told += [f"{number:,} {HAS.get(why, f'with {why}')}" for why, number in sorted(left.items())]
    told += [f"{repeated:,} with the messages of another"] if repeated else []
    told += [f"{len(answered) - looked:,} not drawn"] if looked < len(answered) else []
    line = f"{counted(len(rows), 'row')} of {counted(len(infos), 'trace')} in {asked.experiment}"
    line += " (the newest ones)" if len(infos) == MOST_TRACES else ""
    return list(rows.values()), line + (f"; left out: {', '.join(told)}" if told else "")


def _described(client, asked: Traces) -> Iterator[Any]:
    """The descriptions of the traces, without their spans, the newest first."""
    rules = [asked.filter.strip()] if asked.filter.strip() else []
    rules.append(f"timestamp_ms <= {int(time.time() * 1000)}")  # traces that arrive meanwhile would move the pages
    if math.isfinite(asked.days):
        rules.append(f"timestamp_ms > {int((time.time() - asked.days * 86400) * 1000)}")
    words = {
        "locations": [_experiment_id(client, asked.experiment)],
        "filter_string": " AND ".join(rules),
        "order_by": ["timestamp_ms DESC"],
        "include_spans": False,
    }
    token, number = None, 0
    while number < MOST_TRACES:
        page = client.search_traces(**words, max_results=min(PAGE, MOST_TRACES - number), page_token=token)
        yield from (trace.info for trace in page)
        token, number = page.token, number + len(page)
        if not token:
            return


def _experiment_id(client, named: str) -> str:
    from mlflow import MlflowException

    found = client.get_experiment_by_name(named)
    if found is None and named.isdecimal():
        with suppress(MlflowException):  # there is none with this id
            found = client.get_experiment(named)
    if found is None or found.lifecycle_stage != "active":
        names = [one.name for one in client.search_experiments(max_results=1000)]
        raise BadInput(f"there is no experiment {quoted(named)}{did_you_mean(named, names)}; name one, or its id")
    return found.experiment_id


def _with_inputs(client, infos: list) -> Iterator[tuple[Any, object]]:
    """Each trace with the inputs of its root span, in the order of `infos`. LOST where they can't be read."""
    with ThreadPoolExecutor(READERS) as threads:
        for first in range(0, len(infos), TOGETHER):
            some = infos[first : first + TOGETHER]
            yield from zip(some, threads.map(lambda info: _inputs(client, info.trace_id), some), strict=True)


def _inputs(client, trace_id: str) -> object:
    from mlflow import MlflowException

    try:
        spans = client.get_trace(trace_id, display=False).data.spans
    except MlflowException as error:
        if mlflow_client.is_infrastructure(error):
            raise
        return LOST  # the trace was deleted meanwhile, or its spans are damaged
    root = next((span for span in spans if span.parent_id is None), None)
    return root.inputs if root else None


def _row(info, inputs: object) -> dict[str, Any]:
    from slm.answers import asking

    if inputs is LOST:
        raise chat_requests.LeftOut(LOST)
    row = chat_requests.chat(inputs)
    try:
        asking.check_response_formats([chat_requests.checked(row)])
    except BadInput:
        raise chat_requests.LeftOut(chat_requests.UNREADABLE) from None
    expectations, feedback = _said(info)
    row = {"id": chat_requests.identity(row)} | row
    row["cluster"] = chat_requests.cluster(row, info.trace_metadata.get(SESSION, ""))
    _merge(row, {"expected": chat_requests.expected(expectations), "tags": chat_requests.tags(feedback)})
    chat_requests.checked(row)
    return row


def _said(info) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """What is expected of the answer, and what people said of it, each as (name, value). No judge's feedback."""
    valid = [one for one in info.assessments if getattr(one, "valid", None) is not False]
    people = [one for one in valid if one.feedback is not None and one.source.source_type == "HUMAN"]
    return [(one.name, one.value) for one in valid if one.expectation is not None], [
        (one.name, one.value) for one in people
    ]


def _merge(row: dict[str, Any], other: dict[str, Any]) -> None:
    """Adds what people said of the same conversation elsewhere."""
    for field in ("expected", "tags"):
        texts = sorted({*row.get(field, ()), *other.get(field, ())})
        if texts:
            row[field] = texts


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


def _of_dataset(named: str) -> tuple[list[dict[str, Any]], str]:
    """The records in MLflow's shape. A record with a chat becomes our row; `fields` can map the inputs of another."""
    from mlflow import MlflowException
    from mlflow.genai import datasets

    mlflow_client.quiet_mlflow()
    try:
        found = datasets.get_dataset(**{"dataset_id" if re.fullmatch(r"d-[0-9a-f]{32}", named) else "name": named})
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise BadInput(f"there is no dataset {quoted(named)}; name one of mlflow.genai.datasets, or its id") from None
    records = sorted(found.to_df().to_dict("records"), key=lambda record: record["dataset_record_id"])
    rows = [_of_record(record) for record in records]
    return rows, f"{counted(len(rows), 'row')} of the dataset {found.name}, {found.dataset_id}"


def _of_record(record: dict[str, Any]) -> dict[str, Any]:
    expectations = record["expectations"] or {}
    row: dict[str, Any] = {"id": record["dataset_record_id"]}
    try:
        row |= chat_requests.chat(record["inputs"])
    except chat_requests.LeftOut:  # the check of rows says what is wrong, unless `fields` maps the record
        return row | {"inputs": record["inputs"], "expectations": expectations}
    source = getattr(record["source"], "source_data", None) or {}
    row["cluster"] = chat_requests.cluster(row, source.get("session_id") or "")
    told = {name: value for name, value in (record["tags"] or {}).items() if not name.startswith("mlflow.")}
    said = chat_requests.expected(expectations.items())
    _merge(row, {"expected": said, "tags": chat_requests.tags(told.items())})
    return row
