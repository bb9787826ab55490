"""Runs an ONNX graph with onnxruntime, on the CPU, by continuous batching."""

import copy
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from .rows import Row
from .running_batch import PIECE_TOKENS, BatchPlaces, RunningBatch
from .runtime import LOGITS_BYTES, Runtime, exact_integers, physical_cores

SPAN_STEP = 64  # tokens; keys and values are allocated for a multiple of this number
SCRATCH_BYTES = 2**28  # for attention; they limit the tokens of a prompt that go through a graph at once
LANE_ROWS = 16  # rows per core; with fewer rows, a batch of its own doesn't keep a core busy
LANE_BYTES = 2**28  # of weights that lanes hold a second time; with more, products are long enough to share
KEEP = "num_logits_to_keep"  # an optional input of a graph: the number of last places that get logits; 0 is all


class ContinuousRuntime:
    """Runs the graph of an ONNX GenAI folder with onnxruntime, on the CPU, by continuous batching.

    onnxruntime-genai (0.18) keeps a batch together until its longest answer ends. It pads the prompts, and computes a
    common beginning again for each prompt. Grouped-query attention allows a different length for every row of a batch.
    So this runtime gives a finished row's batch place to the next row, and pads nothing. It copies the keys and values
    of a beginning that another batch place holds, also from an earlier call. Each prompt goes through the graph alone,
    in pieces, which gives its first token. Then the rows are generated together. So a row's numbers don't depend on the
    other rows of its batch. In int4, this keeps the row's text the same too.

    A copied beginning makes an answer faster. So the time of an answer could show one tenant the prompts of another
    tenant. Therefore a row copies a beginning only from a row of its own tenant.

    A small model's kernels end before a second core can help. So, with enough rows, each core generates a batch of its
    own (a lane). A lane takes the next row when one of its rows ends.
    """

    library = "onnxruntime"
    refills = True
    passes_end = True
    piece_tokens = PIECE_TOKENS

    def __init__(self, folder: Path, config: dict):
        facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = facts["decoder"]
        self._file = folder / decoder["filename"]
        self._threads = int(config.get("threads") or physical_cores())
        self._entries = exact_integers(decoder)
        self.batch_size = max(64, LANE_ROWS * self._threads) if self._small() else 48
        self._session = self._open(self._threads)
        self._opened = self._digests() if self._threads > 1 and self._small() else []
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

    def _files(self) -> list[Path]:
        return sorted(path for path in self._file.parent.glob(f"{self._file.name}*") if path.exists())

    def _small(self) -> bool:
        """Whether the weights may be held a second time. If their files are gone, they can't be read again."""
        return 0 < sum(path.stat().st_size for path in self._files()) <= LANE_BYTES

    def _digests(self) -> list[tuple[str, bytes]]:
        """The content of small weights. A file's times would not do: a hard link to a file changes one of them."""
        found = []
        for path in self._files():
            with path.open("rb") as file:
                found.append((path.name, hashlib.file_digest(file, hashlib.blake2b).digest()))
        return found

    def lanes(self, rows: int) -> list[Runtime]:
        """The runtimes that generate `rows` rows best, side by side, with one thread for each runtime.

        Lanes share their weights with each other, but not with the runtime that makes them. So the runtime reads the
        files once more. With few rows, large weights, or removed or changed files, there are no lanes, and this runtime
        works alone.
        """
        if self._threads == 1 or rows < LANE_ROWS * self._threads:
            return [self]
        if not self._lanes:
            if not self._opened or not self._small():
                return [self]
            lane = copy.copy(self)
            lane._session = self._open(1)
            if self._digests() != self._opened:
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
        held = self._places(count, max(row.span for row in rows))
        take = take or deque(range(len(rows))).popleft
        yield from self._steps_of(RunningBatch(self, rows, take, held, count))

    def join(self, rows: Mapping[int, Row], take: Callable[[], int]) -> Iterator[dict[int, int]]:
        """Like `steps`, but rows may come while others are generated: `take` is called before each step."""
        yield from self._steps_of(RunningBatch(self, rows, take, self._places(1, 1), joins=True))

    def _steps_of(self, batch: RunningBatch) -> Iterator[dict[int, int]]:
        try:
            yield from batch.steps()
        finally:
            self._idle.append(batch.held)
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
        return self.new_places(count, -(-span // SPAN_STEP) * SPAN_STEP)

    def new_places(self, count: int, span: int) -> BatchPlaces:
        """Empty batch places for `span` tokens each."""
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
        begun, logits = 0, None
        while logits is None:
            begun, _, logits = self.piece(held, place, prompt, begun, tenant)
        return logits

    def piece(
        self, held: BatchPlaces, place: int, prompt: np.ndarray, begun: int, tenant: str
    ) -> tuple[int, int, np.ndarray | None]:
        """Puts the next piece of a prompt into a batch place, which holds `begun` tokens of the prompt.

        Gives the tokens that the place holds then, how many of them were computed, and after the last piece the logits
        (vocabulary,). Tokens that another place holds for the same tenant are copied, not computed. Pieces end at
        multiples of PIECE_TOKENS, whatever was copied. A single token uses other kernels, which give other numbers. So
        no piece has one token.
        """
        begun = self._copy_beginning(held, place, prompt, begun, tenant, len(prompt) - 2)
        size = self.piece_tokens
        end = min(begun + size - begun % size, len(prompt))
        if end - begun == 1:
            end = min(end + size, len(prompt))
        end += len(prompt) - end == 1
        logits = self._run_piece(held, place, prompt, begun, end, 0, "prompt")
        return end, end - begun, logits[-1] if end == len(prompt) else None

    def _copy_beginning(
        self, held: BatchPlaces, place: int, prompt: np.ndarray, begun: int, tenant: str, most: int
    ) -> int:
        """Copies what another place holds of a prompt, if that is more than `begun` tokens; `most` tokens at most.

        Gives the number of tokens that the place holds.
        """
        shared = [
            _in_common(prompt, other) if owner == tenant else 0
            for other, owner in zip(held.prompts, held.tenants, strict=True)
        ]
        source = max(range(len(shared)), key=lambda other: (shared[other], other == place))
        found = max(begun, min(shared[source], max(most, 0)))
        if found > begun and source != place:
            held.copy(source, place, found)
        held.prompts[place], held.tenants[place] = prompt[:found], tenant
        return found

    def _run_piece(
        self, held: BatchPlaces, place: int, prompt: np.ndarray, begun: int, end: int, kept: int, kind: str
    ) -> np.ndarray:
        """Runs the graph over prompt[begun:end]. Gives the logits that the graph returns, (places, vocabulary)."""
        binding = self._binding(held, place, 1, kind)
        binding.bind_output(self._names["logits"], "cpu")  # of the last position, or of all positions
        if self._keeps and kind == "read":
            binding.bind_ortvalue_input(KEEP, self._ort.OrtValue.ortvalue_from_numpy(np.array(max(kept, 1))))
        self._run(binding, prompt[None, begun:end], np.array([begun]))
        held.prompts[place] = prompt[:end]
        return binding.get_outputs()[-1].numpy()[0]

    def read(self, rows: list[Row], take: Callable[[], int] | None = None) -> Iterator[int | None]:
        """Calls `Row.see` for all given tokens of the rows. Yields each row's position when the row is done.

        Yields None after each piece of a row.

        Each row goes through the graph alone, in one batch place. What it has in common with the row before it stays
        in the place. Nothing stays from an earlier call, so the numbers depend on the rows and their order alone.
        """
        take = take or deque(range(len(rows))).popleft
        self._idle.clear()
        held = self._places(1, max(row.span for row in rows))
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
                    yield None
                yield position

    def _pieces(
        self, held: BatchPlaces, place: int, prompt: np.ndarray, tenant: str, keep_from: int
    ) -> Iterator[np.ndarray | None]:
        """Puts a text's keys and values into a batch place. Yields the logits of the places from `keep_from` on.

        After each piece, yields (places, vocabulary), or None if the piece has no such place. A single token uses other
        kernels, which give other numbers. So the last two tokens go through together, and so do the first two places.
        """
        begun = self._copy_beginning(held, place, prompt, 0, tenant, keep_from - 1)
        while begun < len(prompt):
            at_once = self._at_once(held.span)
            if begun + at_once > keep_from:
                at_once = min(at_once, max(keep_from - begun, 0) + max(LOGITS_BYTES // (4 * self.vocabulary_size), 2))
            end = min(begun + at_once, len(prompt))
            end += len(prompt) - end == 1
            kept = min(end - begun, max(end - keep_from, 0))
            logits = self._run_piece(held, place, prompt, begun, end, kept, "read")
            begun = end
            yield logits[len(logits) - kept :] if kept else None

    def _at_once(self, span: int) -> int:
        """The number of tokens of a text that go through the graph together, where they are read."""
        return max(SCRATCH_BYTES // (4 * self._heads * span), 128)

    def next_logits(self, held: BatchPlaces, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
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
