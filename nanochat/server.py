"""The HTTP server: OpenAI's API, the public guide's chat stream, the pages, health and metrics. Used by scripts/chat_web.py.

The event loop only passes text on; models run in the threads of service.py. To add an endpoint, write a route in one of the
functions `_add_..._routes`, and a generator in streams.py if it streams; to add a limit, see `service.Limits`. Every request
passes guard.py first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
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
    MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    Reply,
    RequestError,
    TokenId,
    check_logprobs,
    check_prompt,
    check_tokens,
    context_limit,
    explain,
    token_text,
)
from nanochat.openai_api import Message as ChatMessage
from nanochat.runs_api import add_run_routes
from nanochat.sequence import Sequence
from nanochat.service import ChatDefaults, Limits, Service, Ticket
from nanochat.streams import chat_chunks, completion_chunks, guide_events, stream
from nanochat.trimming import prompt_room, trim_conversation

# Writes replies with log-probabilities, one at a time: each may take seconds, and would keep others' prompts waiting.
LOGPROBS = ThreadPoolExecutor(1, "logprobs")
OPENAI_PATHS = ("/chat/completions", "/completions", "/models")  # under /v1
NAMED_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class DetokenizeRequest(BaseModel):
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS, fail_fast=True)


class TokenizeRequest(BaseModel):
    """A text or messages, to be tokenized."""

    prompt: str | None = Field(None, max_length=MAX_CHARS)
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)  # of the answer to the messages, which they leave room for
    add_special_tokens: bool | None = None  # its value is ignored; its presence marks a vLLM-style client (see tokenize)


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's form of an error, as RequestError.body makes it."""

    error: ErrorDetails


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
    """The app that serves one model with one engine per device, compiled at the start if requested.

    hosts: the host names that it accepts (default: any). `app.state.service` is its Service.
    """
    service = Service(engines, model_name, limits or Limits(), compile)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    errors: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorReply, "description": "What is wrong with the request, such as 400, 404 or 429"},
        "5XX": {"model": ErrorReply, "description": "What has failed here"},
    }
    described_key = [] if api_key is None else [Depends(HTTPBearer(auto_error=False))]  # for /docs; guard.py checks it
    app = FastAPIOffline(title="nanochat", lifespan=lifespan, redoc_url=None, responses=errors, dependencies=described_key)
    app.state.service = service
    app.add_middleware(Guard, api_key=api_key, hosts=hosts)
    if cors_origins:
        shown = ["X-Request-Id", "X-Should-Retry", "Retry-After"]
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=shown
        )
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
    @app.get("/v1/models/", include_in_schema=False)  # or it would be the model of no name
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
        reply.extra, headers = _report_dropped(dropped)
        if request.stream:
            return stream(ticket, chat_chunks(ticket, reply), headers)
        await _wait_until_done(ticket, http)
        pool = LOGPROBS if request.num_logprobs is not None else None
        return await _write(lambda: reply.chat(ticket.sequences), headers, pool)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest, http: Request) -> Response:
        _check_model(service, request.model)
        prompts = await asyncio.to_thread(request.prompts, service.tokenizer)
        max_tokens = 16 if request.max_tokens is None else request.max_tokens
        sequences = []
        echoed = max(len(tokens) for tokens, _ in prompts) if request.echo else 0
        length = min(service.context, max_tokens + echoed)
        check_logprobs(len(prompts) * (request.n or 1), length, request.logprobs)
        check_tokens([int(token) for token in request.logit_bias or ()], service.tokenizer, "logit_bias")
        for tokens, _ in prompts:
            check_prompt(tokens, service.context)
            for choice in range(request.n or 1):
                wants_prompt = bool(request.echo) and request.logprobs is not None
                params = request.params(choice, max_tokens, request.logprobs, prompt_logprobs=wants_prompt)
                sequences.append(Sequence(tokens, params))
        ticket = service.submit(sequences)
        reply = Reply("completion", service.model_name, service.tokenizer, request.include_usage)
        if request.stream:
            return stream(ticket, completion_chunks(ticket, reply, len(prompts)))
        await _wait_until_done(ticket, http)
        added_bos = [added for _, added in prompts]
        pool = LOGPROBS if request.logprobs is not None else None
        return await _write(lambda: reply.completions(ticket.sequences, bool(request.echo), added_bos), pool=pool)


def _add_chat_routes(app: FastAPI, service: Service, defaults: dict[str, Any]) -> None:
    @app.post("/chat/completions", response_model=None)
    async def chat_stream(request: ChatRequest, http: Request) -> Response:
        """The public guide's stream: any number of {"token": text, "part": type}, then {"done": true}."""
        if request.model is not None:  # OpenAI's clients name one; they would take the stream for a reply
            raise RequestError(f"this is the chat page's stream: OpenAI's API has the base URL {_base_url(http)}", status=404)
        given = {name: value for name, value in defaults.items() if getattr(request, name) is None}
        request = request.model_copy(update={**given, "n": 1})
        prompt, dropped = await _render(service, request)
        ticket = _submit_chat(service, request, prompt)
        return stream(ticket, guide_events(ticket, service.tokenizer, dropped))

    @app.post("/tokenize", response_model=None)
    async def tokenize(request: TokenizeRequest) -> Response:
        """The tokens of a text, or of a conversation as the model reads it (same name and form as in vLLM)."""
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("give either prompt or messages")
        dropped = 0
        if request.prompt is not None and request.prompt in NAMED_TOKENS.values() and request.add_special_tokens is not None:
            tokens = [service.tokenizer.encode_special(request.prompt)]  # so lm-eval asks for the id of one of them
        elif request.prompt is not None:
            tokens = await asyncio.to_thread(service.tokenizer.encode, request.prompt)
        else:
            asked = {"messages": request.messages, "max_tokens": request.max_tokens}
            tokens, dropped = await _render(service, ChatRequest.model_validate(asked))
        extra, headers = _report_dropped(dropped)
        known = {"count": len(tokens), "max_model_len": service.context, "tokens": tokens}
        known |= {"nanochat": extra} if extra else {}
        return await _write(
            lambda: {**known, "token_strs": [token_text(service.tokenizer, token) for token in tokens]}, headers
        )

    @app.post("/detokenize", response_model=None)
    async def detokenize(request: DetokenizeRequest) -> Response:
        check_tokens(request.tokens, service.tokenizer)
        return await _write(lambda: {"prompt": service.tokenizer.decode(request.tokens)})


def _add_status_routes(app: FastAPI, service: Service, defaults: dict[str, Any]) -> None:
    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """For lm-eval's remote tokenizer (same name and form as in vLLM)."""
        return {**NAMED_TOKENS, "vocab_size": service.tokenizer.get_vocab_size()}

    no_key: dict[str, Any] = {"security": []}  # as guard.OPEN_PATHS says

    @app.head("/health", include_in_schema=False)
    @app.get("/health", openapi_extra=no_key)
    async def health() -> JSONResponse:
        status = "failed" if not service.is_healthy else "ok" if service.is_ready else "compiling"
        body = {"status": status, "ready": status == "ok", "model": service.model_name, "defaults": defaults}
        return JSONResponse(body, status_code=503 if status == "failed" else 200)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return service.stats()

    @app.get("/metrics", response_class=PlainTextResponse, openapi_extra=no_key)
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
    """Raise RequestError 404 for a model that is not served here; no name, or "nanochat", means the served one."""
    if name and name not in (service.model_name, "nanochat"):
        raise RequestError(
            f"the model {name[:100]!r} does not exist here; this server has {service.model_name!r}",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip


async def _render(service: Service, request: ChatRequest) -> tuple[list[int], int]:
    """(prompt, turns dropped): the conversation's tokens, trimmed at turns so that an answer fits into the context."""
    _check_model(service, request.model)
    room = prompt_room(service.context, request.limit)

    def render() -> tuple[list[int], int]:
        kept, dropped = trim_conversation(request.conversation(), service.tokenizer, room)
        return service.tokenizer.render_for_completion(kept), dropped

    try:
        return await asyncio.to_thread(render)
    except NanochatError as error:
        message = f"{context_limit(service.context)}, and {error}"
        raise RequestError(message, param="messages", code="context_length_exceeded") from None


def _report_dropped(dropped: int) -> tuple[dict[str, int], dict[str, str]]:
    """How a reply reports dropped turns: (under the key "nanochat", in its headers)."""
    return ({"dropped_turns": dropped}, {"X-Nanochat-Dropped-Turns": str(dropped)}) if dropped else ({}, {})


def _submit_chat(service: Service, request: ChatRequest, prompt: list[int]) -> Ticket:
    room = service.context - len(prompt)
    tokens = room if request.limit is None else min(request.limit, room)
    check_logprobs(request.n or 1, tokens, request.num_logprobs)
    check_tokens([int(token) for token in request.logit_bias or ()], service.tokenizer, "logit_bias")
    params = [request.params(i, request.limit, request.num_logprobs) for i in range(request.n or 1)]
    return service.submit([Sequence(prompt, p) for p in params])


async def _write(
    make: Callable[[], dict[str, Any]], headers: dict[str, str] | None = None, pool: Executor | None = None
) -> Response:
    """Make and serialize the reply in a thread, by default one of those that also render prompts."""
    return await asyncio.get_running_loop().run_in_executor(pool, lambda: JSONResponse(make(), headers=headers))


async def _wait_until_done(ticket: Ticket, http: Request) -> None:
    """Wait for the answer; if the client goes away, free its texts at once."""

    async def wait() -> None:
        async for _ in ticket.updates():
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


# ----------------------------------------------------------------------------- pages and errors


class FreshFiles(StaticFiles):
    """Makes browsers revalidate files each time, so that a page never runs with scripts of another version."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _add_pages(app: FastAPI) -> None:
    folder = Path(__file__).with_name("ui")
    app.mount("/ui", FreshFiles(directory=folder), name="ui")

    def page(path: str, name: str) -> None:
        @app.api_route(path, methods=["GET", "HEAD"], response_class=FileResponse, include_in_schema=False)
        async def show() -> FileResponse:
            return FileResponse(folder / name, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    page("/", "index.html")
    page("/runs", "runs.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return Response(status_code=204)


def _base_url(request: Request) -> str:
    """Of OpenAI's API, as the client of a request reaches this server."""
    return f"{str(request.base_url)[:200]}v1"


def _add_error_handlers(app: FastAPI) -> None:
    """Report every error in OpenAI's form, with one clear sentence."""

    @app.exception_handler(RequestError)
    async def request_error(_: Request, error: RequestError) -> JSONResponse:
        # OpenAI's clients try a 504 again by themselves: it would take as long, and as much computing, each time.
        headers = {429: {"Retry-After": "2"}, 504: {"X-Should-Retry": "false"}}.get(error.status)
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return await request_error(_, explain(list(error.errors()), error.body))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        asked, message = f"{request.method} {request.url.path[:100]}", str(error.detail)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{request.url.path[:100]} takes {allowed}, not {request.method}: /docs lists everything"
        if error.status_code == 404 and request.url.path.startswith("/v1/") and not request.url.path.endswith(OPENAI_PATHS):
            message = f"{asked} is not offered here: /docs lists what is"
        elif error.status_code == 404:
            message = (
                f"there is no {asked} here: OpenAI's API has the base URL {_base_url(request)}, and /docs lists everything"
            )
        body = RequestError(message, status=error.status_code).body()
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:  # starlette logs it with its trace
        headers = {"X-Request-Id": request.scope["request_id"].decode()}  # here, for this reply does not pass the guard
        body = RequestError("the server failed: see its log", status=500).body()
        return JSONResponse(body, status_code=500, headers=headers)
