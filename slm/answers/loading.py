"""What a prompt set can be put to: a logged model or an endpoint, loaded and asked in the form that it takes.

| logged as | asked with |
|---|---|
| a model of this project | its wrapper's `answers`, which its `predict` is made of, in batches |
| ChatModel, ChatAgent, ResponsesAgent, llm/v1/chat, a pyfunc with a `messages` column | one conversation per call |
| llm/v1/completions, a text-generation pipeline, a pyfunc with one text column or list[str] | one text per call |
| an endpoint | slm/answers/endpoints.py, several requests at a time |

slm/answers/forms.py reads the form from the logged description, before anything is generated. slm/models/wrappers.py
opens a model of this project, without code from its folder. MLflow loads a model of others, and then runs the code that
was logged with the model. `trust_code` must allow that.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from slm.answers import endpoints, forms, side_by_side
from slm.base import cache, console, environment, model_uri
from slm.base.errors import BadInput, exhausted
from slm.base.hashing import digest
from slm.base.wording import one_line
from slm.models import chat_model, manifest, model_logging, wrappers
from slm.prompts.prompt_rows import Prompt


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be asked: in memory, or at an address."""

    label: str
    uri: str  # an endpoint's: its address and name, without credentials
    model_id: str | None
    pyfunc: object  # an endpoint's: its Endpoint; None for a model of this project
    wrapper: object | None  # ours, when the model was logged here
    form: forms.Form
    ask: Callable[["LoadedModel", list[dict], int], Iterator[tuple[int, dict]]]  # rows, batch size -> place, answer
    row_timeout: float  # seconds after which a row that has no answer has failed; 0: none
    sha256: str  # "" for an endpoint: unknown
    bytes: int
    load_seconds: float
    name: str  # by which earlier runs of it are found: the registered model's, the checkpoint's, the endpoint's
    code_sha256: str = ""  # of the wrapper that runs
    manifest_sha256: str = ""  # of all its files; "" for an endpoint
    unchanged: Callable[[], None] | None = None  # raises BadInput once its files are others
    identity: str = ""  # one hash over what its answers depend on; an endpoint's address
    facts: dict = field(default_factory=dict)  # for the run's record: model, template, used, origin

    @property
    def is_chat(self) -> bool:
        return self.form.is_chat

    @property
    def version(self) -> tuple[str, str] | None:
        """Name and version in the registry, where it was named by these."""
        return model_uri.registered_version(self.uri)

    @property
    def ignored(self) -> tuple[str, ...]:
        """The generation parameters that it doesn't take, and so isn't given."""
        return tuple(name for name in forms.NAMES if name not in self.form.slots)


def load(
    label: str, uri: str, folder: Path | None, settings: dict, recorded: Iterable[str] = (), trust_code: bool = False
) -> LoadedModel:
    """Loads the model in `folder` (what `uri` names), overriding its settings where these have a value.

    `settings` may also hold `row_timeout`, which is the caller's and not the model's. `recorded` are the hashes of its
    manifest (tracking.recorded_manifests).

    Raises:
        BadInput: it is no pyfunc, its files were changed, its code isn't trusted, or its form isn't understood.
        Unavailable: an endpoint doesn't answer, or refuses the key.
    """
    row_timeout = float(settings.get("row_timeout") or 0)
    if endpoints.is_endpoint(uri):
        return _load_endpoint(label, uri, row_timeout)
    import mlflow

    try:
        description = mlflow.models.Model.load(str(folder))
        if "python_function" not in description.flavors:
            raise BadInput(f"{uri} has no python_function flavor")
    except (mlflow.exceptions.MlflowException, ValueError) as error:
        raise BadInput(f"{uri}: {error}") from None
    registered = model_uri.registered_version(uri)
    if not wrappers.is_ours(description):
        wrappers.check(uri, description, trust_code, None)
        return _load_stranger(label, uri, folder, description, recorded, row_timeout)
    needed = folder / "requirements.txt"
    for difference in environment.differing(needed.read_text("utf-8").splitlines() if needed.exists() else ()):
        console.out.print(f"{label}: was logged for {difference}", markup=False)
    override = {name: value for name, value in settings.items() if name != "row_timeout"}
    try:
        opened = wrappers.opened(uri, folder, recorded, trust_code, override, reset_peak_memory)
    except Exception as error:
        about_gpu = any(word in str(error).lower() for word in ("cuda", "nvidia"))
        if isinstance(error, BadInput) or not about_gpu or exhausted(error):
            raise  # one that was logged to run on a GPU says what is missing here
        raise BadInput(f"{uri} can't be loaded: {one_line(error)}") from error
    description, wrapper = opened.description, opened.wrapper
    return LoadedModel(
        label=label,
        uri=uri,
        model_id=description.model_id,
        pyfunc=None,
        wrapper=wrapper,
        form=forms.form_of(uri, description, folder),
        ask=_ask_wrapper,
        row_timeout=row_timeout,
        sha256=description.metadata["model.sha256"],
        bytes=description.model_size_bytes or 0,
        load_seconds=opened.load_seconds,
        name=registered[0] if registered else f"{wrapper.name}, {label}",
        code_sha256=opened.code_sha256,
        manifest_sha256=opened.manifest.sha256,
        unchanged=opened.unchanged,
        identity=identity(description, opened.code_sha256),
        facts=_facts(opened),
    )


def _load_stranger(
    label: str, uri: str, folder: Path, description, recorded: Iterable[str], row_timeout: float
) -> LoadedModel:
    """A model that others logged, by MLflow, which runs what lies in its folder."""
    import mlflow

    form = forms.form_of(uri, description, folder)
    sys.dont_write_bytecode = True  # into the store's own folder
    try:
        before = manifest.stamp(folder)
        found = manifest.check(folder, recorded)
        reset_peak_memory()
        start = time.perf_counter()
        if any(folder.rglob("__pycache__")):  # Python would run this bytecode, which no manifest covers
            sys.pycache_prefix = str(cache.private("bytecode"))
        pyfunc = mlflow.pyfunc.load_model(str(folder))
        seconds = time.perf_counter() - start
        if manifest.stamp(folder) != before:
            manifest.check(folder, [found.sha256])
    except Exception as error:
        raise BadInput(f"{uri} can't be loaded: {one_line(error)}") from error
    registered = model_uri.registered_version(uri)
    return LoadedModel(
        label=label,
        uri=uri,
        model_id=description.model_id,
        pyfunc=pyfunc,
        wrapper=None,
        form=form,
        ask=_ask_pyfunc,
        row_timeout=row_timeout,
        sha256=found.sha256,
        bytes=description.model_size_bytes or 0,
        load_seconds=seconds,
        name=registered[0] if registered else label,
        manifest_sha256=found.sha256,
        identity=found.sha256,
        facts={"template": _template_of(form)},
    )


def identity(description, code_sha256: str) -> str:
    """What the answers of a model of ours depend on, as one hash: weights, settings, template, wrapper's code.

    `description` is MLflow's (Model or ModelInfo): the weights need not be here.
    """
    metadata = description.metadata
    settings = dict(description.flavors["python_function"].get("config") or {})
    settings.pop("model_name", None)  # answers tell it, and don't depend on it
    names = ("model.sha256", "chat_template", "special_tokens", "schema")
    return digest([[metadata.get(name) for name in names], settings, code_sha256])


def sent(model: LoadedModel, prompt: Prompt, generation: dict) -> tuple[str, list[int] | None]:
    """The text that a prompt reaches the model as, and its token ids; None where the model keeps them to itself."""
    row = row_of(model, prompt, 0, generation)
    if "refused" in row:
        return f"refused: {row['refused']}", None
    if model.wrapper is None:
        content = row["row"][model.form.column]
        return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), None
    try:
        ids = model.wrapper.prepare(row)[0].prompt
        return model.wrapper.render(row["messages"]) if model.form.is_chat else row["prompt"], ids
    except ValueError as refusal:  # Refused, of the file that was logged
        return f"refused: {refusal}", None


def answers(model: LoadedModel, wanted: list[tuple[Prompt, int]], generation: dict) -> Iterator[tuple]:
    """Yields ((prompt, repeat), answer) in the order they are finished.

    An answer is {text, finish_reason, prompt_tokens, output_tokens, seconds, error}: tokens None where the model
    doesn't count, error "" where there is none.

    Raises:
        Unavailable: an endpoint is gone.
    """
    rows = [row_of(model, prompt, repeat, generation) for prompt, repeat in wanted]
    for key, row in zip(wanted, rows, strict=True):
        if "refused" in row:
            yield key, _failed(row["refused"], 0.0)
    asked = [place for place, row in enumerate(rows) if "refused" not in row]
    batch_size = generation.get("batch_size") or 0
    for place, answer in model.ask(model, [rows[place] for place in asked], batch_size):
        yield wanted[asked[place]], answer


def row_of(model: LoadedModel, prompt: Prompt, repeat: int, generation: dict) -> dict:
    """All that is sent for a prompt, as plain data: {"row", "params", "to"}, or the flat row of a model of ours.

    `to` is an endpoint's address, "" for a model whose SHA-256 tells what it is. A conversation that the model's chat
    template doesn't take is {"refused": why}.
    """
    form = model.form
    messages = [dict(message) for message in prompt.messages or ({"role": "user", "content": prompt.prompt},)]
    try:
        content = messages if form.is_chat else forms.text_of(messages, form)
    except chat_model.Refused as refusal:
        return {"refused": str(refusal)}
    row, params = {form.column: content} | form.fixed, {}
    for name, slot in form.slots.items():
        value = generation["seed"] + repeat if name == "seed" else generation[name]
        if name == "temperature":
            value = max(value, form.lowest_temperature)
        if name == "stop" and not value and model.wrapper is None:
            continue  # asks for nothing
        (params if slot.is_param else row)[slot.name] = forms.fitted(value, slot.kind)
    if form.do_sample:
        params["do_sample"] = generation["temperature"] > 0
    if model.wrapper is not None:
        return row
    return {"row": row, "params": params, "to": "" if model.sha256 else model.uri}


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def _ask_wrapper(model: LoadedModel, rows: list[dict], batch_size: int) -> Iterator[tuple[int, dict]]:
    """Rows are generated together: where none is finished for `row_timeout` seconds, all that are left have failed."""
    found = model.wrapper.answers(rows, {}, batch_size)
    if not model.row_timeout:
        for place, [answer] in found:
            yield place, vars(answer)
        return
    left = set(range(len(rows)))
    try:
        for place, [answer] in side_by_side.drawn(found, model.row_timeout):
            left.remove(place)
            yield place, vars(answer)
    except side_by_side.TookTooLong as late:
        for place in sorted(left):
            yield place, _failed(str(late), model.row_timeout)


def _ask_pyfunc(model: LoadedModel, rows: list[dict], batch_size: int) -> Iterator[tuple[int, dict]]:
    """One call per row; texts go `batch_size` to a call where the user asked for that.

    A call that raises, or answers another number of rows, is made again row by row: only the bad row fails. With a
    `row_timeout`, each row is a call of its own, in a thread that is left behind when it takes longer.
    """
    if model.row_timeout:
        for place, found in side_by_side.answered(lambda row: _predicted(model, [row])[0], rows, 1, model.row_timeout):
            late = isinstance(found, side_by_side.TookTooLong)
            yield place, _failed(str(found), model.row_timeout) if late else found
        return
    size = 1 if model.is_chat else max(batch_size, 1)
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        alike = all(row["params"] == batch[0]["params"] for row in batch)
        found = _predicted(model, batch) if alike else []
        if len(found) == len(batch):
            yield from enumerate(found, first)
            continue
        for place, row in enumerate(batch, first):
            yield place, _predicted(model, [row])[0]


def _predicted(model: LoadedModel, rows: list[dict]) -> list[dict]:
    """The answers of one call, or the one failure of it."""
    import pandas as pd

    form, params = model.form, rows[0]["params"] or None
    fields = [row["row"] for row in rows]
    if form.is_chat and not form.as_list:
        content = dict(fields[0])
    elif form.as_list:
        content = fields if form.column else [row[""] for row in fields]
    else:
        content = pd.DataFrame(fields)
    start = time.perf_counter()
    try:
        outputs = forms.rows_of(model.pyfunc.predict(content, params=params))
        if len(rows) == 1 and len(outputs) != 1:
            raise ValueError(f"one row was asked, and {len(outputs)} answered")
        found = [forms.answer_of(output) for output in outputs]
    except Exception as error:  # what a stranger's model raises is its rows' failure, not this program's
        return [_failed(one_line(error), time.perf_counter() - start)]
    seconds = time.perf_counter() - start
    if form.echoes:
        for answer, row in zip(found, fields, strict=False):
            answer["text"] = answer["text"].removeprefix(row[form.column])
    return [answer | {"seconds": seconds} for answer in found]


def _load_endpoint(label: str, uri: str, row_timeout: float) -> LoadedModel:
    start = time.perf_counter()
    endpoint = endpoints.connect(uri)
    slots = {name: forms.Slot(theirs) for name, theirs in endpoint.fields.items()}
    form = forms.Form(endpoint.column, endpoint.column == "messages", slots, endpoint.fixed)
    seconds = time.perf_counter() - start
    return LoadedModel(
        label=label,
        uri=endpoint.uri,
        model_id=None,
        pyfunc=endpoint,
        wrapper=None,
        form=form,
        ask=_ask_endpoint,
        row_timeout=row_timeout,
        sha256="",
        bytes=0,
        load_seconds=seconds,
        name=endpoint.uri,
        identity=endpoint.uri,
    )


def _ask_endpoint(model: LoadedModel, rows: list[dict], batch_size: int) -> Iterator[tuple[int, dict]]:
    bodies = [row["row"] for row in rows]
    for place, body, seconds in endpoints.answers(model.pyfunc, bodies, batch_size, model.row_timeout):
        try:
            answer = _failed(body, seconds) if isinstance(body, str) else forms.answer_of(body) | {"seconds": seconds}
        except Exception as error:  # a server of any make: what it says wrongly is its row's failure
            answer = _failed(one_line(error), seconds)
        yield place, answer


def _failed(reason: str, seconds: float) -> dict:
    return {
        "text": "",
        "finish_reason": "error",
        "prompt_tokens": None,
        "output_tokens": None,
        "seconds": seconds,
        "error": reason,
    }


def _facts(opened: wrappers.Opened) -> dict:
    """What a run's record says of a model of ours."""
    metadata, wrapper = opened.description.metadata, opened.wrapper
    files = {name: record.sha256 for name, record in opened.manifest.weights.items()}
    weights = {name: sha256 for name, sha256 in files.items() if name not in model_logging.TOKENIZER_FILES}
    precision = metadata.get("precision") or "as given"
    used = _used(opened, precision)
    return {
        "model": {
            "runtime": used.pop("runtime"),
            "precision": precision,
            "schema": metadata["schema"],
            # a model logged by reference has no files here
            "weights.sha256": digest(weights) if weights else metadata["model.sha256"],
        },
        "template": {
            "tokenizer.sha256": files.get("tokenizer.json"),
            "chat_template.sha256": digest([wrapper.template, wrapper.special_tokens]),
            "tells_date": "strftime_now" in wrapper.template,
        },
        "used": used,
        "origin": {name: metadata.get(name) for name in ("source", "revision")} | {"files": files},
    }


def _template_of(form: forms.Form) -> dict:
    """The template with which a stranger's text model is given conversations, where it has one."""
    given = digest([form.template, form.special_tokens]) if form.template else None
    return {"tokenizer.sha256": None, "chat_template.sha256": given, "tells_date": "strftime_now" in form.template}


def _used(opened: wrappers.Opened, precision: str) -> dict:
    """What a model of ours runs on, where its settings leave it to the wrapper as well."""
    settings, wrapper = opened.settings, opened.wrapper
    threads = int(settings.get("threads") or 0)
    if opened.providers is not None:
        listed = opened.providers
        return {
            "runtime": getattr(wrapper._runtime, "library", "onnxruntime-genai"),
            "execution_provider": settings.get("execution_provider") or ", ".join(listed) or "cpu",
            "dtype": precision,
            "threads": threads or chat_model.physical_cores(),
            "batch_size": wrapper.batch_size,
        }
    import torch

    network = wrapper._runtime._model  # "auto" as it turned out; the logged file has no word of its own for it
    dtype = str(network.dtype).removeprefix("torch.")
    return {
        "runtime": "transformers",
        "device": str(network.device),
        "dtype": next((short for short, name in chat_model.DTYPES.items() if name == dtype), dtype),
        "threads": threads or torch.get_num_threads(),
        "batch_size": wrapper.batch_size,
    }


def reset_peak_memory() -> None:
    """Starts the process's peak memory anew, where the kernel allows it (Linux, proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int | None:
    """The process's peak resident memory since the last reset; None where the system doesn't say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
