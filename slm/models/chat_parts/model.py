"""The model as MLflow sees it: rows of requests in, completions out."""

import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from .genai_runtime import onnx_runtime
from .generation import Generation
from .rows import Answer, Refused, Row
from .runtime import Runtime
from .sampling import sampling_of
from .templates import messages_of, read_chat_template, render
from .transformers_runtime import TransformersRuntime


class SmallLanguageModel(Generation, PythonModel):
    """Answers conversations (llm/v1/chat) or plain prompts: every row of its input, in order.

    A loader may set these entries of `model_config`: batch_size, threads, execution_provider (ONNX), device and dtype
    (transformers). The other entries come from logging: schema, model_name, and for weights on the hub hub_id and
    revision.
    """

    _skip_type_hint_validation = True  # the signature is logged: no warning about type hints
    separates_tenants = True  # a server with several keys requires this (Row.tenant)

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
        self.template, self.special_tokens = read_chat_template(folder)
        onnx = "onnx" in context.artifacts
        self._runtime: Runtime = onnx_runtime(folder, config) if onnx else TransformersRuntime(folder, config)
        self.batch_size = int(config.get("batch_size") or self._runtime.batch_size)
        self._lock = threading.RLock()  # two threads must not run a runtime at once

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

        With `n` above 1, only the first answer is generated.

        Raises:
            MlflowException: the number of rows is not 1, or the row can't be answered.
        """
        rows = self._rows(model_input)
        if len(rows) != 1:
            raise MlflowException(f"a stream answers one row, got {len(rows)}", error_code=INVALID_PARAMETER_VALUE)
        try:
            row = {name: value for name, value in rows[0].items() if name != "stream"}
            [prepared] = self.prepare(row, params)[:1]
        except Refused as refusal:
            raise MlflowException(str(refusal), error_code=INVALID_PARAMETER_VALUE) from None
        pieces = (text for step in self.stream([prepared]) for _, text in step if text)
        if self.schema == "prompt":
            yield from pieces
            return
        head = self.head("chat.completion.chunk")

        def chunk(delta, finish_reason=None):
            return head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}

        yield chunk({"role": "assistant", "content": ""})
        for piece in pieces:
            yield chunk({"content": piece})
        yield chunk({}, prepared.finish_reason)

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

    def render(self, messages: list[dict]) -> str:
        """The prompt text of a conversation for this model."""
        if not self.template:
            raise Refused("the model has no chat template; use the prompt schema")
        return render(self.template, self.special_tokens, messages)

    # -- for a caller that makes its own batches, such as a server -----------------------------------------------------

    def prepare(self, row: dict, params: dict | None = None, index: int = 0) -> list[Row]:
        """The texts to generate for a row: n texts, or one text at temperature 0, where all n would be equal.

        Raises:
            Refused: the row can't be answered.
        """
        sampling = sampling_of(row, params or {})
        if self.schema == "prompt" and "messages" not in row:
            prompt = row.get("prompt")
            if not isinstance(prompt, str) or not prompt:
                raise Refused(f"prompt must be a non-empty text, got {prompt!r}")
            ids = self._ids(prompt)
            if not ids or ids[0] not in self._special_ids:  # a rendered template already has special tokens
                ids = self._ids(prompt, add_special_tokens=True)
        else:
            ids = self._ids(self.render(messages_of(row.get("messages"))))
        room = self._runtime.context_length - len(ids)
        if not ids or room < 1:
            raise Refused(f"the prompt has {len(ids)} tokens; the context length is {self._runtime.context_length}")
        choices = sampling.n if sampling.temperature else 1
        return [
            Row((index, choice), ids, sampling, min(sampling.max_tokens, room), sampling.seed + choice)
            for choice in range(choices)
        ]

    def choices(self, rows: list[Row]) -> list[Answer]:
        """The n answers of one request, made from its finished texts."""
        answers = [
            Answer(
                row.text, row.finish_reason, len(row.prompt), len(row.output), row.seconds, token_ids=tuple(row.output)
            )
            for row in rows
        ]
        return answers * (rows[0].sampling.n // len(answers))

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
                    "message": {"role": "assistant", "content": answer.text},
                    "finish_reason": answer.finish_reason,
                }
                for index, answer in enumerate(choices)
            ],
            "usage": usage(first.prompt_tokens, sum(answer.output_tokens for answer in choices)),
        }
        return completion | (
            {"error": {"type": "invalid_request_error", "message": first.error}} if first.error else {}
        )

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
