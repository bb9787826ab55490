"""Loads a logged model or an endpoint, and sends prompts in the form that the model takes.

| model | one call takes |
|---|---|
| a model of this project | a batch. The call is the wrapper's `answers`, which `predict` also uses |
| ChatModel, ChatAgent, ResponsesAgent, llm/v1/chat, a pyfunc with a `messages` column | one conversation |
| llm/v1/completions, a text-generation pipeline, a pyfunc with one text column or list[str] | `batch_size` texts |
| an endpoint | one row. slm/answers/endpoints.py sends several requests at a time |

slm/answers/forms.py reads the form from the logged description, before the model generates anything.
slm/models/wrappers.py opens a model of this project and decides which copy of the wrapper runs. MLflow loads a model of
others, and then runs the code that was logged with the model. `trust_code` must allow this code.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from slm.answers import endpoints, forms, side_by_side
from slm.answers.asking import Answer, LoadedModel, ModelFacts, NoTokenScores, failed, text_sent
from slm.base import cache, console, environment, model_uri
from slm.base.errors import BadInput, exhausted
from slm.base.hashing import digest
from slm.base.wording import one_line
from slm.models import chat_model, manifest, model_logging, onnx_export, wrappers


class NotRead:
    """A model whose token probabilities can't be read. `reason` is the end of a sentence that starts with the model."""

    reason = ""

    def vocabulary(self) -> str:
        raise NoTokenScores(self.reason)

    def vocabulary_size(self) -> int:
        raise NoTokenScores(self.reason)

    def token_scores(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], see: chat_model.SeeDistributions | None
    ) -> Iterator[tuple[int, chat_model.TokenScores]]:
        raise NoTokenScores(self.reason)

    def text_of(self, token_ids: Sequence[int]) -> str:
        raise NoTokenScores(self.reason)

    def token_ids(self, text: str, special: bool) -> list[int]:
        raise NoTokenScores(self.reason)

    def first_token(self) -> int:
        raise NoTokenScores(self.reason)

    def context_length(self) -> int:
        raise NoTokenScores(self.reason)


@dataclass(frozen=True)
class OwnModel:
    """A model of this project in memory: its wrapper answers in batches."""

    facts: ModelFacts
    wrapper: wrappers.Wrapper
    row_timeout: float  # seconds; 0: no limit
    check_unchanged: Callable[[], None]

    def sent(self, row: dict[str, Any]) -> tuple[str, list[int] | None]:
        try:
            ids = self.wrapper.prepare(row)[0].prompt
            return self.wrapper.render(row["messages"]) if self.facts.is_chat else row["prompt"], ids
        except ValueError as refusal:  # the Refused of the wrapper's own file
            return f"refused: {refusal}", None

    def replies(self, rows: list[dict[str, Any]], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """Rows are generated together. If no row ends within `row_timeout` seconds, all rows that are left fail."""
        if not hasattr(self.wrapper, "fields"):  # it would ignore the field
            old = [place for place, row in enumerate(rows) if "response_format" in row]
            yield from ((place, failed("response_format: log the model again with this version", 0.0)) for place in old)
            rest = [place for place in range(len(rows)) if place not in old]
            if old:
                replies = self.replies([rows[place] for place in rest], batch_size)
                yield from ((rest[place], answer) for place, answer in replies)
                return
        found = self.wrapper.answers(rows, {}, batch_size)
        if not self.row_timeout:
            for place, [answer] in found:
                yield place, cast(Answer, vars(answer))
            return
        left = set(range(len(rows)))
        try:
            for place, [answer] in side_by_side.drawn(found, self.row_timeout):
                left.remove(place)
                yield place, cast(Answer, vars(answer))
        except side_by_side.TookTooLong as late:
            for place in sorted(left):
                yield place, failed(str(late), self.row_timeout)

    def vocabulary(self) -> str:
        if not hasattr(self.wrapper, "token_scores"):
            raise NoTokenScores("was logged by a version without token scores; log it again")
        return digest(sorted(self.wrapper.vocabulary().items()))

    def vocabulary_size(self) -> int:
        return int(self.wrapper._runtime.vocabulary_size)

    def token_scores(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], see: chat_model.SeeDistributions | None
    ) -> Iterator[tuple[int, chat_model.TokenScores]]:
        return self.wrapper.token_scores(rows, see)

    def text_of(self, token_ids: Sequence[int]) -> str:
        return self.wrapper.text_of(token_ids)

    def token_ids(self, text: str, special: bool) -> list[int]:
        return self.wrapper._ids(text, add_special_tokens=special)

    def first_token(self) -> int:
        """The token that begins texts. A tokenizer without such a token has an end token."""
        known, special = self.wrapper.vocabulary(), self.wrapper.special_tokens
        named = [special[name] for name in ("bos_token", "eos_token") if special.get(name) in known]
        return known[named[0]] if named else min(self.wrapper._runtime.end_tokens)

    def context_length(self) -> int:
        return int(self.wrapper._runtime.context_length)

    def for_texts(self) -> "OwnModel":
        """The wrapper with the prompt schema: it shares the weights, and reads a text as it is."""
        wrapper = copy.copy(self.wrapper)
        wrapper.schema = "prompt"
        form = replace(self.facts.form, column="prompt", is_chat=False, template="")
        return replace(self, wrapper=wrapper, facts=replace(self.facts, form=form))


@dataclass(frozen=True)
class OthersModel(NotRead):
    """A model that others logged, as MLflow loads it. Its code runs here."""

    reason = "was not logged by this project"

    facts: ModelFacts
    pyfunc: Any  # mlflow.pyfunc.PyFuncModel
    row_timeout: float  # seconds; 0: no limit

    def sent(self, row: dict[str, Any]) -> tuple[str, list[int] | None]:
        return text_sent(row, self.facts.form), None

    def for_texts(self) -> "OthersModel":
        return replace(self, facts=replace(self.facts, form=replace(self.facts.form, template="")))

    def check_unchanged(self) -> None:
        """Nothing: MLflow has read the files."""

    def replies(self, rows: list[dict[str, Any]], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """One call per row. If the user gave a batch size, texts go `batch_size` to a call.

        If a call raises, or answers another number of rows, each of its rows gets a call. Only the bad row fails then.
        With a `row_timeout`, each row is a call, in a thread that is left behind when the call takes longer.
        """
        if self.row_timeout:
            found = side_by_side.answered(lambda row: self._predicted([row])[0], rows, 1, self.row_timeout)
            for place, answer in found:
                late = isinstance(answer, side_by_side.TookTooLong)
                yield place, failed(str(answer), self.row_timeout) if late else cast(Answer, answer)
            return
        size = 1 if self.facts.is_chat else max(batch_size, 1)
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            alike = all(row["params"] == batch[0]["params"] for row in batch)
            together = self._predicted(batch) if alike else []
            if len(together) == len(batch):
                yield from enumerate(together, first)
                continue
            for place, row in enumerate(batch, first):
                yield place, self._predicted([row])[0]

    def _predicted(self, rows: list[dict[str, Any]]) -> list[Answer]:
        """The answers of one call. A call that raises gives one failure."""
        import pandas as pd

        form, params = self.facts.form, rows[0]["params"] or None
        fields = [row["row"] for row in rows]
        content: Any = pd.DataFrame(fields)
        if form.is_chat and not form.as_list:
            content = dict(fields[0])
        elif form.as_list:
            content = fields if form.column else [row[""] for row in fields]
        start = time.perf_counter()
        try:
            outputs = forms.rows_of(self.pyfunc.predict(content, params=params))
            if len(rows) == 1 and len(outputs) != 1:
                raise ValueError(f"one row was sent, but {len(outputs)} answers came back")
            found = [forms.answer_of(output) for output in outputs]
        except Exception as error:  # the failure of these rows, and not of this program
            return [failed(one_line(error), time.perf_counter() - start)]
        seconds = time.perf_counter() - start
        if form.echoes:
            for answer, row in zip(found, fields, strict=False):
                answer["text"] = answer["text"].removeprefix(row[form.column])
        return [cast(Answer, answer | {"seconds": seconds}) for answer in found]


@dataclass(frozen=True)
class EndpointModel(NotRead):
    """An endpoint that is asked like a model. The answers come from outside, so no file can change here."""

    reason = "is an endpoint"

    facts: ModelFacts
    endpoint: endpoints.Endpoint
    row_timeout: float  # seconds; 0: no limit

    def sent(self, row: dict[str, Any]) -> tuple[str, list[int] | None]:
        return text_sent(row, self.facts.form), None

    def for_texts(self) -> "EndpointModel":
        return replace(self, facts=replace(self.facts, form=replace(self.facts.form, template="")))

    def check_unchanged(self) -> None:
        """Nothing: an endpoint has no files."""

    def replies(self, rows: list[dict[str, Any]], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """`batch_size` requests run at a time (0: endpoints.THREADS)."""
        bodies = [row["row"] for row in rows]
        for place, body, seconds in endpoints.answers(self.endpoint, bodies, batch_size, self.row_timeout):
            try:
                if isinstance(body, str):
                    answer = failed(body, seconds)
                else:
                    answer = cast(Answer, forms.answer_of(body) | {"seconds": seconds})
            except Exception as error:  # a server of any make: a wrong body is the failure of its row
                answer = failed(one_line(error), seconds)
            yield place, answer


def load(
    label: str, uri: str, folder: Path | None, settings: dict, recorded: Iterable[str] = (), trust_code: bool = False
) -> LoadedModel:
    """Loads the model that `uri` names from `folder`, or connects to an endpoint (`folder` is None).

    Each of the `settings` that has a value replaces the logged setting of a model of this project. `settings` may also
    hold `row_timeout` in seconds, which is not a setting of the model. `recorded` has the hashes of the model's
    manifest that the tracking server keeps.

    Raises:
        BadInput: the model is not a pyfunc or can't be loaded, its files were changed, its code isn't trusted, or its
            form isn't known.
        Unavailable: an endpoint doesn't answer or refuses the key, or the hub that holds the weights can't be reached.
    """
    row_timeout = float(settings.get("row_timeout") or 0)
    if endpoints.is_endpoint(uri):
        return _load_endpoint(label, uri, row_timeout)
    import mlflow

    assert folder is not None  # only an endpoint has none
    try:
        description = mlflow.models.Model.load(str(folder))
        if "python_function" not in description.flavors:
            raise BadInput(f"{uri} has no python_function flavor")
    except (mlflow.exceptions.MlflowException, ValueError) as error:
        raise BadInput(f"{uri}: {error}") from None
    registered = model_uri.registered_version(uri)
    if not wrappers.is_ours(description):
        wrappers.check(uri, description, trust_code, None)
        return _load_others(label, uri, folder, description, recorded, row_timeout)
    needed = folder / "requirements.txt"
    for difference in environment.differing(needed.read_text("utf-8").splitlines() if needed.exists() else ()):
        console.out.print(f"{label}: was logged for {difference}", markup=False)
    override = {name: value for name, value in settings.items() if name != "row_timeout"}
    try:
        opened = wrappers.opened(uri, folder, recorded, trust_code, override, reset_peak_memory)
    except Exception as error:
        about_gpu = any(word in str(error).lower() for word in ("cuda", "nvidia"))
        if isinstance(error, BadInput) or not about_gpu or exhausted(error):
            raise
        # the error about the GPU names the part that this machine lacks
        raise BadInput(f"{uri} can't be loaded: {one_line(error)}") from error
    description, wrapper = opened.description, opened.wrapper
    facts = ModelFacts(
        label=label,
        uri=uri,
        model_id=description.model_id,
        form=forms.form_of(uri, description, folder),
        sha256=description.metadata["model.sha256"],
        bytes=description.model_size_bytes or 0,
        load_seconds=opened.load_seconds,
        name=registered[0] if registered else f"{wrapper.name}, {label}",
        code_sha256=opened.code_sha256,
        manifest_sha256=opened.manifest.sha256,
        identity=identity(description, opened.code_sha256),
        record=_record(opened),
    )
    return OwnModel(facts, wrapper, row_timeout, opened.unchanged)


def facts_before_loading(label: str, uri: str) -> ModelFacts | None:
    """What the logged description says of a model of this project: enough to find its kept answers.

    None for a model of others and for an endpoint. The wrapper is taken to be the one of this repository.
    """
    import mlflow

    if endpoints.is_endpoint(uri):
        return None
    description = mlflow.models.get_model_info(uri)
    if not wrappers.is_ours(description):
        return None
    code_sha256, registered = wrappers.own_sha256(), model_uri.registered_version(uri)
    config = description.flavors["python_function"].get("config") or {}
    metadata = description.metadata or {}
    return ModelFacts(
        label=label,
        uri=uri,
        name=registered[0] if registered else f"{config.get('model_name', '')}, {label}",
        form=forms.form_of(uri, description, None),
        load_seconds=0.0,
        identity=identity(description, code_sha256),
        sha256=metadata.get("model.sha256", ""),
        code_sha256=code_sha256,
    )


def _load_others(
    label: str, uri: str, folder: Path, description, recorded: Iterable[str], row_timeout: float
) -> OthersModel:
    """Loads a model of others with MLflow, which runs the code in the model's folder."""
    import mlflow

    form = forms.form_of(uri, description, folder)
    sys.dont_write_bytecode = True  # Python would write the bytecode into the store's own folder
    try:
        before = manifest.stamp(folder)
        found = manifest.check(folder, recorded)
        reset_peak_memory()
        start = time.perf_counter()
        if any(folder.rglob("__pycache__")):  # no manifest covers this bytecode, and Python would run it
            sys.pycache_prefix = str(cache.private("bytecode"))
        pyfunc = mlflow.pyfunc.load_model(str(folder))
        seconds = time.perf_counter() - start
        if manifest.stamp(folder) != before:
            manifest.check(folder, [found.sha256])
    except Exception as error:
        raise BadInput(f"{uri} can't be loaded: {one_line(error)}") from error
    registered = model_uri.registered_version(uri)
    facts = ModelFacts(
        label=label,
        uri=uri,
        model_id=description.model_id,
        form=form,
        sha256=found.sha256,
        bytes=description.model_size_bytes or 0,
        load_seconds=seconds,
        name=registered[0] if registered else label,
        manifest_sha256=found.sha256,
        identity=found.sha256,
        record={"template": _template_of(form)},
    )
    return OthersModel(facts, pyfunc, row_timeout)


def _load_endpoint(label: str, uri: str, row_timeout: float) -> EndpointModel:
    """Connects to an endpoint, as `endpoints.connect` does, and describes it as a model."""
    start = time.perf_counter()
    endpoint = endpoints.connect(uri)
    fields = {name: forms.Field(theirs) for name, theirs in endpoint.fields.items()}
    form = forms.Form(endpoint.column, endpoint.column == "messages", fields, endpoint.fixed)
    seconds = time.perf_counter() - start
    facts = ModelFacts(label, endpoint.uri, endpoint.uri, form, seconds, endpoint.uri)
    return EndpointModel(facts, endpoint, row_timeout)


def identity(description, code_sha256: str) -> str:
    """One hash over everything that the answers of a model of this project depend on.

    The hash covers the weights, the logged settings, the chat template, the schema and the wrapper's code.
    `description` is MLflow's Model or ModelInfo. The weights need not be on this machine.
    """
    metadata = description.metadata
    settings = dict(description.flavors["python_function"].get("config") or {})
    settings.pop("model_name", None)  # answers name the model, but don't depend on its name
    names = ("model.sha256", "chat_template", "special_tokens", "schema")
    return digest([[metadata.get(name) for name in names], settings, code_sha256])


def _record(opened: wrappers.Opened) -> dict:
    """The entries of environment.json that describe a model of this project."""
    metadata, wrapper = opened.description.metadata, opened.wrapper
    files = {name: record.sha256 for name, record in opened.manifest.weights.items()}
    weights = {name: sha256 for name, sha256 in files.items() if name not in model_logging.TOKENIZER_FILES}
    precision = metadata.get("precision") or onnx_export.AS_GIVEN
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
    """The chat template of a text model of others. `chat_template.sha256` is None if the model has no template."""
    given = digest([form.template, form.special_tokens]) if form.template else None
    return {"tokenizer.sha256": None, "chat_template.sha256": given, "tells_date": "strftime_now" in form.template}


def _used(opened: wrappers.Opened, precision: str) -> dict:
    """The device, dtype, threads and batch size that a model of this project uses.

    If a setting has no value, the entry is the value that the wrapper chose.
    """
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

    network = wrapper._runtime._model  # the only place where the logged wrapper says how "auto" was resolved
    dtype = str(network.dtype).removeprefix("torch.")
    return {
        "runtime": "transformers",
        "device": str(network.device),
        "dtype": next((short for short, name in chat_model.DTYPES.items() if name == dtype), dtype),
        "threads": threads or torch.get_num_threads(),
        "batch_size": wrapper.batch_size,
    }


def reset_peak_memory() -> None:
    """Resets the process's peak memory if the kernel allows a reset (Linux, proc(5), clear_refs).

    What an earlier model has freed goes back to the system before: glibc keeps it otherwise, as this model's peak.
    """
    environment.return_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int | None:
    """The process's peak resident memory since the last reset, in bytes. None if the system doesn't report it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
