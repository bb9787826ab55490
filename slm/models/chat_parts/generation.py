"""Puts rows into batches and runs them: what becomes of a token until a row has ended."""

import atexit
import functools
import itertools
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .rows import GREEDY, Refused, Row, SeeDistributions, TokenScores
from .runtime import CACHE_BYTES, Runtime


class Generation:
    """Generates rows in batches, with the runtime and the tokenizer that `SmallLanguageModel.load_context` opens."""

    batch_size: int
    _tokenizer: Any
    _special_ids: set[int]
    _runtime: Runtime
    _lock: threading.RLock  # two threads must not run a runtime at once

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
            row, scores[index] = _given(index, ids, forced, see)
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

    @property
    def end_tokens(self) -> frozenset[int]:
        return self._runtime.end_tokens

    def vocabulary(self) -> dict[str, int]:
        """The tokens of the tokenizer, with their ids."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, with special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

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
            and self._span(longer) <= self._runtime.context_length
        )

    def cache_share(self, batch: list[Row]) -> float:
        """The share of CACHE_BYTES that the keys and values of these rows take in one batch. 1.0 is all bytes."""
        return self._span(batch) * len(batch) * self._runtime.bytes_per_token / CACHE_BYTES

    def stream(self, batch: list[Row]) -> Iterator[list[tuple[Row, str]]]:
        """Generates rows that fit together. After each step, yields every row of the step with its new text.

        Characters that may begin a stop string are held back. So is half a character. A row's last text comes with its
        finish_reason. The caller drops a row between two steps, with `Row.end`.
        """
        with self._lock:
            yield from _news(self._steps(batch, len(batch), self._runtime, decoded=True))

    def joined(self, arriving: deque[Row]) -> Iterator[list[tuple[Row, str]]]:
        """Generates rows as `stream` does. The caller may append to `arriving` at any time between two steps.

        A row takes part from the next step on. The rows under way fit together (`fits`). Ends when no row is left.
        Only for a runtime that `refills` (`joins`).
        """
        rows: dict[int, Row] = {}
        numbers = itertools.count()

        def take() -> int:
            number, row = next(numbers), arriving.popleft()
            rows[number] = row
            return number

        with self._lock:
            for step in _news(self._rows_of(self._runtime.join(rows, take), rows, self._runtime, decoded=True)):
                yield step
                for number in [number for number, row in rows.items() if row.finish_reason]:
                    del rows[number]

    def reading(self, ids: Sequence[int], see: SeeDistributions) -> Iterator[None]:
        """Gives `see` the distributions of all tokens of a text but the first one. Yields between two pieces.

        The caller can do other work there. `see` gets (0, place of the token after the first one, distributions).
        """
        forced = list(ids[1:])
        if not forced:
            return
        row, _ = _given(0, list(ids[:1]), forced, see)
        with self._lock:
            if self._runtime.reads:
                for _ in self._runtime.read([row]):
                    yield
                return
            for part in self._parts(row):
                for _ in self._steps([part], 1, self._runtime):
                    yield

    @property
    def joins(self) -> bool:
        """Whether rows can join a running batch (`joined`)."""
        return self._runtime.refills

    # -- inside --------------------------------------------------------------------------------------------------------

    def _queues(self, rows: list[Row], batch_size: int) -> Iterator[tuple[list[Row], int, list[Runtime]]]:
        """Yields rows, the number that each runtime generates at once, and the runtimes.

        All batch places of a queue have one size. So a queue holds rows of similar length. Rows that begin alike are
        neighbours, so that a common beginning is computed once.
        """

        alike: list[Row] = []
        ordered = sorted(rows, key=lambda row: row.span, reverse=True)
        for place, row in enumerate(ordered, 1):
            alike.append(row)
            if place == len(ordered) or 2 * ordered[place].span < alike[0].span:
                room = min(batch_size, CACHE_BYTES // (alike[0].span * self._runtime.bytes_per_token))
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

    def _span(self, batch: list[Row]) -> int:
        """The number of tokens for which each row of a batch has room in its keys and values.

        Without refilling, prompts are padded to one length.
        """
        if self._runtime.refills:
            return max(row.span for row in batch)
        return max(len(row.prompt) for row in batch) + max(row.room for row in batch)

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
        return self._rows_of(runtime.steps(batch, places, take), batch, runtime, decoded)

    def _rows_of(
        self, steps: Iterator[dict[int, int]], batch: list[Row] | dict[int, Row], runtime: Runtime, decoded: bool
    ) -> Iterator[list[Row]]:
        """Gives the tokens of each step to their rows. Yields these rows."""
        from tokenizers.decoders import DecodeStream

        start = time.perf_counter()
        streams: dict[int, Any] = {}  # by place
        for tokens in steps:
            if len(streams) > len(batch):  # of rows that were dropped
                streams = {place: stream for place, stream in streams.items() if place in batch}
            changed = []
            for place, token in tokens.items():
                row = batch[place]
                if not row.finish_reason:
                    if place not in streams and (decoded or row.sampling.stop):
                        streams[place] = DecodeStream(skip_special_tokens=not row.shown)
                    self._append(row, token, streams.get(place), runtime.end_tokens)
                    if row.finish_reason:
                        streams.pop(place, None)
                        row.seconds = time.perf_counter() - (row.started or start)
                    changed.append(row)
            yield changed

    def _ended(self, batch: list[Row], places: int, runtime: Runtime, take: Callable[[], int] | None) -> Iterator[Row]:
        """Generates a batch, or reads its given tokens; yields each row when it has ended."""
        if runtime.reads and batch[0].forced:
            for position in runtime.read(batch, take):
                if position is not None:
                    batch[position].end("length")
                    yield batch[position]
            return
        for step in self._steps(batch, places, runtime, take=take):
            yield from (row for row in step if row.finish_reason)

    def _append(self, row: Row, token: int, stream: Any, end_tokens: frozenset[int]) -> None:
        """Appends a token, and ends the row at an end token, a stop string, its grammar's end or its last token."""
        if row.error:
            row.end("error")
            return
        row.output.append(token)
        ended = token in end_tokens and not row.forced
        if ended:
            row.end("stop")
        elif stream is not None and not self._hidden(row, token):
            row.text += stream.step(self._tokenizer, token) or ""
            cut = min((at for at in map(row.text.find, row.sampling.stop) if at >= 0), default=-1)
            if cut >= 0:
                row.text = row.text[:cut]
                row.end("stop")
                return
        if row.matcher is not None and row.matcher.is_stopped():  # nothing may follow a complete structure
            row.end("stop")
        if len(row.output) >= row.room:
            row.end("length")
        if row.finish_reason and not row.forced:
            ids = [token for token in row.output[: len(row.output) - ended] if not self._hidden(row, token)]
            row.text = self._tokenizer.decode(ids, skip_special_tokens=not row.shown)

    def _hidden(self, row: Row, token: int) -> bool:
        """Whether a special token is left out of a text that shows other special tokens."""
        return bool(row.shown) and token in self._special_ids and token not in row.shown


def _given(index: int, context: list[int], tokens: list[int], see: SeeDistributions | None) -> tuple[Row, TokenScores]:
    """A row with given tokens, and the scores that its reading fills."""
    scores = TokenScores(np.zeros(len(tokens), dtype=np.float32), np.zeros(len(tokens), dtype=bool))
    row = Row((index, 0), context, GREEDY, len(tokens), 0, forced=tokens)
    row.see = functools.partial(_see, row, scores, see)
    return row, scores


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


def _news(steps: Iterator[list[Row]]) -> Iterator[list[tuple[Row, str]]]:
    """The rows of each step with their new text."""
    for rows in steps:
        step = []
        for row in rows:
            ready = len(row.text)
            if not row.finish_reason:
                ready -= max((_overlap(row.text, stop) for stop in row.sampling.stop), default=0)
            step.append((row, row.text[row.sent : ready]))
            row.sent = max(ready, row.sent)
        yield step


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that could begin `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
