"""Runs an ONNX graph with onnxruntime, on the CPU, by continuous batching."""

import copy
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .rows import Row
from .runtime import LOGITS_BYTES, Runtime, exact_integers, physical_cores
from .sampling import next_token

SPAN_STEP = 64  # tokens; keys and values are allocated for a multiple of this number
SCRATCH_BYTES = 2**28  # for attention; they limit the tokens of a prompt that go through a graph at once
LANE_ROWS = 16  # rows per core; with fewer rows, a batch of its own doesn't keep a core busy
LANE_BYTES = 2**28  # of weights that lanes hold a second time; with more, products are long enough to share
KEEP = "num_logits_to_keep"  # an optional input of a graph: the number of last places that get logits; 0 is all


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
