"""Streams answers as server-sent events while they are generated: OpenAI's chunks and the public guide's stream.

Used by server.py. openai_api.py makes the content of OpenAI's events.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from fastapi.responses import StreamingResponse

from nanochat.openai_api import (
    Reply,
    RequestError,
    TextOffsets,
    aligned,
    as_event,
    finish_reason,
    token_text,
    usage,
)
from nanochat.sequence import Parts, Sequence, TokenLogprob, spoken
from nanochat.service import Ticket
from nanochat.tokenizer import Tokenizer

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def stream(ticket: Ticket, events: AsyncIterator[str], headers: dict[str, str] | None = None) -> StreamingResponse:
    """The response that sends a ticket's events, which one of the generators below makes."""
    headers = {**HEADERS, **(headers or {})}
    return StreamingResponse(_until_left(ticket, events), media_type="text/event-stream", headers=headers)


async def _until_left(ticket: Ticket, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Turn a failure during a stream into its last event; if the client leaves, free its texts."""
    try:
        async for event in events:
            yield event
    except RequestError as error:
        yield as_event(error.body())
    finally:
        ticket.cancel()


# ----------------------------------------------------------------------------- what is new


class News(NamedTuple):
    """What is new in a text."""

    pieces: list[tuple[str, str]]
    tokens: list[int]
    logprobs: list[TokenLogprob | None]  # of the tokens; None if a tool forced the token or they were not requested
    last: bool


MAX_NEWS = 256  # tokens; with alternatives to each, what they are written as takes some hundredths of a second


class Reader:
    """A stream's position in one text. It reads much at once, so a slow client gets fewer, larger pieces."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence, self.parts = sequence, Parts()
        self.pieces = self.sampled = 0
        self.ended = self.has_called = False

    def read(self) -> News | None:
        """None if there is nothing new."""
        sequence, begin = self.sequence, self.pieces
        finished = sequence.finish_reason not in (None, "error")  # the ticket reports errors
        pieces = sequence.pieces[begin : begin + MAX_NEWS]
        self.pieces += len(pieces)
        last = finished and self.pieces == len(sequence.pieces)
        if self.ended or not (pieces or last):
            return None
        self.ended = last
        tokens, masks = sequence.tokens[begin : self.pieces], sequence.masks[begin : self.pieces]
        logprobs = aligned(sequence.logprobs[self.sampled :], masks)
        self.sampled += sum(masks)
        return News(pieces, tokens, logprobs, last)

    def extension(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Which parts a chat chunk has besides its text: none before the first call, with which all that came before it come.

        So a client that joins them by their index, as OpenAI's does, has the same parts as in a reply that is not streamed.
        """
        if self.has_called or all(part["type"] == "text" for part in parts):
            return parts if self.has_called else []
        self.has_called = True
        return Parts().of(self.sequence.pieces[: self.pieces])

    def with_stop_token(self, news: News) -> tuple[list[int], list[TokenLogprob | None]]:
        """(tokens, log-probabilities) of a completion; the last news include the stop token."""
        stop_token = self.sequence.stop_token
        if not news.last or stop_token is None:
            return news.tokens, news.logprobs
        return [*news.tokens, stop_token], [*news.logprobs, *aligned(self.sequence.logprobs[self.sampled :], [1])]


async def _news(ticket: Ticket) -> AsyncIterator[tuple[int, Reader, News]]:
    """What is new in any of a request's texts, with the text's number, until all are done."""
    readers = [Reader(sequence) for sequence in ticket.sequences]
    async for _ in ticket.updates():
        for i, reader in enumerate(readers):
            while (news := reader.read()) is not None:
                yield i, reader, news


# ----------------------------------------------------------------------------- events


async def chat_chunks(ticket: Ticket, reply: Reply) -> AsyncIterator[str]:
    """Each answer begins with its role, before there is anything to read, and ends with its reason."""
    first = {"role": "assistant", "content": ""}
    for i in range(len(ticket.sequences)):
        yield reply.chunk([{"index": i, "delta": first, "logprobs": None, "finish_reason": None}])
    async for i, reader, news in _news(ticket):
        logprobs = [entry for entry in news.logprobs if entry is not None]
        if (parts := reader.parts.of(news.pieces)) or logprobs:
            yield reply.chunk([reply.chat_delta(i, reader.sequence, spoken(news.pieces), reader.extension(parts), logprobs)])
        if news.last:
            yield reply.chunk([reply.chat_delta(i, reader.sequence, None, [], [])])
    if reply.include_usage:
        yield reply.chunk([], usage(ticket.sequences, 1))
    yield "data: [DONE]\n\n"


async def completion_chunks(ticket: Ticket, reply: Reply, prompts: int) -> AsyncIterator[str]:
    """The text without calculator calls. prompts: how many the request has."""
    offsets = [TextOffsets(reply.tokenizer) for _ in ticket.sequences]
    async for i, reader, news in _news(ticket):
        text, content = spoken(news.pieces), None
        if reader.sequence.params.logprobs is not None:
            tokens, logprobs = reader.with_stop_token(news)
            content = reply.completion_logprobs(logprobs, tokens, offsets[i].of(tokens))
        if text or news.last or (content and content["tokens"]):
            reason = finish_reason(reader.sequence) if news.last else None
            yield reply.chunk([{"index": i, "text": text, "logprobs": content, "finish_reason": reason}])
    if reply.include_usage:
        yield reply.chunk([], usage(ticket.sequences, prompts))
    yield "data: [DONE]\n\n"


async def guide_events(ticket: Ticket, tokenizer: Tokenizer, dropped: int) -> AsyncIterator[str]:
    """Text by the type of its part; with logprobs also every token, its probability and the alternatives."""
    (sequence,) = ticket.sequences
    if dropped:
        yield as_event({"dropped_turns": dropped})
    async for _, reader, news in _news(ticket):
        for part in reader.parts.of(news.pieces):
            yield as_event({"token": part.pop("text"), "part": part.pop("type"), **part})
        if news.tokens and sequence.params.logprobs is not None:
            tokens = [
                {
                    "text": token_text(tokenizer, token),
                    "logprob": entry and entry.logprob,
                    "top": [[token_text(tokenizer, other), value] for other, value in entry.top] if entry else [],
                }
                for token, entry in zip(news.tokens, news.logprobs, strict=True)
            ]
            yield as_event({"tokens": tokens})
        if news.last:
            yield as_event({"done": True, "finish_reason": sequence.finish_reason, "usage": usage([sequence], 1)})
