"""The logged wrapper: answers chat or plain prompts with transformers, onnxruntime or onnxruntime-genai.

MLflow copies this one file into the logged model, and runs the copy at load (models from code, no pickle). So this file
imports no other file of this project. Each runtime's libraries are imported only where they are used. An ONNX GenAI
folder needs neither torch nor transformers. On the CPU, most folders need only onnxruntime (ContinuousRuntime).
All runtimes share the code that renders, tokenizes, samples, finds stop strings and builds answers.
In fp32, all runtimes give the same greedy text.

Not covered: tools, images, top_k, logit penalties and beam search. A request for tools, images, top_k or a penalty is
refused.

A stranger may have written a chat template, and a template is a program. A child process renders the template within
bounds of time and memory (Confined).

Hugging Face's `tokenizers` reads the checkpoint's own tokenizer.json. The encoder of onnxruntime-genai is not used,
because it cuts a text at its first NUL.
"""

import atexit
import copy
import datetime
import functools
import inspect
import itertools
import json
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

VERSION = "0.2.0"  # of this file. The repository's own copy runs a logged model of the same version
# Of a request that doesn't say. 512 tokens are a page: most answers end by themselves before
DEFAULTS = {"max_tokens": 512, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": [], "n": 1}
SPAN_STEP = 64  # tokens; keys and values are allocated for a multiple of this number
SCRATCH_BYTES = 2**28  # for attention; they limit the tokens of a prompt that go through a graph at once
CACHE_BYTES = 2 * 2**30  # for the keys and values of the rows that are generated at once, with padding
LOGITS_BYTES = 2**27  # for the logits of several places at once
READ_TOKENS = 2**11  # that go through transformers at once, where known tokens are read
LANE_ROWS = 16  # rows per core; with fewer rows, a batch of its own doesn't keep a core busy
LANE_BYTES = 2**28  # of weights that lanes hold a second time; with more, products are long enough to share
MOST_CHOICES = 16
TEMPLATE_SECONDS = 5  # of processor time for one rendering
TEMPLATE_BYTES = 2**29  # of memory for one rendering
CPU_FACTS = Path("/proc/cpuinfo")
KEEP = "num_logits_to_keep"  # an optional input of a graph: the number of last places that get logits; 0 is all
EXACT_INTEGERS = ("session.x64quantprecision", "1")  # of onnxruntime; slower, needed where integers saturate
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Refused(ValueError):
    """This row can't be answered. The other rows can. The message gives the reason in one line."""


@dataclass(frozen=True)
class Sampling:
    """The generation parameters of one row, with OpenAI's names."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    n: int


GREEDY = Sampling(max_tokens=1, temperature=0.0, top_p=1.0, seed=0, stop=(), n=1)


@dataclass(frozen=True)
class Answer:
    """One generated text. `output_tokens` counts every generated token, including the end token."""

    text: str
    finish_reason: str  # stop | length | error
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0  # from the start of the prompt, or of the batch, to the last token
    error: str = ""
    token_ids: tuple[int, ...] = ()  # all generated tokens, including the end token


@dataclass(frozen=True)
class TokenScores:
    """What a model thinks of given tokens: `token_scores` has one for each row."""

    log_probabilities: np.ndarray  # (tokens,) float32, natural logarithms
    likeliest: np.ndarray  # (tokens,) bool: whether the token is the likeliest one


# Gets (place of the row, first token, log probabilities (tokens, vocabulary) in float32). The pieces of a row may come
# in any order, and rows from several threads at once.
SeeDistributions = Callable[[int, int, np.ndarray], None]


@dataclass
class Row:
    """One text that is being generated: the token ids of its prompt, and its tokens so far."""

    index: tuple[int, int]  # (row of the input, which of its n answers)
    prompt: list[int]
    sampling: Sampling
    room: int  # the most tokens that may be generated
    seed: int
    output: list[int] = field(default_factory=list)
    finish_reason: str = ""
    text: str = ""  # complete at the end; before that only with stop strings and in streams
    started: float = 0.0  # perf_counter; 0 if the row starts with its batch
    seconds: float = 0.0
    tenant: str = ""  # keys and values are copied only between rows of one tenant
    forced: list[int] = field(default_factory=list)  # the tokens, if they are given and not chosen: `room` of them
    # gets the place of a given token, and the logits (tokens, vocabulary) from which it and the next ones follow
    see: Callable[[int, np.ndarray], None] = lambda first, logits: None

    def end(self, reason: str) -> None:
        """Ends the row, for a reason such as stop, length, cancelled or dropped. The first reason stays."""
        self.finish_reason = self.finish_reason or reason


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
    """Whether a table's cell holds a value. pandas fills empty cells with None or NaN."""
    return value is not None and not (isinstance(value, float) and np.isnan(value))


def sampling_of(row: dict, params: dict) -> Sampling:
    """The parameters of a row. The row's value comes first, then the call's value, then the default.

    Raises:
        Refused: a value is out of its range, or the model does not support the parameter.
    """

    def value(name):
        return row[name] if _given(row.get(name)) else params[name] if _given(params.get(name)) else DEFAULTS[name]

    for name in ("frequency_penalty", "presence_penalty", "top_k", "tools", "stream"):
        asked: Any = row.get(name)
        if _given(asked) and np.size(asked) and np.any(asked):
            hint = "; call predict_stream instead" if name == "stream" else ""
            raise Refused(f"{name} is not supported by this model, got {asked!r}{hint}")
    stop = value("stop")
    stop = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
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

    The temperature must be above 0. A token's noise depends only on the seed, the step and the token (the Gumbel-max
    trick, arXiv:1611.01144). Rounding differs from batch to batch. So rounding changes a draw only if two tokens are
    almost tied.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        cumulative = np.cumsum(np.exp(scaled[order] - scaled[order[0]]))
        kept = np.searchsorted(cumulative, sampling.top_p * cumulative[-1]) + 1
        scaled[order[kept:]] = -np.inf
    return int(np.argmax(scaled + np.random.default_rng((seed, step)).gumbel(size=len(scaled))))


def next_token(logits: np.ndarray, row: Row) -> int:
    """The token id after `logits` (vocabulary,): at temperature 0 the likeliest token, else a drawn token.

    Of a row whose tokens are given, it is the given token.
    """
    if row.forced:
        row.see(len(row.output), logits[None])
        return row.forced[len(row.output)]
    if row.sampling.temperature:
        return sample(logits, row.sampling, row.seed, len(row.output))
    return int(logits.argmax())


# ---------------------------------------------------------------------------------------------------------------------
# Text to tokens


def read_chat_template(folder: str | Path) -> tuple[str, dict[str, str]]:
    """A checkpoint folder's chat template, and its special tokens by name. Without a template, the first is "".

    Raises:
        Refused: a file can't be read, or the template or a token is not text.
    """
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    try:
        template, special = _templates_of(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise Refused(
            f"the chat template or tokenizer_config.json can't be read ({type(error).__name__}: {error})"
        ) from None
    return template, special


def _templates_of(config: dict) -> tuple[str, dict[str, str]]:
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several templates with names
        template = next((entry["template"] for entry in template if entry["name"] == "default"), "")
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        token = config.get(name)
        if token:
            special[name] = token["content"] if isinstance(token, dict) else token
    if not all(isinstance(text, str) for text in (template, *special.values())):
        raise TypeError("one of them is no text")
    return template, special


class CallFailed(Exception):
    """A confined call gave no answer. The message is the end of a sentence that starts with a name."""


class Confined:
    """Calls functions in a child process. The system ends each call that takes too much time or memory.

    A stranger's template or pattern can loop forever, or request all memory, inside C code that no thread can
    interrupt. A call may take `seconds` of processor time. Processor time is counted so that a busy machine changes no
    answer. A call may also take `room` bytes of address space beyond the memory that the idle child has. The child
    starts with the first call. After an ended call, the next call starts another child. The child ends when this
    process ends, even if this process is killed.

    `program` is Python source that defines FUNCTIONS. FUNCTIONS has, for each name, a function and the arguments of a
    first call. The first call has no bounds, because the function's imports happen in it. Arguments and answers are
    plain data.

    On Windows there are no bounds. Systems without /proc bound the processor time, but not the memory.
    """

    def __init__(self, program: str, seconds: float, room: int):
        self._program = f"{program}\n{inspect.getsource(_answer_calls)}\n_answer_calls(FUNCTIONS, {seconds}, {room})\n"
        self._seconds, self._room = seconds, room
        self._lock, self._closed = threading.Lock(), False
        self._child: Any = None  # a subprocess.Popen with two pipes
        atexit.register(self._close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._leave)

    def call(self, name: str, *arguments):
        """The answer of the function `name`.

        Raises:
            CallFailed: the call exceeded a bound, the function raised an exception, or the child process ended or can't
                start.
        """
        line = json.dumps([name, arguments]).encode() + b"\n"
        with self._lock:
            while True:
                first, self._child = self._child is None, self._child or self._started()
                try:
                    said = self._exchanged(line)
                except BaseException:  # a signal: the next call would get this call's answer
                    self._end()
                    raise
                if "answer" in said:
                    return said["answer"]
                if "failed" in said:
                    raise CallFailed(f"failed: {said['failed']}")
                code = self._end(wait=not said)
                late = code == -getattr(signal, "SIGPROF", 256)
                if first or late:  # else earlier calls may be the cause: try a new child
                    raise CallFailed(self._reason(said, code, late))

    def _reason(self, said: dict, code: int, late: bool) -> str:
        if late:
            return f"took more than {self._seconds:g} s of processor time"
        if said:
            return f"took more than {self._room // 2**20} MiB of memory"
        with suppress(ValueError):
            return f"ended its process with {signal.Signals(-code).name}"
        return f"ended its process with exit code {code}"

    def _started(self) -> subprocess.Popen:
        if self._closed:
            raise CallFailed("was called while the process ends")
        if not sys.executable:
            raise CallFailed("can't run: sys.executable is empty, so no Python can be started")
        path = [str(Path(entry).absolute()) for entry in sys.path if isinstance(entry, str)]
        command = [sys.executable, "-I", "-c", f"import sys\nsys.path[:] = {path!r}\n{self._program}"]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # a forked process must not inherit a half-written line
            start_new_session=True,  # a terminal's Ctrl-C doesn't reach the child
        )

    def _exchanged(self, line: bytes) -> dict:
        """The child's reply to a line. The reply is {} if the child ends instead."""
        with suppress(BrokenPipeError):
            left = memoryview(line)
            while left:
                left = left[self._child.stdin.write(left) :]
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            parts.append(self._child.stdout.read(2**20))
            if not parts[-1]:
                return {}
        return json.loads(b"".join(parts))

    def _end(self, wait: bool = False) -> int:
        """Ends the child, and gives its exit code. With `wait`, the child ends by itself."""
        child, self._child = self._child, None
        if child is None:
            return 0
        if not wait:
            child.kill()
        code = child.wait()
        child.stdin.close()
        child.stdout.close()
        return code

    def _close(self) -> None:
        """Ends the child at the end of this process. Other threads may be in a call at that time."""
        self._closed = True
        self._end()

    def _leave(self) -> None:
        """Runs after a fork. The child belongs to the parent process, and another thread may hold the lock."""
        child, self._child, self._lock = self._child, None, threading.Lock()
        if child is not None:
            child.returncode = 0  # the parent process waits for the child
            child.stdin.close()
            child.stdout.close()


def _answer_calls(functions: dict, seconds: float, room: int) -> None:
    """The loop of a confined process. Answers calls, one JSON line each, until the input ends.

    The process gets only the source of this function. So the function imports the modules that it uses.
    """
    import json
    import os
    import signal
    from pathlib import Path

    try:
        import resource
    except ImportError:  # Windows
        resource = None  # type: ignore[assignment]

    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # a library's prints must not look like an answer

    def bound_memory(more: int | None) -> None:
        sizes = Path("/proc/self/statm")  # proc(5)
        if resource is None or not sizes.exists():
            return
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = hard if more is None else int(sizes.read_text().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))

    def bound_time(limit: float) -> None:
        if resource is not None:
            signal.setitimer(signal.ITIMER_PROF, limit)

    if resource is not None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the signal ends this process at any point
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash writes no core file
    called = set()
    for line in calls:
        name, arguments = json.loads(line)
        try:
            function, example = functions[name]
            if name not in called:
                bound_memory(None)
                function(*example)
                called.add(name)
                bound_memory(room)
            bound_time(seconds)
            said = json.dumps({"answer": function(*arguments)})
        except MemoryError:
            bound_memory(None)
            said = '{"memory": true}'
        except Exception as error:
            said = json.dumps({"failed": f"{type(error).__name__}: {' '.join(str(error).split()):.300}"})
        bound_time(0)
        try:
            answers.write(said.encode() + b"\n")
            answers.flush()
        except BrokenPipeError:
            os._exit(0)


@functools.lru_cache(maxsize=4)  # compiling takes longer than rendering
def _compiled(template: str):
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
    return environment.from_string(template)


def _rendered(template: str, special_tokens: dict[str, str], messages: list[dict]) -> dict[str, str]:
    """Runs in the confined process. Gives {"text"}, or {"refused"} with the reason in one line."""
    import jinja2

    try:
        text = _compiled(template).render(
            messages=messages, add_generation_prompt=True, tools=None, documents=None, **special_tokens
        )
        # the tokenizer then reads this text without bounds
        most = 2**20 + 4 * len(json.dumps(messages))
        if len(text) <= most:
            return {"text": text}
        reason = f"its text has {len(text):,} characters; the limit is {most:,}"
    except MemoryError:
        raise
    except (jinja2.TemplateError, TypeError) as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    printable = "".join(mark if mark.isprintable() else " " for mark in reason[:1000])
    return {"refused": " ".join(printable.split())[:300]}


_templates = Confined(
    "\n".join(
        [
            "import datetime, functools, json",
            inspect.getsource(_compiled),  # read at import: this file may be gone later
            inspect.getsource(_rendered),
            "FUNCTIONS = {'render': (_rendered, ['', {}, []])}",
        ]
    ),
    TEMPLATE_SECONDS,
    TEMPLATE_BYTES,
)


def render(template: str, special_tokens: dict[str, str], messages: list[dict]) -> str:
    """The prompt text of a conversation. The template is rendered by the rules of transformers.

    A rendering may take TEMPLATE_SECONDS of processor time and TEMPLATE_BYTES of memory, where Confined has bounds.

    Raises:
        Refused: the template refuses the conversation, fails, or exceeds a bound.
    """
    try:
        rendered = _templates.call("render", template, special_tokens, messages)
    except CallFailed as reason:
        raise Refused(f"the model's chat template {reason}") from None
    if "refused" in rendered:
        raise Refused(f"the model's chat template refused the conversation: {rendered['refused']}")
    return rendered["text"]


def messages_of(value) -> list[dict]:
    """A conversation as a list of {"role", "content"}.

    Raises:
        Refused: the value is no list, the list is empty, or a message has no text as its role or content.
    """
    messages = [dict(message) for message in value] if isinstance(value, list | tuple | np.ndarray) else None
    if not messages:
        raise Refused("messages must hold at least one message, got an empty conversation")
    for position, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise Refused(f"messages[{position}] must have a role and a content, both text, got {message!r:.80}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


# ---------------------------------------------------------------------------------------------------------------------
# Runtimes: each takes rows of token ids and gives, step by step, each row's next token


def physical_cores() -> int:
    """The number of cores that this process may use. Two hyperthreads count as one core (proc(5), cpuinfo).

    Without /proc/cpuinfo, each hyperthread counts.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        blocks = CPU_FACTS.read_text(encoding="utf-8").split("\n\n")
    except OSError:
        return len(allowed)
    cores = set()
    for block in blocks:
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())}
        if facts.get("processor", "").isdigit() and int(facts["processor"]) in allowed:
            cores.add((facts.get("physical id"), facts.get("core id", facts["processor"])))
    return len(cores) or len(allowed)


def integers_saturate() -> bool:
    """Whether onnxruntime clips sums of products of unsigned and signed bytes on this machine.

    On x86 without VNNI or AMX, onnxruntime clips these sums. An x86 machine without /proc/cpuinfo counts as such a
    machine.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return re.search(r"\b(avx512_vnni|avx_vnni|amx_int8)\b", CPU_FACTS.read_text("utf-8")) is None
    except OSError:
        return True


def exact_integers(decoder: dict) -> dict[str, str]:
    """The session's entry for exact sums. The entry in genai_config.json decides, if it has one.

    Without this entry, sums are exact on machines where integers saturate. The exports of slm/models/quantization.py
    set the entry to "0", because their sums never clip.
    """
    name, exact = EXACT_INTEGERS
    said = (decoder.get("session_options") or {}).get(name)
    if said in ("0", "1"):
        return {name: said}
    return {name: exact} if integers_saturate() else {}


class Runtime(Protocol):
    """What generates tokens: ContinuousRuntime, OnnxRuntime or TransformersRuntime. One thread at a time may use it."""

    library: str  # its package
    batch_size: int  # rows that it generates best together
    refills: bool  # whether the next row takes the place of a row that has ended
    end_tokens: frozenset[int]
    context_length: int  # tokens of a prompt and its answer together
    bytes_per_token: int  # of keys and values
    vocabulary_size: int  # entries of the logits; a tokenizer may know fewer tokens
    reads: bool  # whether it gives the logits of several places of a text at once, by `read`
    passes_end: bool  # whether tokens may follow an end token

    def steps(
        self, rows: list[Row], places: int = 0, take: Callable[[], int] | None = None
    ) -> Iterator[dict[int, int]]:
        """Yields the next token id of the rows that take part in a step, by their position in `rows`.

        The caller appends the token, and calls `Row.end` for a row that has ended. A row that has ended takes no
        further part. A runtime that refills has at most `places` rows under way (0: all). `take` gives the position of
        the next row, or raises IndexError; only a runtime that refills calls it.
        """

    def read(self, rows: list[Row], take: Callable[[], int] | None = None) -> Iterator[int]:
        """Calls `Row.see` for all given tokens of the rows. Yields each row's position when the row is done.

        Only for a runtime that `reads`. A beginning that rows share is computed once.
        """

    def alone_in_batch(self, prompt: list[int]) -> bool:
        """Whether a prompt can't share a batch."""

    def lanes(self, rows: int) -> list["Runtime"]:
        """The runtimes that generate so many rows best, side by side, one thread each."""


def onnx_runtime(folder: Path, config: dict) -> Runtime:
    """Opens an ONNX GenAI folder with ContinuousRuntime if ContinuousRuntime supports the graph, else with OnnxRuntime.

    ContinuousRuntime supports graphs with grouped-query attention and the usual inputs, on the CPU, without sliding
    windows.
    """
    content = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    decoder = content["model"]["decoder"]
    listed = decoder.get("session_options", {}).get("provider_options")
    known = {"input_ids", "attention_mask", "position_ids", "past_key_names", "past_value_names"}
    fits = (
        (config.get("execution_provider") or ("cpu" if not listed else "")) == "cpu"
        and content.get("search", {}).get("past_present_share_buffer")
        and set(decoder.get("inputs", {})) <= known
        and not (decoder.get("sliding_window") or {}).get("layers")
        and "pipeline" not in decoder
    )
    return ContinuousRuntime(folder, config, content["model"]) if fits else OnnxRuntime(folder, config)


@dataclass
class BatchPlaces:
    """Keys and values of the rows that are generated together, and the prompts that they come from.

    A place is a batch place: a finished row's place goes to the next row.
    """

    session: Any  # of the bindings
    arrays: dict[tuple[int, str], np.ndarray]  # (layer, key or value): (places, heads, span, head size)
    prompts: list[np.ndarray]  # by place: the tokens of its first keys and values
    tenants: list[str]  # by place: the tenant of that prompt
    logits: np.ndarray  # (places, 1, vocabulary)
    span: int
    bindings: dict = field(default_factory=dict)

    def copy(self, source: int, target: int, length: int) -> None:
        for array in self.arrays.values():
            array[target, :, :length] = array[source, :, :length]


class ContinuousRuntime:
    """Runs the graph of an ONNX GenAI folder with onnxruntime, on the CPU, by continuous batching.

    onnxruntime-genai (0.18) keeps a batch together until its longest answer ends. It pads the prompts, and computes a
    common beginning again for each prompt. Grouped-query attention allows a different length for every row of a batch.
    So this runtime gives a finished row's batch place to the next row, and pads nothing. It copies the keys and values
    of a beginning that another batch place holds, also from an earlier call. Each prompt goes through the graph alone,
    which gives its first token. Then the rows are generated together. So a row's numbers don't depend on the other rows
    of its batch. In int4, this keeps the row's text the same too.

    A copied beginning makes an answer faster. So the time of an answer could show one tenant the prompts of another
    tenant. Therefore a row copies a beginning only from a row of its own tenant.

    A small model's kernels end before a second core can help. So, with enough rows, each core generates a batch of its
    own (a lane). A lane takes the next row when one of its rows ends.
    """

    library = "onnxruntime"
    refills = True
    passes_end = True

    def __init__(self, folder: Path, config: dict, facts: dict):
        decoder = facts["decoder"]
        self._file = folder / decoder["filename"]
        self._threads = int(config.get("threads") or physical_cores())
        self._entries = exact_integers(decoder)
        self.batch_size = max(64, LANE_ROWS * self._threads) if self._small() else 48
        self._session = self._open(self._threads)
        self._opened = self._stamp()
        self._lanes: list[Runtime] = []
        inputs = {entry.name: entry for entry in self._session.get_inputs()}
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._names = names = decoder["inputs"] | decoder["outputs"]
        self._with_positions = names.get("position_ids") in inputs
        self._dtype = dtypes[inputs[names["past_key_names"] % 0].type]
        logits = next(entry for entry in self._session.get_outputs() if entry.name == names["logits"])
        self._logits_dtype = dtypes[logits.type]
        self._keeps = KEEP in {entry.name for entry in self._session.get_overridable_initializers()}
        self.reads = self._keeps or logits.shape[1] != 1
        self._shape = (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"])
        self._heads, self.vocabulary_size = int(decoder["num_attention_heads"]), int(facts["vocab_size"])
        end = facts["eos_token_id"]
        self.end_tokens = frozenset(end if isinstance(end, list) else [end])
        self.context_length = int(facts["context_length"])
        self.bytes_per_token = 2 * int(np.prod(self._shape)) * np.dtype(self._dtype).itemsize
        self._idle: list[BatchPlaces] = []  # at most one, of the last call: the next prompts may begin alike

    def _open(self, threads: int):
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        self._ort = onnxruntime
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        for entry in self._entries.items():
            options.add_session_config_entry(*entry)
        return onnxruntime.InferenceSession(str(self._file), options, providers=["CPUExecutionProvider"])

    def _small(self) -> bool:
        """Whether the weights may be held a second time. If their files are gone, they can't be read again."""
        return 0 < sum(size for _, _, size, *_ in self._stamp()) <= LANE_BYTES

    def _stamp(self) -> list[tuple]:
        """Facts that change when a file of the graph is written or replaced. Without files, the list is empty."""
        files = sorted(path for path in self._file.parent.glob(f"{self._file.name}*") if path.exists())
        found = [(path.name, path.stat()) for path in files]
        return [(name, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns) for name, told in found]

    def lanes(self, rows: int) -> list[Runtime]:
        """The runtimes that generate `rows` rows best, side by side, with one thread for each runtime.

        Lanes share their weights with each other, but not with the runtime that makes them. So the runtime reads the
        files once more. With few rows, large weights, or removed or changed files, there are no lanes, and this runtime
        works alone.
        """
        if self._threads == 1 or rows < LANE_ROWS * self._threads:
            return [self]
        if not self._lanes:
            if not self._small():
                return [self]
            lane = copy.copy(self)
            lane._session = self._open(1)
            if self._stamp() != self._opened:  # the weights may be different now
                return [self]
            self._lanes = [lane] * self._threads
        return self._lanes

    def steps(
        self, rows: list[Row], places: int = 0, take: Callable[[], int] | None = None
    ) -> Iterator[dict[int, int]]:
        """Yields, for each step, the next token ids of its rows, by position in `rows`.

        `places` is the number of batch places; 0 means one for each row. `take` gives the position of a row that has
        not started, or raises IndexError. Without `take`, all rows are taken in order.
        """
        count = min(places or len(rows), len(rows))
        take = take or deque(range(len(rows))).popleft
        held = self._places(count, max(len(row.prompt) + row.room for row in rows))
        lengths, last = np.zeros(count, dtype=np.int64), np.zeros((count, 1), dtype=np.int64)
        live: list[int] = []  # by place: its row's position

        def begin(place: int) -> Generator[dict[int, int], None, bool]:
            """Gives the place to the next row, and yields the row's first token.

            If the first token ends the row, the next row follows. Returns whether a row holds the place.
            """
            while True:
                try:
                    position = take()
                except IndexError:
                    return False
                row = rows[position]
                if row.finish_reason:
                    continue
                row.started = time.perf_counter()
                logits = None
                for logits in self._pieces(held, place, np.array(row.prompt, dtype=np.int64), row.tenant):
                    if logits is None:
                        yield {}  # other batches can run between the pieces of a long prompt
                    if row.finish_reason:
                        break
                if row.finish_reason or logits is None:
                    continue
                token = next_token(logits, row)
                yield {position: token}
                if not row.finish_reason:
                    lengths[place], last[place] = len(row.prompt), token
                    live[place : place + 1] = [position]
                    return True

        try:
            while len(live) < count and (yield from begin(len(live))):
                pass
            while live:
                logits = self._next(held, last[: len(live)], lengths[: len(live)])
                tokens = [next_token(of_row, rows[position]) for of_row, position in zip(logits, live, strict=True)]
                yield dict(zip(live, tokens, strict=True))
                lengths[: len(live)] += 1
                last[: len(live), 0] = tokens
                for place in reversed(range(len(live))):
                    if not rows[live[place]].finish_reason or (yield from begin(place)):
                        continue
                    end = len(live) - 1  # the last row moves here: live places stay adjacent
                    if place < end:
                        held.copy(end, place, lengths[end])
                        held.prompts[place], held.tenants[place] = held.prompts[end], held.tenants[end]
                        live[place], lengths[place], last[place] = live[end], lengths[end], last[end]
                    live.pop()
        finally:
            self._idle.append(held)
            del self._idle[:-1]

    def alone_in_batch(self, prompt: list[int]) -> bool:
        return False

    def _places(self, count: int, span: int) -> BatchPlaces:
        """The batch places of the last call if they are large enough and not in use, else new batch places."""
        with suppress(IndexError):
            held = self._idle.pop()
            if len(held.prompts) >= count and held.span >= span:
                if held.session is not self._session:
                    held.session, held.bindings = self._session, {}
                return held
        span = -(-span // SPAN_STEP) * SPAN_STEP
        layers, heads, size = self._shape
        return BatchPlaces(
            session=self._session,
            arrays={
                (layer, kind): np.empty((count, heads, span, size), dtype=self._dtype)  # only written values are read
                for layer in range(layers)
                for kind in ("key", "value")
            },
            prompts=[np.zeros(0, dtype=np.int64)] * count,
            tenants=[""] * count,
            logits=np.zeros((count, 1, self.vocabulary_size), dtype=self._logits_dtype),
            span=span,
        )

    def _read(self, held: BatchPlaces, place: int, prompt: np.ndarray, tenant: str = "") -> np.ndarray:
        """Puts a prompt's keys and values into a batch place. Gives the logits after the prompt, (vocabulary,)."""
        *_, logits = self._pieces(held, place, prompt, tenant)
        assert logits is not None
        return logits

    def read(self, rows: list[Row], take: Callable[[], int] | None = None) -> Iterator[int]:
        """Calls `Row.see` for all given tokens of the rows. Yields each row's position when the row is done.

        Each row goes through the graph alone, in one batch place. What it has in common with the row before it stays
        in the place. Nothing stays from an earlier call, so the numbers depend on the rows and their order alone.
        """
        take = take or deque(range(len(rows))).popleft
        self._idle.clear()
        held = self._places(1, max(len(row.prompt) + row.room for row in rows))
        with suppress(IndexError):
            while True:
                position = take()
                row = rows[position]
                if row.finish_reason:
                    continue
                ids, first = np.array(row.prompt + row.forced[:-1], dtype=np.int64), len(row.prompt) - 1
                for logits in self._pieces(held, 0, ids, row.tenant, first):
                    if row.finish_reason:
                        break
                    if logits is not None:
                        row.see(first + 1 - len(row.prompt), logits)
                        first += len(logits)
                yield position

    def _pieces(
        self, held: BatchPlaces, place: int, prompt: np.ndarray, tenant: str, keep_from: int | None = None
    ) -> Iterator[np.ndarray | None]:
        """Puts a prompt's keys and values into a batch place. Yields None after each piece, except the last.

        After the last piece, yields the logits (vocabulary,). With `keep_from`, yields the logits of the places from
        there on instead, (places, vocabulary) after each piece that has any. A single token uses other kernels, which
        give other numbers. So the last two tokens of a prompt go through together, and so do the first two places.
        """
        shared = [
            _in_common(prompt, other) if owner == tenant else 0
            for other, owner in zip(held.prompts, held.tenants, strict=True)
        ]
        source = max(range(len(shared)), key=lambda other: (shared[other], other == place))
        begun = min(shared[source], max((len(prompt) - 1 if keep_from is None else keep_from) - 1, 0))
        if begun and source != place:
            held.copy(source, place, begun)
        held.prompts[place], held.tenants[place] = prompt[:begun], tenant
        while begun < len(prompt):
            at_once = self._at_once(held.span)
            if keep_from is not None and begun + at_once > keep_from:
                at_once = min(at_once, max(keep_from - begun, 0) + max(LOGITS_BYTES // (4 * self.vocabulary_size), 2))
            end = min(begun + at_once, len(prompt))
            end += len(prompt) - end == 1
            binding = self._binding(held, place, 1, "prompt" if keep_from is None else "read")
            binding.bind_output(self._names["logits"], "cpu")  # of the last position, or of all positions
            kept = 0 if keep_from is None else min(end - begun, max(end - keep_from, 0))
            if self._keeps and keep_from is not None:
                binding.bind_ortvalue_input(KEEP, self._ort.OrtValue.ortvalue_from_numpy(np.array(max(kept, 1))))
            self._run(binding, prompt[None, begun:end], np.array([begun]))
            held.prompts[place] = prompt[:end]
            begun = end
            logits = binding.get_outputs()[-1].numpy()[0]
            if keep_from is not None:
                yield logits[len(logits) - kept :] if kept else None
            else:
                yield None if begun < len(prompt) else logits[-1]

    def _at_once(self, span: int) -> int:
        """The number of tokens of a prompt that go through the graph together."""
        return max(SCRATCH_BYTES // (4 * self._heads * span), 128)

    def _next(self, held: BatchPlaces, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The logits after each row's last token, shape (rows, vocabulary)."""
        rows = len(tokens)
        binding = self._binding(held, 0, rows, "step")
        self._run(binding, tokens, lengths)
        return held.logits[:rows, 0]

    def _run(self, binding, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Runs the graph once. `tokens` is (rows, new). The rows already hold `lengths` (rows,) tokens."""
        tokens = np.ascontiguousarray(tokens)
        ends = lengths[:, None] + tokens.shape[1]
        given = {"input_ids": tokens, "attention_mask": (np.arange(ends.max()) < ends).astype(np.int64)}
        if self._with_positions:
            given["position_ids"] = lengths[:, None] + np.arange(tokens.shape[1])
        for name, array in given.items():
            binding.bind_input(self._names[name], "cpu", 0, np.int64, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)

    def _binding(self, held: BatchPlaces, first: int, count: int, kind: str):
        """Binds the graph's caches to batch places, in place: input and output have the same address."""
        if (first, count, kind) not in held.bindings:
            binding = self._session.io_binding()
            for (layer, part), array in held.arrays.items():
                place = ("cpu", 0, self._dtype, (count, *array.shape[1:]), array[first].ctypes.data)
                binding.bind_input(self._names[f"past_{part}_names"] % layer, *place)
                binding.bind_output(self._names[f"present_{part}_names"] % layer, *place)
            if kind == "step":
                logits = held.logits[:count]
                place = ("cpu", 0, self._logits_dtype, logits.shape, logits.ctypes.data)
                binding.bind_output(self._names["logits"], *place)
            held.bindings[first, count, kind] = binding
        return held.bindings[first, count, kind]


def _in_common(ids: np.ndarray, other: np.ndarray) -> int:
    """The number of tokens with which both arrays begin."""
    length = min(len(ids), len(other))
    differ = np.flatnonzero(ids[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


class OnnxRuntime:
    """Runs onnxruntime-genai on a folder with genai_config.json."""

    library = "onnxruntime-genai"
    batch_size = 16
    refills = False
    reads = False
    passes_end = False

    def __init__(self, folder: Path, config: dict):
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # without this, the Linux wheel sends events
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        self._og = og
        settings = og.Config(str(folder))
        provider = config.get("execution_provider")
        if provider:
            settings.clear_providers()
            if provider != "cpu":
                settings.append_provider(provider)
        facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        listed = [*facts["decoder"].get("session_options", {}).get("provider_options", []), {}]
        if provider == "cuda" or (not provider and "cuda" in listed[0]):
            import onnxruntime

            onnxruntime.preload_dlls()  # CUDA's libraries from the folders of pip's packages
        # onnxruntime-genai's own default took one thread on two cores, at 0.6 times the speed
        threads = int(config.get("threads") or physical_cores())
        ours = {"session_options": {"intra_op_num_threads": threads} | exact_integers(facts["decoder"])}
        window = facts["decoder"].get("sliding_window") or {}
        if window.get("layers") == []:
            # For Phi-3, the builder (0.18) writes a window although no layer of the graph has one. The runtime then
            # makes caches of two windows. So two windows must be the context length.
            ours["sliding_window"] = window | {"window_size": facts["context_length"] // 2}
        settings.overlay(json.dumps({"model": {"decoder": ours}}))
        self._model = og.Model(settings)
        self._windowed = bool(window.get("layers"))
        end = facts["eos_token_id"]
        self.end_tokens = frozenset(end if isinstance(end, list) else [end])
        self.context_length = int(facts["context_length"])
        decoder = facts["decoder"]
        self.bytes_per_token = 8 * (
            decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        )  # a key and a value, each of at most four bytes
        self.vocabulary_size = int(facts["vocab_size"])
        self._padding = int(facts["pad_token_id"])

    def steps(
        self, rows: list[Row], places: int = 0, take: Callable[[], int] | None = None
    ) -> Iterator[dict[int, int]]:
        """Yields the next token id of every row, by position in `rows`, until all rows are finished.

        Finished rows get token ids too. Rows are padded on the right. A graph with a pruned head gives only the logits
        of the last position, which may be padding. So the prompts go in without their last token, and that token is
        then forced as if it were generated. This costs one step. Each row gets the right logits, and the head is not
        computed over whole prompts. A batch of one row does the same. So a row's numbers, and in int4 its text, don't
        depend on the other rows.
        """
        og = self._og
        last = [row.prompt[-1] for row in rows]
        forced = len(rows[0].prompt) > 1 and last[0] not in self.end_tokens  # see alone_in_batch
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
        while not (generator.is_done() or all(row.finish_reason for row in rows)):
            if any((row.sampling.temperature or row.forced) and not row.finish_reason for row in rows):
                logits = generator.get_logits().reshape(len(rows), -1)
                live = {place: row for place, row in enumerate(rows) if not row.finish_reason}
                chosen = {place: next_token(logits[place], row) for place, row in live.items()}
                self._choose(generator, chosen, len(rows))
            generator.generate_next_token()
            yield dict(enumerate(generator.get_next_tokens().tolist()))

    def read(self, rows: list[Row], take: Callable[[], int] | None = None) -> Iterator[int]:
        raise NotImplementedError("onnxruntime-genai gives the logits of the last place only")

    def alone_in_batch(self, prompt: list[int]) -> bool:
        """Whether a prompt needs a batch of its own.

        This is so if its last token can't be forced, or if the graph's caches take no padding. An end token can't be
        forced, because it would end the row. The token of a one-token prompt can't be forced, because no token would go
        in before it.
        """
        return self._windowed or len(prompt) == 1 or prompt[-1] in self.end_tokens

    def lanes(self, rows: int) -> list[Runtime]:
        return [self]

    def _choose(self, generator, chosen: dict[int, int], rows: int) -> None:
        logits = np.full((rows, 1, self.vocabulary_size), -1e9, dtype=np.float32)
        for place, token in chosen.items():
            logits[place, 0, token] = 0.0
        generator.set_logits(logits)


class TransformersRuntime:
    """Runs a causal LM of transformers. Finished rows are dropped from its cache."""

    library = "transformers"
    batch_size = 32
    refills = False
    reads = True
    passes_end = True

    def __init__(self, folder: Path, config: dict):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        device = config.get("device") or "auto"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = config.get("dtype") or "auto"
        self._torch = torch
        # OpenMP keeps a thread pool for every thread that calls it. So calls from a server's many threads are several
        # times slower than calls from this one thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch")
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
        self._model = network.to(device)
        self._model.eval()
        if config.get("threads") and device == "cpu":
            torch.set_num_threads(int(config["threads"]))
        if device == "cpu" and self._model.dtype in (torch.float32, torch.bfloat16):
            self._thread.submit(self._pack).result()
        settings, defaults = self._model.config, self._model.generation_config
        end = defaults.eos_token_id if defaults.eos_token_id is not None else settings.eos_token_id
        self.end_tokens = frozenset(end if isinstance(end, list) else [end] if end is not None else [])
        self.context_length = int(getattr(settings, "max_position_embeddings", 0) or 2**20)
        self.vocabulary_size = int(settings.get_text_config().vocab_size)
        heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
        width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        self.bytes_per_token = 8 * settings.num_hidden_layers * heads * width

    def steps(
        self, rows: list[Row], places: int = 0, take: Callable[[], int] | None = None
    ) -> Iterator[dict[int, int]]:
        """Yields the next token id of every unfinished row, by position in `rows`."""
        torch = self._torch
        from transformers import DynamicCache

        device = self._model.device
        width = max(len(row.prompt) for row in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):  # padding on the left: the last column holds each row's last token
            ids[place, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[place, width - len(row.prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        cache = DynamicCache(config=self._model.config)
        live = list(range(len(rows)))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        while live:
            logits, tokens = self._thread.submit(self._forward, ids, mask, positions, cache).result()
            for at, place in enumerate(live):
                row = rows[place]
                if row.sampling.temperature or row.forced:
                    tokens[at] = next_token(logits[at].float().cpu().numpy(), row)
            yield dict(zip(live, tokens, strict=True))
            kept = [at for at, place in enumerate(live) if not rows[place].finish_reason]
            if not kept:
                return
            ids = torch.tensor(tokens, device=device)[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            if len(kept) < len(live):
                chosen = torch.tensor(kept, device=device)
                self._thread.submit(self._select, cache, chosen).result()
                ids, mask, positions = ids[chosen], mask[chosen], positions[chosen]
                live = [live[at] for at in kept]

    def read(self, rows: list[Row], take: Callable[[], int] | None = None) -> Iterator[int]:
        """Calls `Row.see` for all given tokens of the rows. Yields each row's position when the row is done.

        Rows with one prompt share the keys and values of all its tokens but the last. Prompts of similar length go
        through together, and then their rows. Each row gets its logits piece by piece.
        """
        waiting = sorted(range(len(rows)), key=lambda position: (len(rows[position].prompt), rows[position].prompt))
        while waiting:
            batch: list[int] = []
            prompts: dict[tuple[int, ...], int] = {}
            for position in waiting[: self.batch_size]:
                row = rows[position]
                span = len(row.prompt) + max(rows[member].room for member in [*batch, position])
                fits = (len(batch) + 1) * span * self.bytes_per_token <= CACHE_BYTES
                fits &= tuple(row.prompt) in prompts or (len(prompts) + 1) * len(row.prompt) <= READ_TOKENS
                if batch and not fits:
                    break
                batch.append(position)
                prompts.setdefault(tuple(row.prompt), len(prompts))
            del waiting[: len(batch)]
            members = [rows[position] for position in batch]
            sources = [prompts[tuple(row.prompt)] for row in members]
            self._read_together(members, sources, [list(prompt) for prompt in prompts])
            yield from batch

    def _read_together(self, rows: list[Row], sources: list[int], prompts: list[list[int]]) -> None:
        """Reads rows; `sources` has the place of each row's prompt in `prompts`."""
        torch = self._torch
        from transformers import DynamicCache

        device, cache = self._model.device, DynamicCache(config=self._model.config)
        width = max(map(len, prompts)) - 1  # the last token of a prompt goes in with the given tokens
        mask = torch.zeros((len(prompts), width), dtype=torch.long, device=device)
        ids = torch.zeros_like(mask)
        for place, prompt in enumerate(prompts):  # padding on the left
            mask[place, width - len(prompt) + 1 :] = 1
            ids[place, width - len(prompt) + 1 :] = torch.tensor(prompt[:-1], dtype=torch.long)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        size = max(READ_TOKENS // len(prompts), 1)
        for end in range(size, width + size, size):
            here = slice(end - size, end)
            self._thread.submit(self._logits, ids[:, here], mask[:, :end], positions[:, here], cache, 1).result()
        if width and sources != list(range(len(prompts))):
            self._thread.submit(self._select, cache, torch.tensor(sources, device=device)).result()
        mask = mask[sources]
        begun = torch.tensor([len(row.prompt) - 1 for row in rows], device=device)[:, None]
        most = max(row.room for row in rows)
        size = max(LOGITS_BYTES // (4 * len(rows) * self.vocabulary_size), 1)
        for first in range(0, most, size):
            places = range(first, min(first + size, most))
            given = [(row.prompt[-1:] + row.forced)[places.start : min(places.stop, row.room)] for row in rows]
            ids = torch.tensor([part + [0] * (len(places) - len(part)) for part in given], device=device)
            real = torch.tensor([[1] * len(part) + [0] * (len(places) - len(part)) for part in given], device=device)
            mask = torch.cat([mask, real], dim=1)
            positions = begun + torch.arange(places.start, places.stop, device=device)
            logits = self._thread.submit(self._logits, ids, mask, positions, cache, len(places)).result()
            for of_row, part, row in zip(logits, given, rows, strict=True):
                if part:
                    row.see(first, of_row[: len(part)].numpy())

    def alone_in_batch(self, prompt: list[int]) -> bool:
        return False

    def lanes(self, rows: int) -> list[Runtime]:
        return [self]

    def _pack(self) -> None:
        """Changes the weights of linear layers, once, to the memory layout of oneDNN.

        For a few rows, oneDNN's product is up to four times as fast as MKL's. torch.compile uses the same operators for
        the linear layers of a frozen model.
        """
        torch = self._torch
        if not torch.backends.mkldnn.is_available():
            return
        reorder, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        embedded = self._model.get_input_embeddings().weight.data_ptr()

        def packed(weight, bias, input):
            return linear(input, weight, bias, "none", [], "")

        with torch.inference_mode():
            for layer in self._model.modules():
                if type(layer) is torch.nn.Linear:
                    layer.forward = functools.partial(packed, reorder(layer.weight.data, self.batch_size), layer.bias)
                    if layer.weight.data_ptr() != embedded:  # tied embeddings still need these numbers
                        layer.weight.data = layer.weight.data.new_empty(0)

    def _forward(self, ids, mask, positions, cache):
        """The logits of the last position, shape (rows, vocabulary), and each row's likeliest token."""
        with self._torch.inference_mode():  # state of a thread: must not stay on across a yield
            logits = self._called(ids, mask, positions, cache, 1)[:, -1]
            return logits, logits.argmax(-1).tolist()

    def _logits(self, ids, mask, positions, cache, kept: int):
        """The logits of the last `kept` positions in float32 and in main memory, shape (rows, kept, vocabulary)."""
        with self._torch.inference_mode():
            return self._called(ids, mask, positions, cache, kept).float().cpu()

    def _called(self, ids, mask, positions, cache, kept: int):
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=kept,
        ).logits

    def _select(self, cache, chosen) -> None:
        with self._torch.inference_mode():
            cache.batch_select_indices(chosen)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class SmallLanguageModel(PythonModel):
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

    def token_scores(
        self,
        rows: Iterable[tuple[Sequence[int], Sequence[int]]],
        see: SeeDistributions | None = None,
        batch_size: int = 0,
    ) -> Iterator[tuple[int, TokenScores]]:
        """The model's log probability of each given token, for rows of (context ids, continuation ids).

        Yields (place of the row, TokenScores) as rows end. A context has at least one token; a continuation may be
        empty. `see` gets the whole distributions. A beginning that rows share is computed once. Where a runtime gives
        logits of many places at once (`Runtime.reads`), a row takes as long as a prompt of its length. Elsewhere it
        takes as long as its generation. The memory doesn't depend on the length of a row, apart from keys and values.

        Raises:
            Refused: a context is empty, a row is longer than the context length, or a token is not in the vocabulary.
        """
        tokens = self._runtime.vocabulary_size
        waiting: list[Row] = []
        scores: dict[int, TokenScores] = {}
        for index, (context, continuation) in enumerate(rows):
            ids, forced = list(map(int, context)), list(map(int, continuation))
            if not ids:
                raise Refused(f"row {index}: the context is empty; begin it with one token, such as the end token")
            if len(ids) + len(forced) > self._runtime.context_length:
                told = f"has {len(ids) + len(forced)} tokens; the context length is {self._runtime.context_length}"
                raise Refused(f"row {index}: {told}")
            if (strange := next((id for id in ids + forced if not 0 <= id < tokens), None)) is not None:
                raise Refused(f"row {index}: token {strange} is not in the vocabulary, which has {tokens} tokens")
            scores[index] = TokenScores(np.zeros(len(forced), dtype=np.float32), np.zeros(len(forced), dtype=bool))
            row = Row((index, 0), ids, GREEDY, len(forced), 0, forced=forced)
            row.see = functools.partial(_see, row, scores[index], see)
            if forced:
                waiting.append(row)
            else:
                yield index, scores.pop(index)
        waiting = [part for row in waiting for part in self._parts(row)]
        left = Counter(row.index[0] for row in waiting)
        together = self._readings if self._runtime.reads else self._queues if self._runtime.refills else self._batches
        for batch, places, runtimes in together(waiting, batch_size or self.batch_size):
            with self._lock:
                for ended in self._side_by_side(batch, places, runtimes):
                    index = ended.index[0]
                    left[index] -= 1
                    if not left[index]:
                        yield index, scores.pop(index)

    def vocabulary(self) -> dict[str, int]:
        """The tokens of the tokenizer, with their ids."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, with special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

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

    def fits(self, batch: list[Row], row: Row, batch_size: int = 0) -> bool:
        """Whether a row may join a batch. An empty batch takes any row.

        The limits are the batch size, the bytes of the keys and values, and the context length. Some prompts need a
        batch of their own (`alone_in_batch`).
        """
        longer = [*batch, row]
        if batch and any(self._runtime.alone_in_batch(member.prompt) for member in longer):
            return False
        return not batch or (
            len(longer) <= (batch_size or self.batch_size)
            and self.cache_share(longer) <= 1
            and _span(longer) <= self._runtime.context_length
        )

    def cache_share(self, batch: list[Row]) -> float:
        """The share of CACHE_BYTES that the keys and values of these rows take in one batch. 1.0 is all bytes."""
        return _span(batch) * len(batch) * self._runtime.bytes_per_token / CACHE_BYTES

    def stream(self, batch: list[Row]) -> Iterator[list[tuple[Row, str]]]:
        """Generates rows that fit together. After each step, yields every row of the step with its new text.

        Characters that may begin a stop string are held back. So is half a character. A row's last text comes with its
        finish_reason. The caller drops a row between two steps, with `Row.end`.
        """
        sent = {id(row): 0 for row in batch}
        with self._lock:
            for rows in self._steps(batch, len(batch), self._runtime, decoded=True):
                step = []
                for row in rows:
                    ready = len(row.text)
                    if not row.finish_reason:
                        ready -= max((_overlap(row.text, stop) for stop in row.sampling.stop), default=0)
                    step.append((row, row.text[sent[id(row)] : ready]))
                    sent[id(row)] = max(ready, sent[id(row)])
                yield step

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

    def _queues(self, rows: list[Row], batch_size: int) -> Iterator[tuple[list[Row], int, list[Runtime]]]:
        """Yields rows, the number that each runtime generates at once, and the runtimes.

        All batch places of a queue have one size. So a queue holds rows of similar length. Rows that begin alike are
        neighbours, so that a common beginning is computed once.
        """

        def span(row: Row) -> int:
            return len(row.prompt) + row.room

        alike: list[Row] = []
        ordered = sorted(rows, key=span, reverse=True)
        for place, row in enumerate(ordered, 1):
            alike.append(row)
            if place == len(ordered) or 2 * span(ordered[place]) < span(alike[0]):
                room = min(batch_size, CACHE_BYTES // (span(alike[0]) * self._runtime.bytes_per_token))
                lanes = self._runtime.lanes(min(len(alike), room))
                yield sorted(alike, key=lambda row: row.prompt), max(1, room // len(lanes)), lanes
                alike = []

    def _parts(self, row: Row) -> list[Row]:
        """A row with given tokens, as the rows that the runtime can go through: most runtimes go past end tokens."""
        ends = [place for place, token in enumerate(row.forced[:-1], 1) if token in self._runtime.end_tokens]
        if self._runtime.passes_end or not ends:
            return [row]
        parts = []
        for number, (begin, end) in enumerate(itertools.pairwise([0, *ends, row.room])):
            ids, forced = row.prompt + row.forced[:begin], row.forced[begin:end]
            part = Row((row.index[0], number), ids, row.sampling, end - begin, 0, forced=forced)
            part.see = functools.partial(_see_part, row.see, begin)
            parts.append(part)
        return parts

    def _readings(self, rows: list[Row], batch_size: int) -> Iterator[tuple[list[Row], int, list[Runtime]]]:
        """Yields all rows with their runtimes. Rows that begin alike are neighbours."""
        if rows:
            yield sorted(rows, key=lambda row: row.prompt + row.forced), 1, self._runtime.lanes(len(rows))

    def _batches(self, rows: list[Row], batch_size: int) -> Iterator[tuple[list[Row], int, list[Runtime]]]:
        batch: list[Row] = []
        for row in sorted(rows, key=lambda row: -len(row.prompt)):
            if self._runtime.alone_in_batch(row.prompt):
                yield [row], 1, [self._runtime]
                continue
            if not self.fits(batch, row, batch_size):
                yield batch, len(batch), [self._runtime]
                batch = []
            batch.append(row)
        if batch:
            yield batch, len(batch), [self._runtime]

    def _side_by_side(self, batch: list[Row], places: int, runtimes: list[Runtime]) -> Iterator[Row]:
        """Generates a batch with several runtimes, one thread for each. Yields rows as they finish."""
        if len(runtimes) == 1:
            yield from self._ended(batch, places, runtimes[0], None)
            return
        finished: queue.SimpleQueue[Row | BaseException] = queue.SimpleQueue()

        def generate(runtime, take: Callable[[], int]) -> None:
            try:
                for row in self._ended(batch, places, runtime, take):
                    finished.put(row)
            except BaseException as error:  # the caller raises it
                finished.put(error)

        waiting = deque(range(len(batch)))  # neighbours begin alike: lanes take rows from opposite ends
        takes: list[Callable[[], int]] = [(waiting.popleft, waiting.pop)[number % 2] for number in range(len(runtimes))]
        if batch[0].forced:  # each lane has its own rows, so that the order of a lane's rows never changes
            size = -(-len(batch) // len(runtimes))
            parts = [range(len(batch))[first : first + size] for first in range(0, size * len(runtimes), size)]
            takes = [deque(part).popleft for part in parts]
        threads = [
            threading.Thread(target=generate, args=(runtime, take), name="lane", daemon=True)
            for runtime, take in zip(runtimes, takes, strict=True)
        ]

        def stop() -> None:  # a thread ends after its current step when all rows are dropped
            for row in batch:
                row.end("dropped")
            for thread in threads:
                if thread.ident:
                    thread.join()

        atexit.register(stop)  # if a thread is in a step at the interpreter's end, the process aborts
        try:
            for thread in threads:
                thread.start()
            for _ in batch:
                row = finished.get()
                if isinstance(row, BaseException):
                    raise row
                yield row
        finally:
            stop()
            atexit.unregister(stop)

    def _steps(
        self,
        batch: list[Row],
        places: int,
        runtime: Runtime,
        decoded: bool = False,
        take: Callable[[], int] | None = None,
    ) -> Iterator[list[Row]]:
        """Generates a batch, `places` rows at once. Yields after every step the rows that took part.

        With `decoded`, every row's text is updated. With `take`, other threads also take rows from the batch.
        """
        from tokenizers.decoders import DecodeStream

        start = time.perf_counter()
        streams = {id(row): DecodeStream(skip_special_tokens=True) for row in batch if decoded or row.sampling.stop}
        for tokens in runtime.steps(batch, places, take):
            changed = []
            for place, token in tokens.items():
                row = batch[place]
                if not row.finish_reason:
                    self._append(row, token, streams.get(id(row)), runtime.end_tokens)
                    if row.finish_reason:
                        row.seconds = time.perf_counter() - (row.started or start)
                    changed.append(row)
            yield changed

    def _ended(self, batch: list[Row], places: int, runtime: Runtime, take: Callable[[], int] | None) -> Iterator[Row]:
        """Generates a batch, or reads its given tokens; yields each row when it has ended."""
        if runtime.reads and batch[0].forced:
            for position in runtime.read(batch, take):
                batch[position].end("length")
                yield batch[position]
            return
        for step in self._steps(batch, places, runtime, take=take):
            yield from (row for row in step if row.finish_reason)

    def _append(self, row: Row, token: int, stream: Any, end_tokens: frozenset[int]) -> None:
        """Appends a token, and ends the row at an end token, a stop string or its last token."""
        row.output.append(token)
        ended = token in end_tokens and not row.forced
        if ended:
            row.end("stop")
        elif stream is not None:
            row.text += stream.step(self._tokenizer, token) or ""
            cut = min((at for at in map(row.text.find, row.sampling.stop) if at >= 0), default=-1)
            if cut >= 0:
                row.text = row.text[:cut]
                row.end("stop")
                return
        if len(row.output) >= row.room:
            row.end("length")
        if row.finish_reason and not row.forced:
            row.text = self._tokenizer.decode(row.output[: len(row.output) - ended], skip_special_tokens=True)


def _see_part(see: Callable[[int, np.ndarray], None], begin: int, first: int, logits: np.ndarray) -> None:
    see(begin + first, logits)


def _see(row: Row, scores: TokenScores, see: SeeDistributions | None, first: int, logits: np.ndarray) -> None:
    """Puts the log probabilities of a row's given tokens from `first` on into `scores`."""
    logits = logits.astype(np.float32)
    places, tokens = slice(first, first + len(logits)), row.forced[first : first + len(logits)]
    logits -= logits.max(axis=-1, keepdims=True)
    scores.likeliest[places] = logits.argmax(axis=-1) == tokens
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scores.log_probabilities[places] = logits[np.arange(len(tokens)), tokens]
    if see:
        see(row.index[0], first, logits)


def usage(prompt_tokens: int, output_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }


def _span(batch: list[Row]) -> int:
    """The number of tokens for which each row has room in its keys and values, in a batch with padding."""
    return max(len(row.prompt) for row in batch) + max(row.room for row in batch)


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that could begin `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


set_model(SmallLanguageModel())
