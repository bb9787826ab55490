"""A running batch of ContinuousRuntime: its batch places, the prompts that are read, and the rows that generate."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .rows import Row
from .runtime import CACHE_BYTES
from .sampling import next_token

SPAN_STEP = 256  # tokens; where rows join, batch places are allocated for a multiple of this number
PIECE_TOKENS = 128  # of a prompt between two steps. A longer piece is hardly faster, and the other rows wait for it


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

    def move(self, source: int, target: int, length: int) -> None:
        """Copies keys and values to another place, with what is known of their prompt."""
        self.copy(source, target, length)
        self.prompts[target], self.tenants[target] = self.prompts[source], self.tenants[source]

    def swap(self, one: int, other: int, length: int) -> None:
        for array in self.arrays.values():
            array[[one, other], :, :length] = array[[other, one], :, :length]
        self.prompts[one], self.prompts[other] = self.prompts[other], self.prompts[one]
        self.tenants[one], self.tenants[other] = self.tenants[other], self.tenants[one]


class Graph(Protocol):
    """What a running batch needs of ContinuousRuntime."""

    bytes_per_token: int

    def new_places(self, count: int, span: int) -> BatchPlaces: ...

    def piece(
        self, held: BatchPlaces, place: int, prompt: np.ndarray, begun: int, tenant: str
    ) -> tuple[int, int, np.ndarray | None]: ...

    def next_logits(self, held: BatchPlaces, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray: ...


@dataclass
class Reading:
    """A row whose prompt is being read, piece by piece."""

    position: int
    row: Row
    prompt: np.ndarray
    place: int
    begun: int = 0  # tokens of the prompt that are read


@dataclass
class Live:
    """A row that is being generated."""

    position: int
    row: Row
    length: int  # tokens whose keys and values its place holds
    last: int  # its last token


class RunningBatch:
    """The rows that are generated together, and those whose prompts are read before that.

    `take` gives the position of the next row in `rows`, or raises IndexError. Without `joins`, the batch has the places
    of `held`, and all places are filled before a step. With `joins`, rows may come at any time: `take` is called before
    each step, and the batch gets larger places. Between two steps, one piece of a long prompt is then read, or short
    prompts until they have PIECE_TOKENS tokens. A prompt of several pieces takes turns with new prompts.

    The rows that generate have the first places, side by side, because a step runs over adjacent places.
    """

    def __init__(
        self,
        graph: Graph,
        rows: Sequence[Row] | Mapping[int, Row],
        take: Callable[[], int],
        held: BatchPlaces,
        places: int = 0,
        joins: bool = False,
    ):
        self.held = held
        self._graph, self._rows, self._take, self._places, self._joins = graph, rows, take, places, joins
        self._live: list[Live | None] = []  # by place. None: its row has ended
        self._reading: deque[Reading] = deque()
        self._new_is_next = True  # new prompts and begun ones take turns

    def steps(self) -> Iterator[dict[int, int]]:
        """Yields the next token of the rows of a step, by position. A prompt's piece without a token is an empty step.

        Ends when no row is under way, and `take` has none.
        """
        while True:
            yield from self._read_prompts()
            self._close_gaps()
            live = [one for one in self._live if one]
            if live:
                tokens, lengths = np.array([[one.last] for one in live]), np.array([one.length for one in live])
                logits = self._graph.next_logits(self.held, tokens, lengths)
                for of_row, one in zip(logits, live, strict=True):
                    one.length, one.last = one.length + 1, next_token(of_row, one.row)
                yield {one.position: one.last for one in live}
            elif not self._reading:  # a row may have come while the last ones were dropped
                new = self._begin()
                if new is None:
                    return
                self._reading.append(new)

    def _read_prompts(self) -> Iterator[dict[int, int]]:
        """Reads prompts until a step is due, or no prompt is left. Yields first tokens, and {} after other pieces."""
        read = 0
        while not self._joins or read < PIECE_TOKENS:
            one = self._next_reading()
            if one is None:
                return
            one.begun, computed, logits = self._graph.piece(self.held, one.place, one.prompt, one.begun, one.row.tenant)
            read += computed
            if logits is None:
                self._reading.append(one)
                yield {}
                if self._joins:
                    return
            else:
                yield {one.position: self._first_token(one, logits)}

    def _next_reading(self) -> Reading | None:
        self._drop_ended()
        if self._new_is_next or not self._reading:
            self._new_is_next = False
            if new := self._begin():
                return new
        self._new_is_next = True
        return self._reading.popleft() if self._reading else None

    def _begin(self) -> Reading | None:
        """Takes the next row, if there is one and a place for it."""
        count = sum(one is not None for one in self._live) + len(self._reading) + 1
        if not self._joins and count > self._places:
            return None
        try:
            while (row := self._rows[position := self._take()]).finish_reason:
                pass
        except IndexError:
            return None
        row.started = time.perf_counter()
        if self._joins:
            self._make_room(row, count)
        free = [place for place in range(len(self.held.prompts)) if not self._taken(place)]
        # A prompt of several pieces gets a place where no other row needs to be next
        long = count > 1 and len(row.prompt) > PIECE_TOKENS
        return Reading(position, row, np.array(row.prompt, dtype=np.int64), free[-1 if long else 0])

    def _first_token(self, one: Reading, logits: np.ndarray) -> int:
        """Puts a row whose prompt is read among the rows that generate. Returns its first token."""
        place = self._live.index(None) if None in self._live else len(self._live)
        if place != one.place:
            other = next((other for other in self._reading if other.place == place), None)
            if other:
                self.held.swap(place, one.place, max(one.begun, other.begun))
                other.place = one.place
            else:
                self.held.move(one.place, place, one.begun)
        token = next_token(logits, one.row)
        self._live[place : place + 1] = [Live(one.position, one.row, one.begun, token)]
        return token

    def _drop_ended(self) -> None:
        self._live = [None if one is None or one.row.finish_reason else one for one in self._live]
        self._reading = deque(one for one in self._reading if not one.row.finish_reason)

    def _close_gaps(self) -> None:
        """Moves the last rows to places that are free."""
        self._drop_ended()
        while None in self._live:
            last, place = self._live.pop(), self._live.index(None) if None in self._live else -1
            if last and place >= 0:
                self.held.move(len(self._live), place, last.length)
                self._live[place] = last

    def _taken(self, place: int) -> bool:
        lives = place < len(self._live) and self._live[place] is not None
        return lives or any(one.place == place for one in self._reading)

    def _make_room(self, row: Row, count: int) -> None:
        """Replaces the batch places by larger ones, if a new row needs that. Keys and values are copied."""
        held, generating = self.held, [one for one in self._live if one]
        span = max(one.span for one in [row, *(one.row for one in generating), *(one.row for one in self._reading)])
        if span <= held.span and count <= len(held.prompts):
            return
        span = -(-span // SPAN_STEP) * SPAN_STEP
        lengths = {place: len(prompt) for place, prompt in enumerate(held.prompts)}
        lengths |= {place: one.length for place, one in enumerate(self._live) if one}
        used = [place for place in lengths if self._taken(place)]
        most = CACHE_BYTES // (span * self._graph.bytes_per_token)
        size = max(count, max(used, default=0) + 1, min(2 * len(held.prompts), most))
        self.held = self._graph.new_places(size, span)
        for place in range(min(size, len(held.prompts))):
            length = min(lengths[place], span)
            for key, array in self.held.arrays.items():
                array[place, :, :length] = held.arrays[key][place, :, :length]
            self.held.prompts[place], self.held.tenants[place] = held.prompts[place][:length], held.tenants[place]
