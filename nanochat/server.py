"""The HTTP server: OpenAI's API, the public guide's chat stream, the pages, health and metrics. Used by scripts/chat_web.py.

The event loop only passes text on; models run in the threads of service.py. To add an endpoint, write a route in
one of the functions `_add_..._routes`; to add a limit, see `service.Limits`; guard.py is what every request passes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from importlib.resources import files
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from nanochat.common import NanochatError
from nanochat.engine import Engine
from nanochat.guard import Guard
from nanochat.openai_api import (
    MAX_CHARS,
    MAX_MESSAGES,
    ChatRequest,
    CompletionRequest,
    Parts,
    Reply,
    RequestError,
    TextOffsets,
    TokenId,
    aligned,
    check_prompt,
    check_tokens,
    explain,
    finish_reason,
    spoken,
    token_text,
    usage,
)
from nanochat.openai_api import Message as ChatMessage
from nanochat.runs_api import add_run_routes
from nanochat.scheduler import Sequence, TokenLogprob
from nanochat.service import ChatDefaults, Limits, Service, Ticket
from nanochat.trimming import trim_conversation

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class DetokenizeRequest(BaseModel):
    tokens: list[TokenId] = Field(max_length=MAX_CHARS, fail_fast=True)


class TokenizeRequest(BaseModel):
    """Either a text or messages, of which the tokens are wanted."""

    prompt: str | None = Field(None, max_length=MAX_CHARS)
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)


def create_app(
    engines: list[Engine],
    model_name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
    cors_origins: list[str] | None = None,
    compile: bool = False,
    hosts: list[str] | None = None,
    defaults: ChatDefaults | None = None,
) -> FastAPI:
    """The app that serves one model with one engine for each device, compiled at the start if asked for.

    hosts: the names by which it may be asked (default: any). `app.state.service` is its Service.
    """
    service = Service(engines, model_name, limits or Limits(), compile)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPIOffline(title="nanochat", lifespan=lifespan, redoc_url=None)
    app.state.service = service
    app.add_middleware(Guard, limits=service.limits, api_key=api_key, hosts=hosts)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])
    _add_error_handlers(app)
    _add_pages(app)
    add_run_routes(app)
    usual = asdict(defaults or ChatDefaults())
    _add_openai_routes(app, service)
    _add_chat_routes(app, service, usual)
    _add_status_routes(app, service, usual)
    return app


# ----------------------------------------------------------------------------- routes


def _add_openai_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return _describe_model(service)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        prompt, dropped = await _render(service, request)
        ticket = _submit_chat(service, request, prompt)
        reply = Reply("chat", service.model_name, service.tokenizer, request.include_usage)
        headers = {}
        if dropped:
            reply.extra = {"dropped_turns": dropped}
            headers["X-Nanochat-Dropped-Turns"] = str(dropped)
        if request.stream:
            return _stream(ticket, _chat_chunks(service, ticket, reply), headers)
        await _wait_until_done(ticket, http, service.limits.request_timeout_s)
        return await _write(lambda: reply.chat(ticket.sequences), headers)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest, http: Request) -> Response:
        _check_model(service, request.model)
        prompts = await asyncio.to_thread(request.prompts, service.tokenizer)
        max_tokens = 16 if request.max_tokens is None else request.max_tokens
        sequences = []
        for tokens, _ in prompts:
            check_prompt(tokens, service.context)
            for choice in range(request.n or 1):
                wants_prompt = bool(request.echo) and request.logprobs is not None
                params = request.params(choice, max_tokens, request.logprobs, prompt_logprobs=wants_prompt)
                sequences.append(Sequence(tokens, params))
        ticket = service.submit(sequences)
        reply = Reply("completion", service.model_name, service.tokenizer, request.include_usage)
        if request.stream:
            return _stream(ticket, _completion_chunks(service, ticket, reply, len(prompts)))
        await _wait_until_done(ticket, http, service.limits.request_timeout_s)
        added_bos = [added for _, added in prompts]
        return await _write(lambda: reply.completions(ticket.sequences, bool(request.echo), added_bos))


def _add_chat_routes(app: FastAPI, service: Service, defaults: dict[str, Any]) -> None:
    @app.post("/chat/completions", response_model=None)
    async def chat_stream(request: ChatRequest) -> Response:
        """The public guide's stream: {"token": text, "part": type} again and again, {"done": true} last; see `Parts`."""
        given = {name: value for name, value in defaults.items() if getattr(request, name) is None}
        request = request.model_copy(update={**given, "n": 1})
        prompt, dropped = await _render(service, request)
        ticket = _submit_chat(service, request, prompt)
        return _stream(ticket, _guide_events(service, ticket, dropped))

    @app.post("/tokenize", response_model=None)
    async def tokenize(request: TokenizeRequest) -> Response:
        """The tokens of a text, or of a conversation as the model reads it (vLLM's name and form)."""
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("give either prompt or messages")
        if request.prompt is not None:
            tokens = await asyncio.to_thread(service.tokenizer.encode, request.prompt)
        else:
            tokens, _ = await _render(service, ChatRequest.model_validate({"messages": request.messages}))
        known = {"count": len(tokens), "max_model_len": service.context, "tokens": tokens}
        return await _write(lambda: {**known, "token_strs": [token_text(service.tokenizer, token) for token in tokens]})

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> dict[str, str]:
        check_tokens(request.tokens, service.tokenizer)
        return {"prompt": service.tokenizer.decode(request.tokens)}


def _add_status_routes(app: FastAPI, service: Service, defaults: dict[str, Any]) -> None:
    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What lm-eval's remote tokenizer asks for (vLLM's name and form)."""
        return {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "vocab_size": service.tokenizer.get_vocab_size()}

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        status = "failed" if not service.is_healthy else "ok" if service.is_ready else "compiling"
        body = {"status": status, "ready": status == "ok", "model": service.model_name, "defaults": defaults}
        return JSONResponse(body, status_code=503 if status == "failed" else 200)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return service.stats()

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


# ----------------------------------------------------------------------------- from request to texts


def _describe_model(service: Service) -> dict[str, Any]:
    created = int(service.started)
    return {
        "id": service.model_name, "object": "model", "created": created, "owned_by": "nanochat",
        "max_model_len": service.context,
    }  # fmt: skip


def _check_model(service: Service, name: str | None) -> None:
    """Raise RequestError 404 for a model that is not served here; no name, or "nanochat", means the one that is."""
    if name and name not in (service.model_name, "nanochat"):
        raise RequestError(
            f"the model {name[:100]!r} does not exist here; this server has {service.model_name!r}",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip


async def _render(service: Service, request: ChatRequest) -> tuple[list[int], int]:
    """(prompt, turns dropped): the conversation's tokens, trimmed at turns so that an answer fits into the context."""
    _check_model(service, request.model)
    room = service.context
    reserve = max(1, min(room // 4 if request.limit is None else request.limit, room // 4))

    def render() -> tuple[list[int], int]:
        kept, dropped = trim_conversation(request.conversation(), service.tokenizer, room - reserve)
        return service.tokenizer.render_for_completion(kept), dropped

    try:
        return await asyncio.to_thread(render)
    except NanochatError as error:
        raise RequestError(str(error), param="messages", code="context_length_exceeded") from None


def _submit_chat(service: Service, request: ChatRequest, prompt: list[int]) -> Ticket:
    params = [request.params(i, request.limit, request.num_logprobs) for i in range(request.n or 1)]
    return service.submit([Sequence(prompt, p) for p in params])


async def _write(make: Callable[[], dict[str, Any]], headers: dict[str, str] | None = None) -> Response:
    """The reply, made and written down in a thread: what has many tokens takes seconds."""
    return await asyncio.to_thread(lambda: JSONResponse(make(), headers=headers))


async def _wait_until_done(ticket: Ticket, http: Request, timeout_s: float) -> None:
    """A client that goes away frees its texts at once."""

    async def wait() -> None:
        async for _ in ticket.updates(timeout_s):
            pass

    waiting, leaving = asyncio.create_task(wait()), asyncio.create_task(_disconnect(http))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise RequestError("the client is gone", status=499)
        await waiting
    finally:
        waiting.cancel()
        leaving.cancel()
        ticket.cancel()


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


# ----------------------------------------------------------------------------- streams


def _stream(ticket: Ticket, events: AsyncIterator[str], headers: dict[str, str] | None = None) -> StreamingResponse:
    headers = {**STREAM_HEADERS, **(headers or {})}
    return StreamingResponse(_until_left(ticket, events), media_type="text/event-stream", headers=headers)


async def _until_left(ticket: Ticket, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """A failure in the middle of a stream becomes its last event; a client that leaves frees its texts."""
    try:
        async for event in events:
            yield event
    except RequestError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        ticket.cancel()


class News(NamedTuple):
    """What is new in a text."""

    pieces: list[tuple[str, str]]
    tokens: list[int]
    logprobs: list[TokenLogprob | None]  # of the tokens: None for those that a tool forced, and where nobody asked
    last: bool


class Reader:
    """Where a stream stands in one text. Everything new is read at once, so a slow client gets fewer, larger pieces."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence, self.parts = sequence, Parts()
        self.pieces = self.sampled = 0
        self.ended = False

    def read(self) -> News | None:
        """None if there is nothing new."""
        sequence, begin = self.sequence, self.pieces
        last = sequence.finish_reason not in (None, "error")  # of an error the ticket tells
        if self.ended or (len(sequence.pieces) == begin and not last):
            return None
        self.ended = last
        pieces = sequence.pieces[begin:]
        self.pieces += len(pieces)
        tokens, masks = sequence.tokens[begin : self.pieces], sequence.masks[begin : self.pieces]
        logprobs = aligned(sequence.logprobs[self.sampled :], masks)
        self.sampled += sum(masks)
        return News(pieces, tokens, logprobs, last)

    def with_stop_token(self, news: News) -> tuple[list[int], list[TokenLogprob | None]]:
        """(tokens, log-probabilities) of a completion, whose last news have those of the token that ended it, too."""
        stop_token = self.sequence.stop_token
        if not news.last or stop_token is None:
            return news.tokens, news.logprobs
        return [*news.tokens, stop_token], [*news.logprobs, *aligned(self.sequence.logprobs[self.sampled :], [1])]


async def _chat_chunks(service: Service, ticket: Ticket, reply: Reply) -> AsyncIterator[str]:
    readers = [Reader(sequence) for sequence in ticket.sequences]
    first = {"role": "assistant", "content": ""}
    for i in range(len(readers)):
        yield reply.chunk([{"index": i, "delta": first, "logprobs": None, "finish_reason": None}])
    async for _ in ticket.updates(service.limits.request_timeout_s):
        for i, reader in enumerate(readers):
            if (news := reader.read()) is None:
                continue
            logprobs = [entry for entry in news.logprobs if entry is not None]
            if (parts := reader.parts.of(news.pieces)) or logprobs:
                yield reply.chunk([reply.chat_delta(i, reader.sequence, parts, logprobs, False)])
            if news.last:
                yield reply.chunk([reply.chat_delta(i, reader.sequence, [], [], True)])
    if reply.include_usage:
        yield reply.chunk([], usage(ticket.sequences, 1))
    yield "data: [DONE]\n\n"


async def _completion_chunks(service: Service, ticket: Ticket, reply: Reply, prompts: int) -> AsyncIterator[str]:
    readers = [Reader(sequence) for sequence in ticket.sequences]
    offsets = [TextOffsets(service.tokenizer) for _ in readers]
    async for _ in ticket.updates(service.limits.request_timeout_s):
        for i, (reader, places) in enumerate(zip(readers, offsets, strict=True)):
            if (news := reader.read()) is None:
                continue
            text, content = spoken(news.pieces), None
            if reader.sequence.params.logprobs is not None:
                tokens, logprobs = reader.with_stop_token(news)
                content = reply.completion_logprobs(logprobs, tokens, places.of(tokens))
            if text or news.last or (content and content["tokens"]):
                reason = finish_reason(reader.sequence) if news.last else None
                yield reply.chunk([{"index": i, "text": text, "logprobs": content, "finish_reason": reason}])
    if reply.include_usage:
        yield reply.chunk([], usage(ticket.sequences, prompts))
    yield "data: [DONE]\n\n"


async def _guide_events(service: Service, ticket: Ticket, dropped: int) -> AsyncIterator[str]:
    """Text by the type of its part; with logprobs also every token, its probability and the alternatives."""
    (sequence,) = ticket.sequences
    reader, tokenizer = Reader(sequence), service.tokenizer
    if dropped:
        yield f"data: {json.dumps({'dropped_turns': dropped})}\n\n"
    async for _ in ticket.updates(service.limits.request_timeout_s):
        if (news := reader.read()) is None:
            continue
        for part in reader.parts.of(news.pieces):
            yield f"data: {json.dumps({'token': part.pop('text'), 'part': part.pop('type'), **part})}\n\n"
        if sequence.params.logprobs is not None:
            tokens = [
                {
                    "text": token_text(tokenizer, token),
                    "logprob": entry and entry.logprob,
                    "top": [[token_text(tokenizer, other), value] for other, value in entry.top] if entry else [],
                }
                for token, entry in zip(news.tokens, news.logprobs, strict=True)
            ]
            if tokens:
                yield f"data: {json.dumps({'tokens': tokens})}\n\n"
        if news.last:
            done = {"done": True, "finish_reason": sequence.finish_reason, "usage": usage([sequence], 1)}
            yield f"data: {json.dumps(done)}\n\n"


# ----------------------------------------------------------------------------- pages and errors


class FreshFiles(StaticFiles):
    """Asks browsers to look each time whether a file has changed, so that no page meets scripts of another version."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _add_pages(app: FastAPI) -> None:
    folder = files("nanochat").joinpath("ui")
    app.mount("/ui", FreshFiles(directory=str(folder)), name="ui")

    def page(path: str, name: str) -> None:
        @app.api_route(path, methods=["GET", "HEAD"], response_class=FileResponse, include_in_schema=False)
        async def show() -> FileResponse:
            return FileResponse(str(folder.joinpath(name)), media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    page("/", "index.html")
    page("/runs", "runs.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return Response(status_code=204)


def _add_error_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's form, with one clear sentence."""

    @app.exception_handler(RequestError)
    async def request_error(_: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "2"} if error.status == 429 else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return await request_error(_, explain(list(error.errors()), error.body))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        body = RequestError(str(error.detail), status=error.status_code).body()
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:  # starlette logs it with its trace
        return JSONResponse(RequestError("the server failed: see its log", status=500).body(), status_code=500)
