"""The thread that generates. Requests wait in fair queues, and share the model's batches.

If the model's runtime refills, a text joins a running batch before the next step, while the batch has room. Otherwise,
a text waits for the next batch.
"""

import asyncio
import os
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import prometheus_client
from prometheus_client import multiprocess

from slm.base import environment
from slm.models import wrappers
from slm.serving.protocol import PROMPT_TOKENS, SECONDS_PER_TOKEN, ApiError, Limits

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's variable
MOST_BATCHES = 2  # batches that run at once for throughput
FAIR_BATCHES = 4  # up to this number, a client without a running text may start a batch
MOST_CACHES = 2.5  # for all batches together. One batch for throughput may take one cache
GATHER_SECONDS = 0.01  # to wait for simultaneous requests while nothing runs. Short beside a prompt's time
IDLE_SECONDS = 10.0  # without work, until the memory of the last texts is given back to the system
PATIENT_SECONDS = 5.0  # without joining, a text that has waited this long starts the second batch, even a small batch
FAIR_SECONDS = 1.0  # to gather the texts of clients without a running text. Each batch costs the others a turn
SHORT_FACTOR = 4  # so a batch of 4096 tokens allows at most six levels of shorter batches


# ---------------------------------------------------------------------------------------------------------------------
# The thread that generates


@dataclass(eq=False)
class Ticket:
    """A request in progress, and the queue that brings its texts."""

    streamed: bool
    loop: asyncio.AbstractEventLoop
    client: str  # clients share the model's time
    events: asyncio.Queue = field(default_factory=asyncio.Queue)  # (row, new text, finish reason or ""), or an ApiError
    dropped: bool = False
    arrived: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Place:
    """One text of a request. The text waits or is in a batch."""

    row: wrappers.Row
    ticket: Ticket

    def tokens(self) -> float:
        """The most steps that the text takes from its start, including the computation of its prompt."""
        return self.row.room + len(self.row.prompt) / PROMPT_TOKENS

    def left(self) -> int:
        """The most tokens that the text may still get."""
        return 0 if self.row.finish_reason else self.row.room - len(self.row.output)


@dataclass(eq=False)
class Batch:
    places: list[Place]
    steps: Generator[list[tuple[wrappers.Row, str]]]
    share: float  # of the cache that one batch may take
    arriving: deque[wrappers.Row] | None = None  # the texts that join. None: the batch takes no further texts
    most: float = float("inf")  # share. A batch with a limit is for short texts

    def live(self) -> int:
        return sum(not place.row.finish_reason for place in self.places)

    def left(self) -> int:
        return max((place.left() for place in self.places), default=0)


def fair_order(waiting: Iterable[Place], running: Iterable[Place]) -> list[Place]:
    """The waiting texts, in the order in which they would end if each client had its own machine.

    This is fair queueing (Demers, Keshav and Shenker, SIGCOMM 1989). Each client's short texts go first. A client with
    many running tokens goes behind the others. The arrival time counts, so no text waits forever.
    """

    def alone(place: Place) -> float:
        return place.ticket.arrived + SECONDS_PER_TOKEN * place.tokens()

    ahead: defaultdict[str, float] = defaultdict(float)  # by client: the tokens before the client's next text
    for place in running:
        ahead[place.ticket.client] += place.left()
    ends = {}
    for place in sorted(waiting, key=alone):
        ends[place] = alone(place) + SECONDS_PER_TOKEN * ahead[place.ticket.client]
        ahead[place.ticket.client] += place.tokens()
    return sorted(ends, key=lambda place: ends[place])


@dataclass(eq=False)
class Job:
    """Work on the model that is no generation. It has its turn between the steps of the batches."""

    steps: Iterator[None]
    done: asyncio.Future
    loop: asyncio.AbstractEventLoop

    def end(self, error: Exception | None = None) -> None:
        def tell():
            if not self.done.done():
                self.done.set_result(None) if error is None else self.done.set_exception(error)

        with suppress(RuntimeError):  # the loop is closed, so nobody waits
            self.loop.call_soon_threadsafe(tell)


class Metrics:
    """What /metrics shows, of all workers. With several processes, it shows the sums over them.

    Then the environment's PROMETHEUS_MULTIPROC_DIR names the folder through which prometheus_client shares the values.
    """

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.versions = 0  # that are loaded
        self.registry = registry = prometheus_client.CollectorRegistry()
        self._read: list[Callable[[], None]] = []
        self._served: str | None = None
        buckets = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self.requests = prometheus_client.Counter(
            "slm_requests", "Requests for a completion, by how they ended", ["outcome"], registry=registry
        )
        self.prompt_tokens = prometheus_client.Counter("slm_prompt_tokens", "Tokens of prompts", registry=registry)
        self.output_tokens = prometheus_client.Counter("slm_output_tokens", "Tokens generated", registry=registry)
        self.seconds = prometheus_client.Histogram(
            "slm_request_seconds", "From arrival to the last token", registry=registry, buckets=buckets
        )
        self.first_seconds = prometheus_client.Histogram(
            "slm_first_token_seconds", "From arrival to a stream's first token", registry=registry, buckets=buckets
        )
        self.batch_texts = prometheus_client.Histogram(
            "slm_batch_texts", "Texts a batch began with", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.joined = prometheus_client.Counter(
            "slm_joined_texts", "Texts that joined a running batch", registry=registry
        )
        self.show(
            "slm_waiting",
            "Texts that wait for a batch",
            lambda: sum(len(worker.waiting) for worker in list(self.workers)),
        )
        self.show(
            "slm_generating",
            "Texts that are being generated",
            lambda: sum(batch.live() for worker in list(self.workers) for batch in list(worker.running)),
        )
        self.show("slm_processes", "Processes that answer", lambda: 1)
        self.show("slm_loaded_versions", "Versions in the memory of all processes", lambda: self.versions)
        self._versions = prometheus_client.Gauge(
            "slm_served_version",
            "1 for the version that answers",
            ["version"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        looked = prometheus_client.Gauge(
            "slm_alias_looked_seconds",
            "When the registry last said which version has the alias",
            registry=registry,
            multiprocess_mode="max",
        )
        self.looked = looked.set  # seconds since 1970
        self.failed_looks = prometheus_client.Counter(
            "slm_alias_failed", "Looks at the alias, or moves to its version, that failed for now", registry=registry
        )
        self.refused_versions = prometheus_client.Counter(
            "slm_refused_versions", "Versions that could not be loaded, or gave no proper answer", registry=registry
        )

    def serve(self, version: str) -> None:
        if SHARED not in os.environ:
            self._versions.clear()
        elif self._served is not None:
            self._versions.labels(self._served).set(0)  # what the processes share can't be cleared
        self._versions.labels(version).set(1)
        self._served = version

    def show(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge with the present value of `value`."""
        gauge = prometheus_client.Gauge(name, text, registry=self.registry, multiprocess_mode="livesum")
        self._read.append(lambda: gauge.set(value()))

    def read(self) -> None:
        """Sets the gauges that change by themselves."""
        for read in self._read:
            read()

    def text(self) -> bytes:
        """What /metrics answers."""
        self.read()
        registry = self.registry
        if SHARED in os.environ:
            registry = prometheus_client.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return prometheus_client.generate_latest(registry)


class Worker:
    """The thread that owns the model. The event loop calls `submit` and `drop`."""

    def __init__(self, model: wrappers.Wrapper, limits: Limits, metrics: Metrics | None = None):
        self.model, self.limits = model, limits
        self.joins = bool(getattr(model, "joins", False))  # older models lack it
        self.waiting: deque[Place] = deque()
        self.running: list[Batch] = []
        self.jobs: deque[Job] = deque()
        self.metrics = metrics or Metrics()
        self.metrics.workers.append(self)
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self.start, self.is_alive = self._thread.start, self._thread.is_alive

    def is_idle(self) -> bool:
        with self._wake:
            return not (self.waiting or self.running or self.jobs)

    def stop(self, seconds: float) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)

    def submit(self, rows: list, streamed: bool, client: str) -> Ticket:
        """Queues a request's texts. A full queue still accepts texts of a client that has no text in the queue.

        Raises:
            ApiError: the queue is full, or the server is stopping.
        """
        ticket = Ticket(streamed, asyncio.get_running_loop(), client)
        with self._wake:
            if self._stopping:
                raise _stopping()
            waits = any(place.ticket.client == client for place in self.waiting)
            most = self.limits.waiting if waits else 2 * self.limits.waiting
            if self.waiting and len(self.waiting) + len(rows) > most:
                text = f"{len(self.waiting)} texts wait already; try again later"
                raise ApiError(429, text, "rate_limit_error", code="queue_full")
            self.waiting.extend(Place(row, ticket) for row in rows)
            self._wake.notify()
        return ticket

    def run(self, steps: Iterator[None]) -> asyncio.Future:
        """Runs a generator in this thread, one step between two rounds of the batches. Cancel the future to stop it.

        Raises:
            ApiError: too many wait, or the server is stopping.
        """
        loop = asyncio.get_running_loop()
        job = Job(steps, loop.create_future(), loop)
        with self._wake:
            if self._stopping:
                raise _stopping()
            if len(self.jobs) >= self.limits.waiting:
                text = f"{len(self.jobs)} texts wait already; try again later"
                raise ApiError(429, text, "rate_limit_error", code="queue_full")
            self.jobs.append(job)
            self._wake.notify()
        return job.done

    def drop(self, ticket: Ticket) -> None:
        """Removes a request's texts from the queue at once, and from their batches after the next token."""
        ticket.dropped = True
        with self._wake:
            self.waiting = deque(place for place in self.waiting if place.ticket is not ticket)

    def _work(self) -> None:
        while self._admit():
            for batch in list(self.running):
                try:
                    events = self._step(batch)
                except Exception as error:  # only this batch has failed; the server continues
                    traceback.print_exception(error)
                    text = f"the model failed: {type(error).__name__}: {' '.join(str(error).split()):.200}"
                    _deliver((place.ticket, ApiError(500, text, "server_error")) for place in batch.places)
                    self.running.remove(batch)
                else:
                    _deliver(events)
                    if not batch.live():
                        batch.steps.close()
                        self.running.remove(batch)
            self._advance_a_job()
        for job in self.jobs:
            job.end(_stopping())
        for batch in self.running:
            batch.steps.close()
        left = [place for batch in self.running for place in batch.places if not place.row.finish_reason]
        _deliver((place.ticket, _stopping()) for place in [*left, *self.waiting])

    def _advance_a_job(self) -> None:
        """Jobs take turns."""
        try:
            job = self.jobs.popleft()
        except IndexError:
            return
        if job.done.cancelled():
            return
        try:
            next(job.steps)
            self.jobs.append(job)
        except StopIteration:
            job.end()
        except Exception as error:
            traceback.print_exception(error)
            job.end(ApiError(500, f"the model failed: {type(error).__name__}", "server_error"))

    def _admit(self) -> bool:
        """Lets waiting texts join the running batches, and starts a batch if it is time.

        Sleeps while there is no work. False: the worker stops.
        """
        with self._wake:
            idle = not self._wake.wait_for(self._has_work, IDLE_SECONDS)
        if idle:
            environment.return_memory()  # mostly the caches of the last texts
        with self._wake:
            self._wake.wait_for(self._has_work)
            if self._stopping:
                return False
            self._join()
            seen = 0
            while not (self.joins or self.running or self.jobs) and seen < len(self.waiting) < self.model.batch_size:
                seen = len(self.waiting)
                self._wake.wait(GATHER_SECONDS)  # ends early when another request arrives
            places, most = self._next_places()
            if not places:
                return True
            self.waiting = deque(place for place in self.waiting if place not in places)
            rows = [place.row for place in places]
            arriving = deque(rows) if self.joins else None
            steps = self.model.stream(rows) if arriving is None else self.model.joined(arriving)
            self.running.append(Batch(places, steps, self._share(rows), arriving, most))
        self.metrics.batch_texts.observe(len(places))
        return True

    def _has_work(self) -> bool:
        return bool(self.waiting or self.running or self.jobs or self._stopping)

    def _under_way(self) -> list[Place]:
        return [place for batch in self.running for place in batch.places if not place.row.finish_reason]

    def _join(self) -> None:
        """Lets waiting texts join the running batches that have room, in the fair order."""
        if not (self.waiting and self.joins and self.running):
            return
        for place in fair_order(self.waiting, self._under_way()):
            batch = next((batch for batch in self.running if self._has_room(batch, place)), None)
            if batch is not None and batch.arriving is not None:
                batch.share = max(batch.share, self._share([*(other.row for other in batch.places), place.row]))
                batch.places.append(place)
                batch.arriving.append(place.row)
                self.waiting.remove(place)
                self.metrics.joined.inc()

    def _has_room(self, batch: Batch, place: Place) -> bool:
        rows = [other.row for other in batch.places]
        if len(rows) >= self.model.batch_size or not self.model.fits(rows, place.row):
            return False
        if batch.most == float("inf"):
            return True
        left = min((other.left() for other in self.running if other is not batch), default=0)
        return SHORT_FACTOR * place.tokens() <= left and self._share([*rows, place.row]) <= batch.most

    def _next_places(self) -> tuple[list[Place], float]:
        """The waiting texts that form the next batch, and the share of the cache that the batch may take.

        Without texts, all continue to wait.
        """
        if not self.waiting:
            return [], 0.0
        now = time.monotonic()
        under_way = self._under_way()
        ordered = fair_order(self.waiting, under_way)
        if len(self.running) < MOST_BATCHES:
            patient = now - min(place.ticket.arrived for place in ordered) < PATIENT_SECONDS
            if self.joins or len(ordered) >= len(under_way) or not patient:
                return self._together(ordered), float("inf")
        left = min(batch.left() for batch in self.running)
        busy = {place.ticket.client for place in under_way}
        short = [place for place in ordered if SHORT_FACTOR * place.tokens() <= left]
        others = [place for place in ordered if place.ticket.client not in busy]
        late = len(self.running) < FAIR_BATCHES and any(now - place.ticket.arrived >= FAIR_SECONDS for place in others)
        # half of the free cache leaves room for shorter texts. A batch of more than one cache counts as one cache
        share = (MOST_CACHES - sum(min(batch.share, 1.0) for batch in self.running)) / 2
        return self._together(short, share) or self._together(others if late else [], share), share

    def _together(self, ordered: list[Place], share: float = float("inf")) -> list[Place]:
        """The texts that fit into one batch and into a share of its cache. Without a limit, the first text fits."""
        places: list[Place] = []
        for place in ordered:
            rows = [chosen.row for chosen in places]
            if self.model.fits(rows, place.row) and self._share([*rows, place.row]) <= share:
                places.append(place)
        return places

    def _share(self, rows: list) -> float:
        """The cache that rows take. Without `cache_share` (older models), this is 1: no batches beyond MOST_BATCHES."""
        return self.model.cache_share(rows) if hasattr(self.model, "cache_share") else 1.0

    def _step(self, batch: Batch) -> list[tuple[Ticket, object]]:
        """Generates one more token for each text of a batch. Returns the events for the requests."""
        for place in batch.places:
            if place.ticket.dropped:
                wrappers.end(place.row, "cancelled")
        batch.places = [place for place in batch.places if not place.row.finish_reason]
        if not batch.places:
            return []
        step = next(batch.steps, None)
        if step is None:
            raise RuntimeError("the runtime ended before its texts")
        tickets = {id(place.row): place.ticket for place in batch.places}
        news = ((tickets[id(row)], row, text) for row, text in step)
        return [
            (ticket, (row, text, row.finish_reason))
            for ticket, row, text in news
            if not ticket.dropped and (row.finish_reason or (ticket.streamed and text))
        ]


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", "server_error")


def _deliver(events: Iterable[tuple[Ticket, object]]) -> None:
    """Puts events into the queues of their requests. Wakes the event loop once."""
    events = list(events)

    def put():
        for ticket, event in events:
            ticket.events.put_nowait(event)

    if events:
        with suppress(RuntimeError):  # the loop is closed, so no request reads its queue
            events[0][0].loop.call_soon_threadsafe(put)
