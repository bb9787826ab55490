"""One way to ask any model: its facts, the questions that it gets, and the interface of a loaded model.

slm/answers/loading.py has the three kinds of model: of this project, of others, and endpoints. The prompts become one
list of questions, which is answered, kept and recorded.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, Protocol, TypedDict

from slm.answers import forms
from slm.base import model_uri
from slm.base.errors import BadInput
from slm.base.hashing import digest
from slm.models import chat_model
from slm.models.chat_parts import structured
from slm.prompts import prompt_rows
from slm.prompts.prompt_rows import Prompt


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model, as plain data. Results keep the facts after the model's memory is free."""

    label: str
    uri: str  # of an endpoint: its address and name, without credentials
    name: str  # finds earlier runs: the name of the registered model, of the checkpoint, or of the endpoint
    form: forms.Form
    load_seconds: float
    identity: str  # one hash over all that the answers depend on; of an endpoint: its address
    model_id: str | None = None  # None: not in the tracking store
    sha256: str = ""  # of the weights; "": unknown, as for an endpoint
    bytes: int = 0  # 0: unknown
    code_sha256: str = ""  # of the wrapper that runs; "": not a model of this project
    manifest_sha256: str = ""  # of all files; "": unknown, as for an endpoint
    record: dict[str, Any] = field(default_factory=dict)  # for environment.json: model, template, used, origin

    @property
    def is_ours(self) -> bool:
        """Whether this project logged the model."""
        return bool(self.code_sha256)

    @property
    def is_chat(self) -> bool:
        return self.form.is_chat

    @property
    def version(self) -> tuple[str, str] | None:
        """The name and version in the registry. None if the URI has no version."""
        return model_uri.registered_version(self.uri)

    @property
    def ignored(self) -> tuple[str, ...]:
        """The generation parameters that the model does not take. The model is not given these parameters."""
        return tuple(name for name in forms.NAMES if name not in self.form.fields)


class Answer(TypedDict):
    """One answer. `error` is "" for an answer, and the reason in one line for a failure."""

    text: str
    finish_reason: str  # stop | length | error
    prompt_tokens: int | None  # None: the model does not count
    output_tokens: int | None
    seconds: float
    error: str
    token_ids: NotRequired[Sequence[int]]  # all generated tokens, with the end token; only of a model of this project


class NoTokenScores(Exception):
    """The model can't be read token by token. The message is the end of a sentence that starts with the model."""


def failed(reason: str, seconds: float) -> Answer:
    """The answer of a row that failed after some seconds."""
    return {
        "text": "",
        "finish_reason": "error",
        "prompt_tokens": None,
        "output_tokens": None,
        "seconds": seconds,
        "error": forms.whole(reason),
    }


@dataclass(frozen=True)
class Question:
    """One prompt, once, as one model gets it."""

    prompt: Prompt
    repeat: int  # 0 for the first answer of the prompt
    row: dict[str, Any]  # what is sent; {"refused": why} if the model's chat template does not take the prompt
    key: str  # SHA-256 of the row and the repeat; finds a kept answer
    text: str  # the text that the row becomes
    token_ids: list[int] | None  # None: the model does not tell


class LoadedModel(Protocol):
    """A model in memory, or an endpoint that has answered."""

    @property
    def facts(self) -> ModelFacts: ...

    def sent(self, row: dict[str, Any]) -> tuple[str, list[int] | None]:
        """The text and the token ids that a row becomes. The ids are None if the model does not tell them."""

    def replies(self, rows: list[dict[str, Any]], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """Yields (place of the row, answer) in the order in which the answers end. 0: the model's own batch size.

        Raises:
            Unavailable: an endpoint is gone.
        """

    def vocabulary(self) -> str:
        """The SHA-256 of the tokens with their ids.

        Raises:
            NoTokenScores: the model has no `token_scores`.
        """

    def vocabulary_size(self) -> int:
        """The entries of a next-token distribution."""

    def token_scores(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], see: chat_model.SeeDistributions | None
    ) -> Iterator[tuple[int, chat_model.TokenScores]]:
        """As `SmallLanguageModel.token_scores`. Only for a model that has a `vocabulary`."""

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens. Only for a model that has a `vocabulary`."""

    def token_ids(self, text: str, special: bool) -> list[int]:
        """The tokens of a text; `special` adds what the tokenizer puts around a text. Only for a model that has a
        `vocabulary`."""

    def first_token(self) -> int:
        """The token that stands before a text that has no context. Only for a model that has a `vocabulary`."""

    def context_length(self) -> int:
        """The most tokens of one row. Only for a model that has a `vocabulary`."""

    def for_texts(self) -> "LoadedModel":
        """The same model, for prompts that no chat template may change. A chat model of others stays as it is."""

    def check_unchanged(self) -> None:
        """Raises BadInput if the model's files have changed since they were checked."""


def questions(
    model: LoadedModel, prompts: Iterable[Prompt], generation: dict[str, Any], repeats: int
) -> list[Question]:
    """All that a model is asked: every prompt `repeats` times, in the order of the prompts."""
    found = []
    for prompt in prompts:
        text, token_ids = "", None
        for repeat in range(repeats):
            row = row_of(model.facts, prompt, repeat, generation)
            if repeat == 0:
                text, token_ids = (f"refused: {row['refused']}", None) if "refused" in row else model.sent(row)
            found.append(Question(prompt, repeat, row, key_of(row, repeat), text, token_ids))
    return found


def key_of(row: dict[str, Any], repeat: int) -> str:
    """The key that finds the kept answer to a row."""
    return digest([row, repeat])


def answers(model: LoadedModel, asked: list[Question], batch_size: int = 0) -> Iterator[tuple[Question, Answer]]:
    """Yields each question with its answer, in the order in which the answers end.

    Raises:
        Unavailable: an endpoint is gone.
    """
    for question in asked:
        if "refused" in question.row:
            yield question, failed(question.row["refused"], 0.0)
    taken = [question for question in asked if "refused" not in question.row]
    for place, answer in model.replies([question.row for question in taken], batch_size):
        yield taken[place], answer


def check_response_formats(prompts: Iterable[Prompt]) -> None:
    """Checks that each row's `response_format` can be followed. No model is loaded.

    Raises:
        BadInput: a schema has something that a grammar can't hold.
    """
    for prompt in prompts:
        try:
            schema = structured.schema_of(prompt.response_format)
            if schema is not None:
                structured.checked_grammar(structured.schema_grammar(schema))
        except chat_model.Refused as refusal:
            raise BadInput(f"prompt {prompt.id}: {refusal}") from None


def row_of(model: ModelFacts, prompt: Prompt, repeat: int, generation: dict[str, Any]) -> dict[str, Any]:
    """What one prompt becomes for a model, as plain data.

    A model of this project gets one flat row. Another model gets {"row", "params", "to"}: `to` is the address of an
    endpoint, and "" if the model's SHA-256 says what the model is. If the model's chat template does not take the
    conversation, the result is {"refused": why}.
    """
    form = model.form
    messages = prompt_rows.conversation(prompt)
    try:
        content: Any = messages if form.is_chat else forms.text_of(messages, form)
    except chat_model.Refused as refusal:
        return {"refused": str(refusal)}
    row: dict[str, Any] = {form.column: content} | form.fixed
    params: dict[str, Any] = {}
    for name, place in form.fields.items():
        value = generation["seed"] + repeat if name == "seed" else generation[name]
        if name == "temperature":
            value = max(value, form.lowest_temperature)
        if name == "stop" and not value and not model.is_ours:
            continue  # asks for nothing
        (params if place.is_param else row)[place.name] = forms.fitted(value, place.kind)
    if form.do_sample:
        params["do_sample"] = generation["temperature"] > 0
    if prompt.response_format and not (model.is_ours or model.uri.startswith(("http://", "https://"))):
        return {"refused": "the row has a response_format, which only models of this project and OpenAI's API take"}
    if prompt.response_format:
        row["response_format"] = prompt.response_format
    if model.is_ours:
        return row
    return {"row": row, "params": params, "to": "" if model.sha256 else model.uri}


def text_sent(row: dict[str, Any], form: forms.Form) -> str:
    """The text of a row for a model that is not of this project. A conversation is written as JSON."""
    content = row["row"][form.column]
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
