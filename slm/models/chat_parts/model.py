"""The model as MLflow sees it: rows of requests in, completions out."""

import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from .fields import BY_NAME, check_names, checked, includes_usage
from .genai_runtime import onnx_runtime
from .generation import Generation
from .mlflow_input import check_before_mlflow, columns
from .rows import Answer, Refused, Row, TokenLogProbability
from .runtime import Runtime
from .sampling import sampling_of
from .structured import Constraints, checked_grammar, schema_grammar, schema_of
from .templates import messages_of, read_chat_template, render
from .tool_templates import fitted, read_tool_template, tool_template
from .tools import ChoiceStream, Reading, openai_call, said, said_reason, tools_grammar, tools_of
from .transformers_runtime import TransformersRuntime


class SmallLanguageModel(Generation, PythonModel):
    """Answers conversations (llm/v1/chat) or plain prompts: every row of its input, in order.

    A loader may set these entries of `model_config`: batch_size, threads, execution_provider (ONNX), device and dtype
    (transformers). The other entries come from logging: schema, model_name, and for weights on the hub hub_id and
    revision.
    """

    _skip_type_hint_validation = True  # the signature is logged: no warning about type hints
    separates_tenants = True  # a server with several keys requires this (Row.tenant)
    fields = frozenset(BY_NAME)  # a server sends only these fields to `prepare`, which refuses what it must

    def load_context(self, context):
        from tokenizers import Tokenizer

        config = dict(context.model_config or {})
        folder = context.artifacts.get("checkpoint") or context.artifacts.get("onnx")
        if folder is None:  # logged without weights: the hub has them
            from huggingface_hub import snapshot_download

            folder = snapshot_download(
                config["hub_id"],
                revision=config["revision"],
                allow_patterns=["*.json", "*.jinja", "*.safetensors", "tokenizer.model"],
                ignore_patterns=["*/*"],
            )
        folder = Path(folder)
        self.schema = config.get("schema", "chat")
        self.name = config.get("model_name", folder.name)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {id for id, token in added.items() if token.special}
        self._added_ids = {token.content: id for id, token in added.items()}
        self.template, self.special_tokens = read_chat_template(folder)
        self.tool_template = read_tool_template(folder, self.template)
        onnx = "onnx" in context.artifacts
        self._runtime: Runtime = onnx_runtime(folder, config) if onnx else TransformersRuntime(folder, config)
        self.batch_size = int(config.get("batch_size") or self._runtime.batch_size)
        self.constraints = Constraints(self._tokenizer, self._runtime.vocabulary_size, self._runtime.end_tokens)
        self._lock = threading.RLock()  # two threads must not run a runtime at once
        check_before_mlflow()

    @property
    def _others(self) -> tuple[str, ...]:
        """The columns that a row may have beside the fields. A caller may change the schema of a loaded model."""
        return ("prompt",) if self.schema == "prompt" else ()

    def check_input(self, model_input, params=None) -> None:
        """Refuses columns and parameters that the table of fields lacks (`mlflow_input.check_before_mlflow`).

        Raises:
            MlflowException: there is no such field.
        """
        parameters = [name for name, field in BY_NAME.items() if field.parameter]
        try:
            for name in params if isinstance(params, dict) else ():
                check_names([name])
                if name not in parameters:
                    raise Refused(f"{name}: give it in the row; params may have {', '.join(parameters)}", name)
            for name in columns(model_input):
                check_names([name], self._others)
                if self.schema == "prompt" and name != "prompt":
                    raise Refused(
                        f"{name}: a row of the prompt schema has no such column; give it in params", str(name)
                    )
        except Refused as refusal:
            raise MlflowException(str(refusal), error_code=INVALID_PARAMETER_VALUE) from None

    def predict(self, context, model_input, params=None):
        """Gives one answer for each row, in order: chat completions (chat) or strings (prompt).

        A row that can't be answered gives a completion with finish_reason "error" and the reason (chat), or None
        (prompt). A server of `mlflow models serve` gets a single completion without a list.

        Raises:
            MlflowException: the only row can't be answered. A server then answers 400.
        """
        rows, params = self._rows(model_input), params or {}
        answers: list[list[Answer]] = [[] for _ in rows]
        for index, choices in self.answers(rows, params):
            answers[index] = choices
        if len(rows) == 1 and answers[0][0].error:
            raise MlflowException(answers[0][0].error, error_code=INVALID_PARAMETER_VALUE)
        if self.schema == "prompt":
            return [None if choices[0].error else choices[0].text for choices in answers]
        completions = [self.completion(choices) for choices in answers]
        # `mlflow models serve` sends a single conversation as a table of one row. Its client expects one object.
        served = os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true"
        return completions[0] if served and len(completions) == 1 else completions

    def predict_stream(self, context, model_input, params=None):
        """Yields the text of one row while it is generated: OpenAI chunks (chat) or pieces of text (prompt).

        Raises:
            MlflowException: the number of rows is not 1, or the row can't be answered.
        """
        rows = self._rows(model_input)
        if len(rows) != 1:
            raise MlflowException(f"a stream answers one row, got {len(rows)}", error_code=INVALID_PARAMETER_VALUE)
        try:
            row = {name: value for name, value in rows[0].items() if name not in ("stream", "stream_options")}
            with_usage = includes_usage(checked(rows[0], others=self._others)["stream_options"])
            prepared = self.prepare(row, params)
        except Refused as refusal:
            raise MlflowException(str(refusal), error_code=INVALID_PARAMETER_VALUE) from None
        if self.schema == "prompt":
            yield from (text for step in self.stream(prepared) for _, text in step if text)
        else:
            yield from self._chunks(prepared, with_usage)
        if prepared[0].error:
            raise MlflowException(prepared[0].error, error_code=INVALID_PARAMETER_VALUE)

    def _chunks(self, rows: list[Row], with_usage: bool) -> Iterator[dict]:
        """The chunks of one request. Each of its n choices gets chunks, even if one text serves several choices."""
        head = self.head("chat.completion.chunk")
        stream = ChoiceStream(rows, self.end_tokens, [self.log_probability_pieces(row) for row in rows])
        places = {id(row): place for place, row in enumerate(rows)}
        yield from (head | {"choices": [entry]} for entry in stream.begin())
        for step in self.stream(rows):
            for row, text in step:
                for entry in stream.of(places[id(row)], text, row.finish_reason):
                    yield head | {"choices": [entry]}
        if with_usage:
            output_tokens = sum(answer.output_tokens for answer in self.choices(rows))
            yield head | {"choices": [], "usage": usage(len(rows[0].prompt), output_tokens)}

    def answers(
        self, rows: Iterable[dict], params: dict | None = None, batch_size: int = 0
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Answers rows of {"messages" or "prompt", and parameters}. Yields (row number, its n answers) as they finish.

        At most `batch_size` texts are generated at once; 0 means the model's own number. Their keys and values take at
        most CACHE_BYTES, except those of a single text. ContinuousRuntime begins the next row when a row ends, and may
        share rows among the cores. The other runtimes put rows of similar length into a batch, the longest rows first.
        Greedy text doesn't depend on the batch.
        """
        waiting: list[Row] = []
        left: dict[int, int] = {}
        done: dict[int, dict[int, Row]] = {}
        for index, row in enumerate(rows):
            try:
                prepared = self.prepare(row, params, index)
            except Refused as refusal:
                yield index, [Answer("", "error", error=str(refusal))]
                continue
            waiting += prepared
            left[index], done[index] = len(prepared), {}
        together = self._queues if self._runtime.refills else self._batches
        for batch, places, runtimes in together(waiting, batch_size or self.batch_size):
            with self._lock:
                for ended in self._side_by_side(batch, places, runtimes):
                    index, choice = ended.index
                    done[index][choice] = ended
                    if len(done[index]) == left[index]:
                        yield index, self.choices([done[index][choice] for choice in sorted(done[index])])

    def render(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        """The prompt text of a conversation for this model. `tools` are functions that the model may call.

        Raises:
            Refused: the template refuses the conversation, or the conversation has tools and the template ignores them.
        """
        template = self.tool_template if tools else self.template
        if not template:
            raise Refused("the model has no chat template; use the prompt schema")
        if not tools and not any("tool_calls" in message for message in messages):
            return render(template, self.special_tokens, messages)
        messages, tools = fitted(messages, tools or [], tool_template(template, self.special_tokens))
        return render(template, self.special_tokens, messages, tools)

    # -- for a caller that makes its own batches, such as a server -----------------------------------------------------

    def prepare(
        self, row: dict, params: dict | None = None, index: int = 0, prompt_ids: Sequence[int] | None = None
    ) -> list[Row]:
        """The texts to generate for a row: n texts, or one text at temperature 0, where all n would be equal.

        `prompt_ids` are the tokens of a prompt, in the place of messages or a text.

        Raises:
            Refused: the row can't be answered.
        """
        request = checked(row, params, self._others)
        if request["stream"] or request["stream_options"]:
            raise Refused("stream is not supported by predict, got true; call predict_stream instead", "stream")
        sampling = sampling_of(request)
        for token, _ in sampling.logit_bias:
            if token >= self._runtime.vocabulary_size:
                size = self._runtime.vocabulary_size
                raise Refused(
                    f"logit_bias: token {token} is not in the vocabulary, which has {size} tokens", "logit_bias"
                )
        if self.schema == "prompt" and (sampling.n > 1 or sampling.logprobs):
            name = "n" if sampling.n > 1 else "logprobs"
            raise Refused(f"{name} is not supported by this model: its answer is one text", name)
        schema = schema_of(request["response_format"])
        grammar = checked_grammar(schema_grammar(schema)) if schema is not None else ""
        tools, reading = tools_of(request), None
        if tools.shown and self.schema == "prompt":
            raise Refused("tools is not supported by this model: its answer is one text", "tools")
        if tools.shown:
            form = tool_template(self.tool_template, self.special_tokens).form
            grammar = tools_grammar(tools, form, self._added_ids, schema)
            reading = Reading(form, tools.names, tools.parallel, schema is not None)
        if prompt_ids is not None:
            ids = self.in_vocabulary(prompt_ids)
        elif self.schema == "prompt" and "messages" not in row:
            prompt = row.get("prompt")
            if not isinstance(prompt, str) or not prompt:
                raise Refused(f"prompt must be a non-empty text, got {prompt!r}")
            ids = self._ids(prompt)
            if not ids or ids[0] not in self._special_ids:  # a rendered template already has special tokens
                ids = self._ids(prompt, add_special_tokens=True)
        else:
            template = self.tool_template if tools.shown else self.template
            ids = self._ids(self.render(messages_of(row.get("messages"), template), tools.shown))
        room = self._runtime.context_length - len(ids)
        if not ids or room < 1:
            raise Refused(f"the prompt has {len(ids)} tokens; the context length is {self._runtime.context_length}")
        choices = sampling.n if sampling.temperature else 1
        rows = [
            Row((index, choice), ids, sampling, min(sampling.max_tokens, room), sampling.seed + choice)
            for choice in range(choices)
        ]
        if sampling.logprobs:
            _ = self.constraints.tokens  # read now, not in the thread that sends the answer
        for prepared in rows:
            if reading:
                marks = (*reading.form.opens, reading.form.closes)
                shown = {self._added_ids[mark] for mark in marks if mark in self._added_ids}
                prepared.tools, prepared.shown = reading, frozenset(shown & self._special_ids)
            if grammar:
                self.constraints.constrain(prepared, grammar, "tools" if reading else "response_format")
        return rows

    def token_ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text. Special tokens are those that the tokenizer puts around a text, such as a BOS token.

        Raises:
            Refused: the text holds half of a character.
        """
        return self._ids(text, add_special_tokens)

    def in_vocabulary(self, ids: Sequence[int], what: str = "prompt") -> list[int]:
        """The tokens themselves. `what` is the field that holds them.

        Raises:
            Refused: a token is not in the vocabulary.
        """
        size = self._runtime.vocabulary_size
        if (strange := next((id for id in ids if not 0 <= id < size), None)) is not None:
            raise Refused(f"{what}: token {strange} is not in the vocabulary, which has {size} tokens", what)
        return list(ids)

    @property
    def context_length(self) -> int:
        return self._runtime.context_length

    def choices(self, rows: list[Row]) -> list[Answer]:
        """The n answers of one request, made from its finished texts."""
        answers = []
        for row in rows:
            content, calls = said(row, self.end_tokens)
            answers.append(
                Answer(
                    content,
                    said_reason(row.finish_reason, bool(calls)),
                    len(row.prompt),
                    len(row.output),
                    row.seconds,
                    row.error,
                    tuple(row.output),
                    self.log_probability_pieces(row).all(),
                    calls,
                )
            )
        return answers * (rows[0].sampling.n // len(answers))

    def log_probability_pieces(self, row: Row) -> "LogProbabilityPieces":
        """A row's log probabilities in the pieces in which a stream sends its text."""
        return LogProbabilityPieces(self, row)

    def token_entry(self, found: TokenLogProbability) -> dict:
        """The log probabilities of one token in OpenAI's form."""

        def entry(token: int, value: float) -> dict:
            content = bytes(self.constraints.tokens.decode_bytes([token]))
            return {"token": content.decode(errors="replace"), "logprob": value, "bytes": list(content)}

        return entry(found.token, found.value) | {"top_logprobs": [entry(*pair) for pair in found.likeliest]}

    def head(self, kind: str) -> dict:
        """The first entries of a chat completion, and of each of its chunks."""
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }

    def completion(self, choices: list[Answer]) -> dict:
        """A request's answers as an OpenAI chat completion."""
        first = choices[0]
        completion = self.head("chat.completion") | {
            "choices": [
                {
                    "index": index,
                    "message": self._message(answer),
                    "finish_reason": answer.finish_reason,
                }
                | self._logprobs(answer)
                for index, answer in enumerate(choices)
            ],
            "usage": usage(first.prompt_tokens, sum(answer.output_tokens for answer in choices)),
        }
        return completion | (
            {"error": {"type": "invalid_request_error", "message": first.error}} if first.error else {}
        )

    def _message(self, answer: Answer) -> dict:
        if not answer.calls:
            return {"role": "assistant", "content": answer.text}
        calls = [openai_call(call) for call in answer.calls]
        return {"role": "assistant", "content": answer.text or None, "tool_calls": calls}

    def _logprobs(self, answer: Answer) -> dict:
        if not answer.log_probabilities:
            return {}
        content = [self.token_entry(found) for found in answer.log_probabilities]
        return {"logprobs": {"content": content, "refusal": None}}

    # -- inside --------------------------------------------------------------------------------------------------------

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):  # half of a character: no tokenizer accepts it
            raise Refused("the prompt holds half of a character (a lone surrogate); remove it") from None

    def _rows(self, model_input) -> list[dict]:
        """The input as one dict for each row. MLflow makes one cell of {"prompt": [texts]}; each text becomes a row."""
        key = "prompt" if self.schema == "prompt" else "messages"
        if hasattr(model_input, "to_dict"):  # a DataFrame
            rows = model_input.to_dict(orient="records")
        else:
            rows = [model_input] if isinstance(model_input, str | dict) else list(model_input)
        rows = [row if isinstance(row, dict) else {key: row} for row in rows]
        if key == "messages":
            return rows
        return [
            row | {key: text}
            for row in rows
            for text in (row[key] if isinstance(row.get(key), list | tuple | np.ndarray) else [row.get(key)])
        ]


def usage(prompt_tokens: int, output_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }


class LogProbabilityPieces:
    """A row's log probabilities, in the order of its tokens, without the end token.

    A token is sent when its text begins before the end of the sent text. So a token of a stop string is not sent.
    """

    def __init__(self, model: SmallLanguageModel, row: Row):
        self._model, self._row = model, row
        self._sent = 0  # tokens
        self._begun = 0  # bytes of their text
        self._size = 0  # bytes of the text that was sent

    def sent_with(self, text: str, finish_reason: str) -> dict | None:
        """The log probabilities that go with a piece of text, in OpenAI's form. None if there are none."""
        self._size += len(text.encode(errors="replace"))
        found = [self._model.token_entry(entry) for entry in self._next(bool(finish_reason))]
        return {"content": found, "refusal": None} if found else None

    def all(self) -> tuple[TokenLogProbability, ...]:
        """The log probabilities of a finished row's text."""
        self._size = len(self._row.text.encode(errors="replace"))
        return tuple(self._next(True))

    def _next(self, last: bool) -> list[TokenLogProbability]:
        row, found = self._row, []
        ends = self._model.end_tokens
        cut = bool(row.sampling.stop) and row.finish_reason == "stop" and not (row.output and row.output[-1] in ends)
        for entry in row.log_probabilities[self._sent :]:
            whole = last and not cut  # a tokenizer may leave out the first blank: its bytes are not in the text
            if entry.token in ends or not (whole or self._begun < self._size):
                break
            found.append(entry)
            self._begun += len(self._model.constraints.tokens.decode_bytes([entry.token]))
        self._sent += len(found)
        return found
