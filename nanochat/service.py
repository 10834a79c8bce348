"""The layer between HTTP and the engines: a bounded queue, one model thread per device, updates for the event loop.

A Ticket holds one request's texts. Engines write to them in their threads; the event loop is notified at most once per
step, however many texts there are. Used by server.py, streams.py and scripts/chat_web.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nanochat.engine import Engine
from nanochat.engine_thread import EngineThread
from nanochat.gpt import GPT
from nanochat.openai_api import RequestError
from nanochat.sequence import Sequence

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The limits of one server."""

    max_waiting: int = 256  # texts in one engine's queue; more get a 429
    request_timeout_s: float = 600.0  # for an answer, waiting included
    grace_s: float = 10.0  # for running answers when the server is told to stop


@dataclass(frozen=True)
class ChatDefaults:
    """Default settings for answers of the page and /chat/completions; /v1 has OpenAI's defaults."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512


class Metrics:
    """Prometheus metrics with vLLM's names, so that its dashboards work for this server, too."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._name = service.model_name
        seconds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

        def metric(kind: Any, name: str, text: str, **more: Any) -> Any:
            return kind(f"vllm:{name}", text, ("model_name",), registry=self.registry, **more).labels(self._name)

        running = metric(Gauge, "num_requests_running", "Texts being computed")
        running.set_function(lambda: service.total("num_running"))
        waiting = metric(Gauge, "num_requests_waiting", "Texts in the queues")
        waiting.set_function(lambda: service.total("num_waiting"))
        usage = metric(Gauge, "kv_cache_usage_perc", "Share of key/value blocks in use, 0 to 1")
        usage.set_function(lambda: service.kv_usage)
        self.prompt_tokens = metric(Counter, "prompt_tokens", "Prompt tokens read")
        self.generated = metric(Counter, "generation_tokens", "Tokens generated")
        self.queries = metric(Counter, "prefix_cache_queries", "Prompt tokens looked up")
        self.hits = metric(Counter, "prefix_cache_hits", "Prompt tokens found computed")
        self.first_token = metric(Histogram, "time_to_first_token_seconds", "From arrival to the first token", buckets=seconds)
        self.each_token = metric(
            Histogram, "time_per_output_token_seconds", "Between tokens, the mean of a text", buckets=seconds
        )
        self.latency = metric(Histogram, "e2e_request_latency_seconds", "From arrival to the end", buckets=seconds)
        self.finished = Counter(
            "vllm:request_success", "Texts finished", ("model_name", "finished_reason"), registry=self.registry
        )

    def observe(self, sequence: Sequence) -> None:
        """Count a text that is done; its prompt only if it was read, at least in part."""
        now = time.perf_counter()
        self.finished.labels(self._name, sequence.finish_reason).inc()
        if sequence.admitted:
            self.prompt_tokens.inc(len(sequence.prompt))
            self.queries.inc(len(sequence.prompt))
            self.hits.inc(sequence.cached_tokens)
        self.generated.inc(sum(sequence.masks) + (sequence.stop_token is not None))
        self.latency.observe(now - sequence.created)
        if sequence.first_token_at is not None:
            self.first_token.observe(sequence.first_token_at - sequence.created)
            if len(sequence.tokens) > 1:
                self.each_token.observe((now - sequence.first_token_at) / (len(sequence.tokens) - 1))


MAX_FAILURES = 3  # after this many failed steps in a row, blame the model's copy, not the requests
REST_S = 30  # how long to avoid a copy that failed that often, if there are others
TIMEOUTS = (TimeoutError, asyncio.TimeoutError, futures.TimeoutError)  # one class only from Python 3.11 on
READY_S = 0.1  # between looks at whether a model is compiled
STREAM_INTERVAL_S = 0.015  # between pieces of a stream after the first: faster than the eye, at a fraction of the work


class Ticket:
    """The texts of one request, as the event loop sees them."""

    def __init__(self, sequences: list[Sequence], worker: Worker) -> None:
        self.sequences, self._worker = sequences, worker
        self.loop = asyncio.get_running_loop()
        self.news = asyncio.Event()
        self.told_at = 0.0
        self.deadline = self.loop.time() + worker.service.limits.request_timeout_s

    @property
    def done(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    async def updates(self) -> AsyncIterator[None]:
        """Yields whenever there is something new to read, and once more when all is done.

        Raises RequestError if a text fails or takes longer than Limits.request_timeout_s.
        """
        done = False
        while not done:
            try:
                await asyncio.wait_for(self.news.wait(), self.deadline - self.loop.time())
            except asyncio.TimeoutError:
                timeout_s = self._worker.service.limits.request_timeout_s
                raise RequestError(f"no end of the answer within {timeout_s:g} s", status=504, code="timeout") from None
            self.news.clear()
            done = self.done  # before reading: later updates are read the next time
            for sequence in self.sequences:
                if sequence.error is not None:
                    raise RequestError(sequence.error, status=500)
            yield

    def cancel(self) -> None:
        """Cancel what still runs: the reader has left."""
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                self._worker.thread.scheduler.cancel(sequence)


class Worker:
    """One engine's thread, and the tickets that wait for its updates."""

    def __init__(self, engine: Engine, service: Service, compile: bool) -> None:
        self.engine, self.service = engine, service
        self.thread = EngineThread(engine, self._wake_readers, compile)
        self._updated: set[Ticket] = set()
        self._functions = 0  # that wait to be called, or are being called

    @property
    def num_waiting(self) -> int:
        return self.engine.scheduler.num_waiting + self._functions

    @property
    def load(self) -> int:
        return self.num_waiting + self.engine.scheduler.num_running

    @property
    def is_healthy(self) -> bool:
        rested = time.monotonic() - self.thread.failed_at > REST_S
        return self.thread.takes_work and (rested or self.thread.failures < MAX_FAILURES)

    def check(self) -> None:
        """Raise RequestError 503 if the thread takes no work."""
        if not self.thread.takes_work:
            raise RequestError("the model has stopped: see the server's log, and start it again", status=503, code="stopped")

    def submit(self, sequences: list[Sequence]) -> Ticket:
        ticket = Ticket(sequences, self)

        def update(sequence: Sequence) -> None:  # in the model's thread
            self._updated.add(ticket)
            if sequence.finish_reason is not None:
                self.service.count_finished(sequence)

        for sequence in sequences:
            sequence.on_update = update
            self.engine.scheduler.submit(sequence)
        return ticket

    async def compute(self, function: Callable[[GPT], T]) -> T:
        """See Service.compute."""
        future: Future[T] = Future()

        def call() -> None:  # in the model's thread
            if not future.set_running_or_notify_cancel():
                return  # nobody waits for it any more
            try:
                with torch.inference_mode():
                    future.set_result(function(self.engine.model))
            except (StopIteration, *TIMEOUTS) as error:  # a future raises none of them as what it is
                future.set_exception(RuntimeError(repr(error)))
            except Exception as error:
                future.set_exception(error)

        self._functions += 1
        try:
            while not self.thread.ready.is_set():  # nothing may be computed while the compiler works
                self.check()
                await asyncio.sleep(READY_S)
            self.engine.scheduler.post(call)
            self.check()  # the thread may have ended before it saw this
            return await asyncio.wrap_future(future)
        finally:
            self._functions -= 1

    def _wake_readers(self) -> None:
        """Wake each event loop once, for all tickets with updates that are due."""
        now, idle = time.perf_counter(), self.engine.scheduler.is_idle
        by_loop: dict[asyncio.AbstractEventLoop, list[Ticket]] = {}
        for ticket in list(self._updated):
            if idle or ticket.done or now - ticket.told_at >= STREAM_INTERVAL_S:
                ticket.told_at = now
                by_loop.setdefault(ticket.loop, []).append(ticket)
                self._updated.discard(ticket)
        for loop, tickets in by_loop.items():
            with contextlib.suppress(RuntimeError):  # it is closed, and may close at any moment: an error would end the model
                loop.call_soon_threadsafe(_set_news, tickets)


def _set_news(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.news.set()


class Service:
    """Everything that serves one model: an engine for each device."""

    def __init__(self, engines: list[Engine], model_name: str, limits: Limits, compile: bool) -> None:
        self.model_name, self.limits = model_name, limits
        self.tokenizer = engines[0].tokenizer
        self.context = engines[0].model.config.sequence_len
        self.workers = [Worker(engine, self, compile) for engine in engines]
        self.metrics = Metrics(self)
        self.answered = 0
        self.started = time.time()

    def start(self) -> None:
        for worker in self.workers:
            worker.thread.start()

    def close(self) -> None:
        for worker in self.workers:
            worker.thread.close()

    def cancel_all(self) -> None:
        """End all answers now: readers get what there is so far, and a proper end."""
        for worker in self.workers:
            worker.engine.scheduler.cancel_all()

    def submit(self, sequences: list[Sequence]) -> Ticket:
        """Queue one request's texts with the least busy engine; a failing one only if all fail.

        Raises RequestError: 429 if too many wait, 400 for more texts than the queue can hold, 503 if no engine works.
        """
        n, most = len(sequences), self.limits.max_waiting
        if n > most:
            raise RequestError(f"a request of {n} texts does not fit the queue, which holds {most}: ask for fewer")
        worker = self._choose_worker(n)
        ticket = worker.submit(sequences)
        worker.check()  # again: the thread may have ended before it saw this submission
        return ticket

    async def compute(self, function: Callable[[GPT], T]) -> T:
        """Call a function that runs the model, in a model's thread between two steps; that engine's texts wait meanwhile.

        The function gets the model of the engine that `submit` would choose; it must not return tensors of its device.
        Raises what the function raises, RequestError 429 and 503 as `submit` does, and 504 at the request's time limit.
        """
        worker, timeout_s = self._choose_worker(1), self.limits.request_timeout_s
        try:
            return await asyncio.wait_for(worker.compute(function), timeout_s)
        except asyncio.TimeoutError:
            raise RequestError(f"no result within {timeout_s:g} s", status=504, code="timeout") from None

    def _choose_worker(self, n: int) -> Worker:
        """The least busy one with room for n more in its queue; see `submit`."""
        worker = min(self.workers, key=lambda w: (not w.thread.takes_work, not w.is_healthy, w.load))
        worker.check()
        if worker.num_waiting + n > self.limits.max_waiting:
            raise RequestError("too many requests are waiting: try again soon", status=429, code="queue_full")
        return worker

    def count_finished(self, sequence: Sequence) -> None:
        self.answered += 1
        self.metrics.observe(sequence)

    # ------------------------------------------------------------------------- what it tells of itself

    def total(self, name: str) -> int:
        """The sum of a number that each scheduler has."""
        return sum(getattr(worker.engine.scheduler, name) for worker in self.workers)

    @property
    def is_healthy(self) -> bool:
        return all(worker.is_healthy for worker in self.workers)

    @property
    def is_ready(self) -> bool:
        """False while models are being compiled and requests wait."""
        return all(worker.thread.ready.is_set() for worker in self.workers)

    @property
    def is_stopped(self) -> bool:
        """True if no model thread and no compiler thread is running any more."""
        return self.is_ready and not any(worker.thread.is_alive for worker in self.workers)

    @property
    def kv_usage(self) -> float:
        allocators = [worker.engine.scheduler.allocator for worker in self.workers]
        return sum(1 - a.num_free / (a.num_blocks - 1) for a in allocators) / len(allocators)

    def stats(self) -> dict[str, Any]:
        return {
            "model": self.model_name,
            "uptime_s": round(time.time() - self.started, 1),
            "devices": [str(worker.engine.model.get_device()) for worker in self.workers],
            "compiled": [worker.engine.is_compiled for worker in self.workers],
            "context": self.context,
            "running": self.total("num_running"),
            "waiting": self.total("num_waiting"),
            "answered": self.answered,
            "prompt_tokens": self.total("prompt_tokens"),
            "cached_tokens": self.total("cached_tokens"),
            "generated_tokens": self.total("generated_tokens"),
            "preemptions": self.total("preemptions"),
            "kv_usage": round(self.kv_usage, 4),
        }
