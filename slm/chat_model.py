"""The wrapper that is logged: chat or plain prompts over transformers or onnxruntime-genai.

MLflow copies this one file into the logged model and runs it again when the model is loaded (models from code:
no pickle), so it imports nothing of ours, and each runtime's libraries only where they are used: a model over
onnxruntime-genai is served with neither torch nor transformers installed. Rendering, tokenizing, sampling, stop
strings, batching and the answers' shape are written once and hold for both runtimes; in fp32 both give the same
greedy text. Not covered: tools, images, beam search, logit penalties (a request that asks for one is refused).

Tokens come from the checkpoint's own tokenizer.json, read by Hugging Face's `tokenizers`: onnxruntime-genai's
encoder cuts a text at its first NUL.
"""

import datetime
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

DEFAULTS = {"max_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": [], "n": 1}
BATCH_SIZE = 16  # rows generated together when nobody says
CACHE_BYTES = 2 * 2**30  # what the keys and values of one batch may take, padding included
MOST_CHOICES = 16
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Refused(ValueError):
    """This row can't be answered; the others can. The message says why, in one line."""


@dataclass(frozen=True)
class Sampling:
    """How one row is continued, in OpenAI's words."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    n: int


@dataclass(frozen=True)
class Answer:
    """One generated text. `output_tokens` counts every token generated, the end token included."""

    text: str
    finish_reason: str  # stop | length | error
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0  # from the start of its batch to its last token
    error: str = ""


@dataclass
class Row:
    """One text on its way: a prompt's token ids, and what has been generated for it."""

    index: tuple[int, int]  # (row of the input, choice)
    prompt: list[int]
    sampling: Sampling
    room: int  # tokens that may still be generated for it at the start
    seed: int
    output: list[int] = field(default_factory=list)
    finish_reason: str = ""
    text: str = ""  # decoded so far; kept up only for stop strings and streams
    seconds: float = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def _number(name: str, value, kind: type, low: float, high: float):
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise Refused(f"{name} must be a number, got {value!r}")
    if not low <= value <= high or (kind is int and value != int(value)):  # NaN fails the comparison
        words = "a whole number" if kind is int else "a number"
        raise Refused(f"{name} must be {words} from {low} to {high}, got {value!r}")
    return kind(value)


def _given(value) -> bool:
    """Whether a table's cell holds something: pandas fills missing ones with None or NaN."""
    return value is not None and not (isinstance(value, float) and np.isnan(value))


def sampling_of(row: dict, params: dict) -> Sampling:
    """A row's own parameters, else the call's, else the defaults.

    Raises:
        Refused: a value is out of its range, or asks for what this model doesn't do.
    """

    def value(name):
        return row[name] if _given(row.get(name)) else params[name] if _given(params.get(name)) else DEFAULTS[name]

    for name in ("frequency_penalty", "presence_penalty", "top_k", "tools", "stream"):
        asked = row.get(name)
        if _given(asked) and np.size(asked) and np.any(asked):
            hint = "; call predict_stream instead" if name == "stream" else ""
            raise Refused(f"{name} is not supported by this model, got {asked!r}{hint}")
    stop = value("stop")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) or not text for text in stop):
        raise Refused(f"stop must hold non-empty strings, got {list(stop)!r}")
    return Sampling(
        max_tokens=_number("max_tokens", value("max_tokens"), int, 1, 2**20),
        temperature=_number("temperature", value("temperature"), float, 0.0, 2.0),
        top_p=_number("top_p", value("top_p"), float, 1e-6, 1.0),
        seed=_number("seed", value("seed"), int, 0, 2**63 - 1),
        stop=stop,
        n=_number("n", value("n"), int, 1, MOST_CHOICES),
    )


def sample(logits: np.ndarray, sampling: Sampling, seed: int, step: int) -> int:
    """Draws one token id from `logits` (vocabulary,), by temperature and nucleus (arXiv:1904.09751).

    Each token's noise depends on seed, step and token alone (the Gumbel-max trick, arXiv:1611.01144), so that rounding
    that differs from batch to batch changes a draw only where two tokens were all but tied.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        cumulative = np.cumsum(np.exp(scaled[order] - scaled[order[0]]))
        kept = np.searchsorted(cumulative, sampling.top_p * cumulative[-1]) + 1
        scaled[order[kept:]] = -np.inf
    return int(np.argmax(scaled + np.random.default_rng((seed, step)).gumbel(size=len(scaled))))


# ---------------------------------------------------------------------------------------------------------------------
# Text to tokens


def read_chat_template(folder: str | Path) -> tuple[str, dict[str, str]]:
    """A checkpoint folder's chat template ("" where it has none) and its special tokens by name."""
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several named ones
        template = next((entry["template"] for entry in template if entry["name"] == "default"), "")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        token = config.get(name)
        if token:
            special[name] = token["content"] if isinstance(token, dict) else token
    return template, special


def render(template: str, special_tokens: dict[str, str], messages: list[dict]) -> str:
    """A conversation as the text the model was trained on, by the rules transformers renders templates with.

    Raises:
        Refused: the template doesn't take this conversation.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, tools=None, documents=None, **special_tokens
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise Refused(f"the model's chat template refused the conversation: {error}") from None


def messages_of(value) -> list[dict]:
    """A conversation as a list of {"role", "content"}.

    Raises:
        Refused: it is empty, or a message has no text.
    """
    messages = [dict(message) for message in value] if isinstance(value, list | tuple | np.ndarray) else None
    if not messages:
        raise Refused("messages must hold at least one message, got an empty conversation")
    for position, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise Refused(f"messages[{position}] must have a role and a content, both text, got {message!r:.80}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


# ---------------------------------------------------------------------------------------------------------------------
# Runtimes: both take a batch of token ids and give, step by step, the next token of each row


def physical_cores() -> int:
    """The cores this process may use, hyperthreads not counted twice (proc(5), cpuinfo)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        blocks = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")
    except OSError:
        return len(allowed)
    cores = set()
    for block in blocks:
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())}
        if facts.get("processor", "").isdigit() and int(facts["processor"]) in allowed:
            cores.add((facts.get("physical id"), facts.get("core id", facts["processor"])))
    return len(cores) or len(allowed)


class OnnxRuntime:
    """onnxruntime-genai over a folder with genai_config.json."""

    def __init__(self, folder: Path, config: dict):
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # the Linux wheel sends events otherwise
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        self._og = og
        settings = og.Config(str(folder))
        provider = config.get("execution_provider")
        if provider:
            settings.clear_providers()
            if provider != "cpu":
                settings.append_provider(provider)
        # its own default was one thread on two cores, at 0.6 of the speed
        options = {"intra_op_num_threads": int(config.get("threads") or physical_cores())}
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(settings)
        facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        end = facts["eos_token_id"]
        self.end_tokens = frozenset(end if isinstance(end, list) else [end])
        self.context_length = int(facts["context_length"])
        decoder = facts["decoder"]
        self.bytes_per_token = 8 * (
            decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        )  # a key and a value, four bytes at most each
        self._vocabulary = int(facts["vocab_size"])
        self._padding = int(facts["pad_token_id"])

    def steps(self, rows: list[Row]) -> Iterator[np.ndarray]:
        """Yields the next token id of every row, shape (rows,), until the caller stops.

        Rows are padded on the right, and a graph whose head was pruned gives the logits of the last, padded place.
        So the prompts go in without their last token, which is then forced as if it had been generated: one step
        more, right logits for each row, and no head computed over whole prompts. Batch 1 does the same, so that a
        row's numbers, and in int4 its text, don't depend on the company it is answered in.
        """
        og = self._og
        last = [row.prompt[-1] for row in rows]
        forced = len(rows[0].prompt) > 1 and last[0] not in self.end_tokens  # alone_in_batch keeps others out
        width = max(len(row.prompt) for row in rows)
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=width + max(row.room for row in rows), batch_size=len(rows), do_sample=False
        )
        generator = og.Generator(self._model, parameters)
        ids = np.full((len(rows), width - forced), self._padding, dtype=np.int32)
        for place, row in enumerate(rows):
            ids[place, : len(row.prompt) - forced] = row.prompt[: len(row.prompt) - forced]
        generator.append_tokens(ids if len(rows) > 1 else ids[0])
        if forced:
            self._choose(generator, dict(enumerate(last)), len(rows))
            generator.generate_next_token()
        while not generator.is_done():
            drawn = {
                place: row.sampling
                for place, row in enumerate(rows)
                if row.sampling.temperature and not row.finish_reason
            }
            if drawn:
                logits = generator.get_logits().reshape(len(rows), -1)
                chosen = {place: int(logits[place].argmax()) for place in range(len(rows))}
                for place, sampling in drawn.items():
                    chosen[place] = sample(logits[place], sampling, rows[place].seed, len(rows[place].output))
                self._choose(generator, chosen, len(rows))
            generator.generate_next_token()
            yield generator.get_next_tokens()

    def alone_in_batch(self, prompt: list[int]) -> bool:
        """Whether a prompt's last token can't be forced: an end token would end its row."""
        return len(prompt) == 1 or prompt[-1] in self.end_tokens

    def _choose(self, generator, chosen: dict[int, int], rows: int) -> None:
        logits = np.full((rows, 1, self._vocabulary), -1e9, dtype=np.float32)
        for place, token in chosen.items():
            logits[place, 0, token] = 0.0
        generator.set_logits(logits)


class TransformersRuntime:
    """A causal LM of transformers, with a cache from which finished rows are dropped."""

    def __init__(self, folder: Path, config: dict):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        device = config.get("device") or "auto"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = config.get("dtype") or "auto"
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        ).to(device)
        self._model.eval()
        if config.get("threads") and device == "cpu":
            torch.set_num_threads(int(config["threads"]))
        settings, defaults = self._model.config, self._model.generation_config
        end = defaults.eos_token_id if defaults.eos_token_id is not None else settings.eos_token_id
        self.end_tokens = frozenset(end if isinstance(end, list) else [end] if end is not None else [])
        self.context_length = int(getattr(settings, "max_position_embeddings", 0) or 2**20)
        heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
        width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        self.bytes_per_token = 8 * settings.num_hidden_layers * heads * width

    def steps(self, rows: list[Row]) -> Iterator[np.ndarray]:
        """Yields the next token id of every row, shape (rows,); a finished row's places hold -1."""
        torch = self._torch
        from transformers import DynamicCache

        device = self._model.device
        width = max(len(row.prompt) for row in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):  # padded on the left
            ids[place, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[place, width - len(row.prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        cache = DynamicCache(config=self._model.config)
        live = list(range(len(rows)))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        while live:
            # torch.inference_mode is per thread state: entered for the forward pass alone, never across a yield
            with torch.inference_mode():
                logits = self._model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            tokens = logits.argmax(-1).tolist()
            for at, place in enumerate(live):
                row = rows[place]
                if row.sampling.temperature:
                    tokens[at] = sample(logits[at].float().cpu().numpy(), row.sampling, row.seed, len(row.output))
            step = np.full(len(rows), -1)
            step[live] = tokens
            yield step
            kept = [at for at, place in enumerate(live) if not rows[place].finish_reason]
            if not kept:
                return
            ids = torch.tensor(tokens, device=device)[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            if len(kept) < len(live):
                chosen = torch.tensor(kept, device=device)
                with torch.inference_mode():
                    cache.batch_select_indices(chosen)
                ids, mask, positions = ids[chosen], mask[chosen], positions[chosen]
                live = [live[at] for at in kept]

    def alone_in_batch(self, prompt: list[int]) -> bool:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# The model


class SmallLanguageModel(PythonModel):
    """Answers conversations (llm/v1/chat) or plain prompts, every row of its input, in order.

    `model_config` may hold at load: batch_size, threads, execution_provider (ONNX), device and dtype (transformers).
    """

    _skip_type_hint_validation = True  # the signature is logged; MLflow would ask for type hints at every load

    def load_context(self, context):
        from tokenizers import Tokenizer

        config = dict(context.model_config or {})
        folder = context.artifacts.get("checkpoint") or context.artifacts.get("onnx")
        if folder is None:  # logged by reference: the hub has the weights
            from huggingface_hub import snapshot_download

            folder = snapshot_download(
                config["hub_id"], revision=config["revision"], ignore_patterns=["*.bin", "*.pth", "*.gguf", "onnx/*"]
            )
        folder = Path(folder)
        self.schema = config.get("schema", "chat")
        self.name = config.get("model_name", folder.name)
        self.batch_size = int(config.get("batch_size") or BATCH_SIZE)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {id for id, token in added.items() if token.special}
        self.template, self.special_tokens = read_chat_template(folder)
        onnx = (folder / "genai_config.json").exists()
        self._runtime = OnnxRuntime(folder, config) if onnx else TransformersRuntime(folder, config)
        self._lock = threading.RLock()  # neither runtime may be entered by two threads at once

    def predict(self, context, model_input, params=None):
        """Chat: a list of chat completions. Prompt: a list of strings. One per row, in order.

        A row that can't be answered has finish_reason "error" with its reason (chat) or None (prompt); where it is
        the only row, its reason is raised instead, so that a server answers 400.
        """
        rows, params = self._rows(model_input), params or {}
        answers: list[list[Answer]] = [[] for _ in rows]
        for index, choices in self.answers(rows, params):
            answers[index] = choices
        if len(rows) == 1 and answers[0][0].error:
            raise MlflowException(answers[0][0].error, error_code=INVALID_PARAMETER_VALUE)
        if self.schema == "prompt":
            return [None if choices[0].error else choices[0].text for choices in answers]
        return [self._completion(choices) for choices in answers]

    def predict_stream(self, context, model_input, params=None):
        """Yields what is generated as it comes: OpenAI chunks (chat) or pieces of text (prompt). One row, n = 1."""
        rows = self._rows(model_input)
        if len(rows) != 1:
            raise MlflowException(f"a stream answers one row, got {len(rows)}", error_code=INVALID_PARAMETER_VALUE)
        try:
            row = {name: value for name, value in rows[0].items() if name != "stream"}
            [prepared] = self._prepare(0, row, params or {})[:1]
        except Refused as refusal:
            raise MlflowException(str(refusal), error_code=INVALID_PARAMETER_VALUE) from None
        pieces = self._pieces(prepared)
        if self.schema == "prompt":
            yield from pieces
            return
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self.name,
        }

        def chunk(delta, finish_reason=None):
            return head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}

        yield chunk({"role": "assistant", "content": ""})
        for piece in pieces:
            yield chunk({"content": piece})
        yield chunk({}, prepared.finish_reason)

    def answers(
        self, rows: Iterable[dict], params: dict | None = None, batch_size: int = 0
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Answers rows of {"messages" or "prompt", and parameters}, yielding (row, its n answers) as they finish.

        Rows of like length are generated together, the longest first, at most `batch_size` (0: the model's own) and
        CACHE_BYTES of keys and values at a time. Greedy text doesn't depend on the batch.
        """
        waiting: list[Row] = []
        left: dict[int, int] = {}
        done: dict[int, dict[int, Answer]] = {}
        for index, row in enumerate(rows):
            try:
                prepared = self._prepare(index, row, params or {})
            except Refused as refusal:
                yield index, [Answer("", "error", error=str(refusal))]
                continue
            waiting += prepared
            left[index], done[index] = len(prepared), {}
        for batch in self._batches(waiting, batch_size or self.batch_size):
            with self._lock:
                for row in self._run(batch):
                    index, choice = row.index
                    done[index][choice] = Answer(
                        row.text, row.finish_reason, len(row.prompt), len(row.output), row.seconds
                    )
                    if len(done[index]) == left[index]:
                        answers = [done[index][choice] for choice in sorted(done[index])]
                        yield index, answers * (row.sampling.n // len(answers))

    def render(self, messages: list[dict]) -> str:
        """A conversation as this model's prompt text."""
        if not self.template:
            raise Refused("the model has no chat template; use the prompt schema")
        return render(self.template, self.special_tokens, messages)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _rows(self, model_input) -> list[dict]:
        """The input as one dict per row."""
        key = "prompt" if self.schema == "prompt" else "messages"
        if hasattr(model_input, "to_dict"):  # a DataFrame
            return model_input.to_dict(orient="records")
        if isinstance(model_input, dict):
            value = model_input.get(key)
            if key == "prompt" and not isinstance(value, str) and isinstance(value, list | tuple | np.ndarray):
                return [{key: text} for text in value]  # a column
            return [model_input]
        rows = [model_input] if isinstance(model_input, str) else list(model_input)
        return [row if isinstance(row, dict) else {key: row} for row in rows]

    def _prepare(self, index: int, row: dict, params: dict) -> list[Row]:
        """A row's texts on their way: n of them, or one where all n would be equal."""
        sampling = sampling_of(row, params)
        if self.schema == "prompt" and "messages" not in row:
            prompt = row.get("prompt")
            if not isinstance(prompt, str) or not prompt:
                raise Refused(f"prompt must be a non-empty text, got {prompt!r}")
            ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
            if not ids or ids[0] not in self._special_ids:  # else it came through a template, which adds its own
                ids = self._tokenizer.encode(prompt, add_special_tokens=True).ids
        else:
            ids = self._tokenizer.encode(self.render(messages_of(row.get("messages"))), add_special_tokens=False).ids
        room = self._runtime.context_length - len(ids)
        if not ids or room < 1:
            raise Refused(f"the prompt has {len(ids)} tokens; the context length is {self._runtime.context_length}")
        choices = sampling.n if sampling.temperature else 1
        return [
            Row((index, choice), ids, sampling, min(sampling.max_tokens, room), sampling.seed + choice)
            for choice in range(choices)
        ]

    def _batches(self, rows: list[Row], batch_size: int) -> Iterator[list[Row]]:
        batch: list[Row] = []
        for row in sorted(rows, key=lambda row: -len(row.prompt)):
            if self._runtime.alone_in_batch(row.prompt):
                yield [row]
                continue
            longer = [*batch, row]
            span = len(longer[0].prompt) + max(member.room for member in longer)  # what each row's cache must hold
            full = len(batch) == batch_size or span * len(longer) * self._runtime.bytes_per_token > CACHE_BYTES
            if batch and (full or span > self._runtime.context_length):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _run(self, batch: list[Row], streamed: bool = False) -> Iterator[Row]:
        """Generates a batch; yields each row as it finishes, and a streamed one at every token."""
        from tokenizers.decoders import DecodeStream

        start = time.perf_counter()
        streams = {id(row): DecodeStream(skip_special_tokens=True) for row in batch if streamed or row.sampling.stop}
        for tokens in self._runtime.steps(batch):
            for row, token in zip(batch, tokens, strict=True):
                if row.finish_reason:
                    continue
                row.output.append(int(token))
                if token in self._runtime.end_tokens:
                    row.finish_reason = "stop"
                elif id(row) in streams:
                    row.text += streams[id(row)].step(self._tokenizer, int(token)) or ""
                    cut = min((at for at in map(row.text.find, row.sampling.stop) if at >= 0), default=-1)
                    if cut >= 0:
                        row.text, row.finish_reason = row.text[:cut], "stop"
                        row.seconds = time.perf_counter() - start
                        yield row
                        continue
                if not row.finish_reason and len(row.output) >= row.room:
                    row.finish_reason = "length"
                if row.finish_reason:
                    row.seconds = time.perf_counter() - start
                    ended = row.output[-1] in self._runtime.end_tokens
                    row.text = self._tokenizer.decode(row.output[: len(row.output) - ended], skip_special_tokens=True)
                if row.finish_reason or streamed:
                    yield row
            if all(row.finish_reason for row in batch):
                return

    def _pieces(self, row: Row) -> Iterator[str]:
        """A row's text in pieces; what may still become a stop string, or half a character, is held back."""
        sent = 0
        with self._lock:
            for state in self._run([row], streamed=True):
                ready = len(state.text)
                if not state.finish_reason:
                    ready -= max((_overlap(state.text, stop) for stop in row.sampling.stop), default=0)
                if ready > sent:
                    yield state.text[sent:ready]
                    sent = ready

    def _completion(self, choices: list[Answer]) -> dict:
        first = choices[0]
        completion = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text},
                    "finish_reason": answer.finish_reason,
                }
                for index, answer in enumerate(choices)
            ],
            "usage": {
                "prompt_tokens": first.prompt_tokens,
                "completion_tokens": sum(answer.output_tokens for answer in choices),
                "total_tokens": first.prompt_tokens + sum(answer.output_tokens for answer in choices),
            },
        }
        return completion | (
            {"error": {"type": "invalid_request_error", "message": first.error}} if first.error else {}
        )


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


set_model(SmallLanguageModel())
