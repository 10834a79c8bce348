"""The chat server: a FastAPI app around an engine that computes in a thread of its own. Used by scripts/chat_web.py.

The event loop only passes text on, so the page and /health answer while the model computes. Requests wait in a bounded
queue; a client that goes away frees its place at the next token.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel, Field

from nanochat.common import NanochatError, logger
from nanochat.engine import Engine, trim_conversation
from nanochat.tokenizer import IncrementalDecoder

MAX_WAITING = 32  # requests in the queue; one more is answered 429
MAX_MESSAGES = 500
MAX_CHARS = 32_000  # of a whole conversation


class Part(BaseModel):
    """A piece of an assistant's message: text, a call of the calculator, or its answer."""

    type: Literal["text", "python", "python_output"]
    text: str = Field(max_length=MAX_CHARS)


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_CHARS)] | Annotated[list[Part], Field(max_length=MAX_MESSAGES)]

    def __len__(self) -> int:
        return len(self.content) if isinstance(self.content, str) else sum(len(part.text) for part in self.content)


class ChatRequest(BaseModel):
    """The body of POST /chat/completions, with the names and limits of the public guide."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float = Field(0.8, ge=0.0, le=2.0)
    max_tokens: int = Field(512, ge=1, le=4096)
    top_k: int = Field(50, ge=0, le=1000)
    seed: int | None = Field(None, ge=0, lt=2**63)


@dataclass
class Job:
    """A request in the model's thread.

    Its events go to the loop that asked: {"token": text, "part": type} many times, or {"error": sentence}; None ends them.
    """

    request: ChatRequest
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[dict[str, Any] | None] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def send(self, event: dict[str, Any] | None) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Worker:
    """The thread that owns an engine and answers one request after the other."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.jobs: queue.Queue[Job | None] = queue.Queue(MAX_WAITING)
        self.busy = False
        self.answered = self.tokens = 0
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)

    def submit(self, job: Job) -> None:
        """Queue a request. Raises queue.Full if too many wait."""
        self.jobs.put_nowait(job)

    def stop(self) -> None:
        self.jobs.put(None)
        self.thread.join(timeout=30)

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            self.busy = True
            try:
                for text, part in self._answer(job):
                    job.send({"token": text, "part": part})
                self.answered += 1
            except NanochatError as error:
                job.send({"error": str(error)})
            except Exception:  # one broken request must not end the service of the others
                logger.exception("a request failed")
                job.send({"error": "the model failed on this request: see the server's log"})
            finally:
                job.send(None)
                self.busy = False

    def _answer(self, job: Job) -> Iterator[tuple[str, str]]:
        """The reply in pieces of whole characters, each with the type of the part that it belongs to."""
        engine, request = self.engine, job.request
        if job.cancelled.is_set():
            return
        room = engine.model.config.sequence_len
        messages = [message.model_dump() for message in request.messages]
        reserve = min(request.max_tokens, room // 4)
        conversation, _ = trim_conversation({"messages": messages}, engine.tokenizer, room - reserve)
        prompt = engine.tokenizer.render_for_completion(conversation)
        decoder = IncrementalDecoder(engine.tokenizer)
        seed = time.time_ns() % 2**31 if request.seed is None else request.seed
        stream = engine.generate(prompt, 1, request.max_tokens, request.temperature, request.top_k, seed)
        for (token,), _ in stream:
            if job.cancelled.is_set():
                return
            if token in engine.stop_ids:
                break
            self.tokens += 1
            if text := decoder.feed(token):
                yield text, decoder.part
        if text := decoder.flush():
            yield text, decoder.part


def create_app(engine: Engine, model_name: str) -> FastAPI:
    """The app that serves one model: GET /, /health, /stats and POST /chat/completions (server-sent events)."""
    worker = Worker(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.thread.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="nanochat", lifespan=lifespan)
    page = files("nanochat").joinpath("ui", "index.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def index() -> str:
        return page

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok" if worker.thread.is_alive() else "failed",
            "ready": worker.thread.is_alive(),
            "model": model_name,
        }

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return {
            "busy": worker.busy, "waiting": worker.jobs.qsize(), "answered": worker.answered, "tokens": worker.tokens,
        }  # fmt: skip

    @app.post("/chat/completions")
    async def chat_completions(request: ChatRequest) -> StreamingResponse:
        if request.messages[-1].role != "user":
            raise HTTPException(400, "the last message must be the user's")
        if sum(map(len, request.messages)) > MAX_CHARS:
            raise HTTPException(400, f"the conversation is longer than {MAX_CHARS:,} characters: begin a new one")
        job = Job(request, asyncio.get_running_loop())
        try:
            worker.submit(job)
        except queue.Full:
            raise HTTPException(429, "too many requests wait: try again soon", {"Retry-After": "5"}) from None
        return StreamingResponse(_stream(job), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    return app


async def _stream(job: Job) -> AsyncIterator[str]:
    """Server-sent events of a job; leaving early (the client is gone) cancels it."""
    try:
        while (event := await job.events.get()) is not None:
            yield f"data: {json.dumps(event)}\n\n"
        yield 'data: {"done": true}\n\n'
    finally:
        job.cancelled.set()
