"""OpenAI's chat and completion API as data: what requests may contain, and what replies and errors look like.

Extensions have vLLM's names (top_k, min_p, repetition_penalty); our own are under the key "nanochat". Used by server.py,
streams.py, service.py, guard.py and runs_api.py. Nothing here listens, waits or runs the model.
"""

from __future__ import annotations

import codecs
import itertools
import json
import time
import uuid
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanochat.sampling import SamplingParams
from nanochat.sequence import Sequence, TokenLogprob, joined_parts, spoken
from nanochat.tokenizer import IncrementalDecoder, Tokenizer

MAX_MESSAGES, MAX_PARTS = 2000, 500  # in a conversation; in a message
MAX_CHARS = 200_000  # in a message, a prompt or a whole conversation
MAX_TOKENS = 1 << 20
MAX_CHOICES = 64  # texts that one request may ask for
MAX_LOGPROBS = 20
MAX_BIASES = 1000
MAX_LOGPROB_VALUES = 1 << 19  # of a request, alternatives included: 35 MB of JSON, which take seconds to write

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
# Report only the first wrong item: errors for a million items would take seconds and a gigabyte.
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]


class RequestError(Exception):
    """A request that is not served: HTTP status, one sentence, the field at fault and OpenAI's code."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def explain(errors: list[dict[str, Any]], body: Any) -> RequestError:
    """One sentence for pydantic's errors about a body.

    Where several types are allowed, each one reports its own errors. Errors that are not about a wrong type say the most,
    then those nested deepest.
    """
    if errors[0]["type"] == "json_invalid":
        return RequestError("the body is not valid JSON")
    if isinstance(body, bytes):  # not declared as JSON
        return RequestError("send the body with Content-Type: application/json")
    telling = [error for error in errors if not error["type"].endswith("_type")]
    # A list of a million wrong items has a million errors.
    error = telling[0] if telling else max(errors[:1000], key=lambda error: len(_place(error, body)))
    where, message = ".".join(map(str, _place(error, body))), error["msg"].removeprefix("Value error, ")
    if body is None or not (where or telling):  # nothing, or a list or a text
        return RequestError('the body must be a JSON object, such as {"messages": [...]}')
    return RequestError(f"{where}: {message}" if where else message, param=where or None)


def _place(error: dict[str, Any], body: Any) -> list[str | int]:
    """Where in the body an error is: pydantic's path, without the names of alternative types that pydantic inserts."""
    value, place = {"body": body}, []
    for step in error["loc"]:
        is_key = isinstance(value, dict) and step in value
        is_index = isinstance(value, list) and isinstance(step, int)
        if is_key or is_index:
            value = value[step]
            place.append(step)
    missing = error["loc"][-1:] if error["type"] == "missing" and body is not None else ()
    return [*place[1:], *missing]


# ----------------------------------------------------------------------------- requests


class Part(BaseModel):
    """A part of a message: text, a calculator call, or its result."""

    type: Literal["text", "python", "python_output"]
    text: str = Field(max_length=MAX_CHARS)

    @model_validator(mode="before")
    @classmethod
    def _read_refusal(cls, part: Any) -> Any:
        """A refusal, as a message of OpenAI's models may hold it, is text here."""
        is_refusal = isinstance(part, dict) and part.get("type") == "refusal"
        return {"type": "text", "text": part.get("refusal")} if is_refusal else part


PartList = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class Extension(BaseModel):
    """Our extension of an answer: all its parts (`content` has only the text)."""

    parts: PartList


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_CHARS)] | PartList | None = None
    nanochat: Extension | None = None  # in an answer that a client sends back unchanged

    @model_validator(mode="after")
    def _refuse_silence(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is required, and may be null only in an answer of the assistant")
        return self

    def parts(self) -> list[dict[str, str]]:
        """The parts of our extension, unless their text is not `content`: a client edited it, or lost parts of a stream."""
        content = self.content if isinstance(self.content, list) else [Part(type="text", text=self.content or "")]
        whole = self.nanochat.parts if self.role == "assistant" and self.nanochat is not None else []
        if whole and (self.content is None or _text(whole) == _text(content)):
            content = whole
        return [part.model_dump() for part in content]


def _text(parts: list[Part]) -> str:
    return spoken([(part.text, part.type) for part in parts])


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class SamplingRequest(BaseModel):
    """What chat and completion requests share. Unsupported settings are refused, not ignored."""

    model_config = ConfigDict(extra="ignore")  # clients send fields that their users never see

    model: str | None = Field(None, max_length=500)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Any] | None = None  # checked below: pydantic would report each of a million wrong items

    @model_validator(mode="after")
    def _check_biases(self) -> SamplingRequest:
        biases = self.logit_bias or {}
        if len(biases) > MAX_BIASES:
            raise ValueError(f"logit_bias has {len(biases):,} tokens: name at most {MAX_BIASES}")
        for token, bias in biases.items():
            is_token = token.isascii() and token.isdecimal() and len(token) < 10
            if not (is_token and type(bias) in (int, float) and -100 <= bias <= 100):
                raise ValueError('logit_bias maps token ids to numbers from -100 to 100, such as {"17": -100}')
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, choice: int, max_tokens: int | None, logprobs: int | None, **more: Any) -> SamplingParams:
        """The settings of one of the requested texts; without a seed, one is taken from the clock."""
        seed = time.time_ns() if self.seed is None else self.seed
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-6),  # 0 means the likeliest token, too
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), float(bias)) for token, bias in (self.logit_bias or {}).items()),
            seed=seed + choice,
            max_tokens=max_tokens,
            stop=tuple([self.stop] if isinstance(self.stop, str) else self.stop or ()),
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
            **more,
        )


class ChatRequest(SamplingRequest):
    """The body of POST /v1/chat/completions, and of the public guide's POST /chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Any] | None = None
    functions: list[Any] | None = None  # the older name of tools
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _refuse_tools(self) -> ChatRequest:
        if self.tools or self.functions:
            raise ValueError("tools are not supported: the model has only its own calculator")
        if self.response_format and self.response_format.get("type") != "text":
            raise ValueError("response_format can only be text")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set it to true, or leave both out")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> dict[str, Any]:
        """The conversation for the tokenizer: roles alternate, neighbours of one role are joined, system text comes first.

        An opening greeting by the assistant is left out, because the model only knows conversations that the user begins.
        System text without a user's message becomes the user's. Raises RequestError if the messages are not a conversation.
        """
        if sum(len(part["text"]) for message in self.messages for part in message.parts()) > MAX_CHARS:
            raise RequestError(f"the conversation is longer than {MAX_CHARS:,} characters: begin a new one", param="messages")
        system: list[str] = []
        turns: list[dict[str, Any]] = []
        for message in self.messages:
            parts = message.parts()
            is_empty = not any(part["text"] for part in parts)
            if message.role in ("system", "developer"):
                system += [] if is_empty else ["".join(part["text"] for part in parts)]
            elif turns and turns[-1]["role"] == message.role:
                apart = [{"type": "text", "text": "\n\n"}] if any(part["text"] for part in turns[-1]["content"]) else []
                turns[-1]["content"] += [] if is_empty else [*apart, *parts]
            elif turns or message.role == "user":
                turns.append({"role": message.role, "content": parts})
        if system and all(message.role in ("system", "developer") for message in self.messages):
            turns, system = [{"role": "user", "content": [{"type": "text", "text": "\n\n".join(system)}]}], []
        if not turns or turns[-1]["role"] != "user":
            raise RequestError(
                "the last message must be the user's: add one, or send the text to be continued to /v1/completions",
                param="messages",
            )
        for turn in turns:
            if turn["role"] == "user":
                turn["content"] = "".join(part["text"] for part in turn["content"])
        first = [{"role": "system", "content": "\n\n".join(system)}] if system else []
        return {"messages": first + turns}


class CompletionRequest(SamplingRequest):
    """The body of POST /v1/completions."""

    prompt: (
        Annotated[str, Field(max_length=MAX_CHARS)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(max_length=MAX_CHARS)]], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[
            list[TokenIds],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _refuse_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported beyond n: ask for n texts and choose")
        if self.suffix:
            raise ValueError("suffix is not supported")
        if self.echo and self.stream:
            raise ValueError("echo is not supported with stream")
        return self

    def prompts(self, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
        """For each prompt: (tokens that begin with <|bos|>, whether that was added).

        Raises RequestError for ids outside the vocabulary.
        """
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts: list[Any] = [self.prompt] if single else list(self.prompt)
        bos, result = tokenizer.get_bos_token_id(), []
        for prompt in prompts:
            tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            check_tokens(tokens, tokenizer)
            added = not tokens or tokens[0] != bos
            result.append(([bos, *tokens] if added else list(tokens), added))
        return result


# ----------------------------------------------------------------------------- replies


class Reply:
    """The frame that all replies and chunks of one request share."""

    def __init__(self, kind: Literal["chat", "completion"], model: str, tokenizer: Tokenizer, include_usage: bool) -> None:
        self.kind, self.model, self.tokenizer, self.include_usage = kind, model, tokenizer, include_usage
        self.id = ("chatcmpl-" if kind == "chat" else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.extra: dict[str, Any] = {}  # under "nanochat"

    def _frame(self, object_name: str, **content: Any) -> dict[str, Any]:
        frame = {"id": self.id, "object": object_name, "created": self.created, "model": self.model, **content}
        return {**frame, "nanochat": self.extra} if self.extra else frame

    def chat(self, sequences: list[Sequence]) -> dict[str, Any]:
        """The whole reply to a chat request."""
        choices = [self.chat_choice(i, sequence) for i, sequence in enumerate(sequences)]
        return self._frame("chat.completion", choices=choices, usage=usage(sequences, 1))

    def completions(self, sequences: list[Sequence], echo: bool, added_bos: list[bool]) -> dict[str, Any]:
        """The whole reply to a completion request; added_bos: for each prompt, whether BOS was added."""
        n = len(sequences) // len(added_bos)
        choices = [self.completion_choice(i, sequence, echo, added_bos[i // n]) for i, sequence in enumerate(sequences)]
        return self._frame("text_completion", choices=choices, usage=usage(sequences, len(added_bos)))

    def chunk(self, choices: list[dict[str, Any]], total: dict[str, Any] | None = None) -> str:
        """One server-sent event. "usage" is included on request: null except in the last one, as with OpenAI."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        more = {"usage": total} if self.include_usage else {}
        return as_event(self._frame(name, choices=choices, **more))

    # ------------------------------------------------------------------------- choices

    def chat_choice(self, index: int, sequence: Sequence) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": spoken(sequence.pieces), "refusal": None}
        parts = joined_parts(sequence.pieces)
        if any(part["type"] != "text" for part in parts):
            message["nanochat"] = {"parts": parts}
        logprobs = None
        if sequence.params.logprobs is not None:  # without that of the stop token
            logprobs = self.chat_logprobs(sequence.logprobs[: sum(sequence.masks)])
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(sequence)}

    def chat_delta(
        self, index: int, sequence: Sequence, text: str | None, parts: list[dict[str, Any]], logprobs: list[TokenLogprob]
    ) -> dict[str, Any]:
        """What is new in a streamed answer; text None: only its end. parts: those that our extension adds."""
        last = text is None
        delta: dict[str, Any] = {} if last else {"content": text}
        if parts:
            delta["nanochat"] = {"parts": parts}
        content = self.chat_logprobs(logprobs) if sequence.params.logprobs is not None else None
        return {
            "index": index, "delta": delta, "logprobs": content,
            "finish_reason": finish_reason(sequence) if last else None,
        }  # fmt: skip

    def completion_choice(self, index: int, sequence: Sequence, echo: bool, added_bos: bool) -> dict[str, Any]:
        prompt = sequence.prompt[added_bos:] if echo else []
        echoed = self.tokenizer.decode(prompt)
        choice: dict[str, Any] = {"index": index, "text": echoed + spoken(sequence.pieces), "logprobs": None}
        choice["finish_reason"] = finish_reason(sequence)
        if sequence.params.logprobs is not None:
            tokens = sequence.tokens + ([] if sequence.stop_token is None else [sequence.stop_token])  # as vLLM does
            logprobs = aligned(sequence.logprobs, [*sequence.masks, 1][: len(tokens)])
            offsets = self._prompt_offsets(prompt) + TextOffsets(self.tokenizer, len(echoed)).of(tokens)
            if echo:
                first = [] if added_bos else [None]  # nothing precedes the first token, so it has no probability
                logprobs = [*first, *sequence.prompt_logprobs, *logprobs]
            choice["logprobs"] = self.completion_logprobs(logprobs, prompt + tokens, offsets)
        return choice

    def _prompt_offsets(self, prompt: list[int]) -> list[int]:
        """Where the tokens of an echoed prompt begin; its special tokens are spelled out."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        lengths = [len(decoder.decode(self.tokenizer.decode_bytes([token]))) for token in prompt]
        return list(itertools.accumulate(lengths, initial=0))[: len(prompt)]

    # ------------------------------------------------------------------------- log-probabilities

    def chat_logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        def described(token: int, logprob: float) -> dict[str, Any]:
            data = b"" if self.tokenizer.is_special(token) else self.tokenizer.decode_bytes([token])
            return {"token": token_text(self.tokenizer, token), "logprob": logprob, "bytes": list(data)}

        content = [
            {**described(entry.token, entry.logprob), "top_logprobs": [described(*pair) for pair in entry.top]}
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def completion_logprobs(
        self, logprobs: Iterable[TokenLogprob | None], tokens: list[int], offsets: list[int]
    ) -> dict[str, list[Any]]:
        """The older format: parallel lists over the tokens."""
        texts = [token_text(self.tokenizer, token) for token in tokens]
        top = [
            None if entry is None else {token_text(self.tokenizer, token): value for token, value in entry.top}
            for entry in logprobs
        ]
        values = [None if entry is None else entry.logprob for entry in logprobs]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def as_event(content: dict[str, Any]) -> str:
    """One server-sent event that carries JSON."""
    return f"data: {json.dumps(content)}\n\n"


class TextOffsets:
    """Where an answer's tokens begin in the shown text, in characters; calculator calls have no length.

    Tokens removed by a stop text are placed where they would have been shown.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._decoder, self._end = IncrementalDecoder(tokenizer), start

    def of(self, tokens: list[int]) -> list[int]:
        """Where each of the next tokens begins in the text, in characters."""
        places = []
        for token in tokens:
            places.append(self._end)
            part, text = self._decoder.part, self._decoder.feed(token)
            self._end += len(text) if part == "text" else 0
        return places


def aligned(logprobs: list[TokenLogprob], masks: list[int]) -> list[TokenLogprob | None]:
    """The log-probabilities of each token, None for those that a tool forced."""
    sampled = iter(logprobs)
    return [next(sampled, None) if mask else None for mask in masks]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token, or its bytes if they are not whole characters, spelled as OpenAI does."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finish_reason(sequence: Sequence) -> str:
    """OpenAI's word for how a text ended: a full context and a server shutdown count as "length", like max_tokens."""
    return "stop" if sequence.finish_reason == "stop" else "length"


def usage(sequences: list[Sequence], prompts: int) -> dict[str, Any]:
    """Tokens that were read and written; a prompt counts once, however many samples it has."""
    samples = max(1, len(sequences) // prompts)
    read = sum(len(sequence.prompt) for sequence in sequences[::samples])
    written = sum(len(sequence.tokens) for sequence in sequences)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(sequence.cached_tokens for sequence in sequences[::samples])},
    }


def check_tokens(tokens: list[int], tokenizer: Tokenizer, param: str = "prompt") -> None:
    """Raise RequestError for ids outside the vocabulary."""
    if tokens and max(tokens) >= tokenizer.get_vocab_size():
        raise RequestError(f"token {max(tokens)} is outside the vocabulary of {tokenizer.get_vocab_size()}", param=param)


def context_limit(tokens: int) -> str:
    """How errors about the context begin: programs such as litellm know them by OpenAI's words."""
    return f"this model's maximum context length is {tokens} tokens"


def check_prompt(tokens: list[int], limit: int) -> None:
    """Raise RequestError if a prompt leaves no room for an answer."""
    if len(tokens) >= limit:
        raise RequestError(
            f"{context_limit(limit)}, and the prompt alone has {len(tokens)}: shorten it",
            param="prompt",
            code="context_length_exceeded",
        )


def check_logprobs(texts: int, tokens: int, top: int | None) -> None:
    """Raise RequestError if texts of so many tokens have more log-probabilities than a reply should hold; top: for each."""
    if top is not None and texts * tokens * (1 + top) > MAX_LOGPROB_VALUES:
        raise RequestError(
            f"log-probabilities of {texts} x {tokens:,} tokens with {top} alternatives are more than {MAX_LOGPROB_VALUES:,} "
            "values: ask for fewer texts, tokens (max_tokens) or alternatives",
            param="logprobs",
        )
