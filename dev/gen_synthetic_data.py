"""Generates conversations about the model itself with another model: python -m dev.gen_synthetic_data --facts facts.toml

Works with any endpoint that has OpenAI's API: a hosted one, or one on this machine (`python -m scripts.chat_web`). Each
conversation follows a plan of topic, persona, style, first message and language, drawn from --seed and its number, so that
many conversations about few facts still differ. Malformed, truncated and nearly identical conversations are dropped. Writes a
JSONL file for tasks/customjson.py; if it is started again, it continues. Needs the extra `synthetic`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import NanochatError, run_command
from nanochat.files import append_json_lines, atomic_write, read_jsonl
from nanochat.progress import Progress
from nanochat.settings import Arguments, SettingsParser, tomllib

Messages = list[dict[str, str]]

# The choices for plans. A TOML file of facts may replace each of these lists with its own list of the same name.
CHOICES: dict[str, tuple[str, ...]] = {
    "topics": (
        "what the assistant is called", "who made it and why", "how it was trained", "what it is good at", "what it is bad at",
        "how large it is compared with well-known models", "whether it is a person", "whether it has feelings",
        "whether it remembers earlier conversations", "whether it can look things up", "whether its answers can be trusted",
        "which languages it speaks", "what its licence allows", "where its source code is", "what hardware it runs on",
        "how it differs from other assistants", "whether it is another, famous assistant", "what its name means",
        "how a user could train such a model", "what it costs to train or run", "whether it learns from this conversation",
        "who is responsible for what it says", "small talk that turns to who is speaking", "a greeting and nothing more",
        "a task it does well, after which the user asks who did it", "a false claim about the assistant, to be set right",
    ),
    "personas": (
        "a curious child", "a retired teacher", "a sceptical engineer", "a student in a hurry", "a journalist",
        "someone who has never used a chatbot", "a researcher of language models", "a bored office worker",
        "a friendly neighbour", "a developer who tests the system", "a novelist looking for ideas",
        "a parent who worries about privacy", "someone who learns the language and makes small mistakes",
        "a hobbyist with a home computer", "a philosopher", "a lawyer who wants exact answers", "a night-shift nurse",
        "a shop owner",
    ),
    "styles": (
        "plain and short", "warm and chatty", "formal", "all in lower case, without punctuation",
        "terse, a few words a message", "long-winded", "playful, with a joke", "with typing mistakes on the user's side",
        "blunt", "very polite", "full of questions", "thoughtful", "excited", "dry and precise",
    ),
    "first_messages": (
        "Hi!", "Hello, who is this?", "hey", "Good morning.", "Who are you?", "What are you?", "Tell me about yourself.",
        "Am I talking to a human?", "What can you do?", "Can you help me with something?", "I have a question.",
        "Who made you?", "Where do you come from?", "Are you ChatGPT?", "which model is this", "Introduce yourself, please.",
        "How do you work?", "What makes you different?", "I read about you.", "Is this thing on?", "Do you have a name?",
        "Why should I use you?", "How big are you?", "You there?", "What's your story?", "Test.", "I was told to talk to you.",
        "Can I trust what you say?", "How were you trained?", "Do you remember me?", "Thanks for earlier!",
        "Explain yourself.",
    ),
    "languages": ("English",) * 12 + ("German", "French", "Spanish", "Italian", "Portuguese", "Chinese", "Hindi", "Japanese"),
}  # fmt: skip
MAX_TURNS = 4  # questions in one conversation that a plan may ask for
MAX_MESSAGES = 2 * MAX_TURNS + 4  # a model may go a little beyond the plan
MAX_CHARS = 4_000  # of one message
FAILURES_IN_A_ROW = 20  # then the endpoint or the model does not suit
SHINGLE = 5  # characters
HASHES = 128  # of a signature: similarity is estimated to within about 0.04


# ----------------------------------------------------------------------------- facts and plans


@dataclass(frozen=True)
class Facts:
    """What the conversations are about, and the lists that plans are drawn from."""

    text: str
    choices: dict[str, tuple[str, ...]] = field(default_factory=lambda: CHOICES)

    def fingerprint(self) -> str:
        return f"{zlib.crc32(json.dumps(asdict(self), sort_keys=True).encode()):08x}"


def read_facts(path: Path) -> Facts:
    """A text, or a TOML file: `facts` (a string or a list of strings), and lists that replace those of CHOICES.

    Raises NanochatError naming what is wrong in the file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise NanochatError(f"--facts {path} cannot be read ({error}): give a text or a TOML file in UTF-8") from error
    if path.suffix != ".toml":
        return Facts(_not_empty(text, path))
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise NanochatError(f"--facts {path} is not TOML ({error}): fix it, or name it .txt") from error
    if unknown := set(values) - {"facts", *CHOICES}:
        raise NanochatError(f"--facts {path} has {', '.join(sorted(unknown))}: known are facts, {', '.join(CHOICES)}")
    facts = values.pop("facts", "")
    for name, value in {**values, "facts": [facts] if isinstance(facts, str) else facts}.items():
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise NanochatError(f"--facts {path}: {name} must be a list of strings, and not empty")
    text = facts if isinstance(facts, str) else "\n".join(f"- {fact}" for fact in facts)
    return Facts(_not_empty(text, path), {**CHOICES, **{name: tuple(value) for name, value in values.items()}})


def _not_empty(text: str, path: Path) -> str:
    if not text.strip():
        raise NanochatError(f"--facts {path} says nothing: write a sentence or more about the model")
    return text.strip()


@dataclass(frozen=True)
class Plan:
    """What one conversation is asked to be; the same for the same seed, number and facts."""

    seed: int
    number: int
    topic: str
    persona: str
    style: str
    first_message: str
    language: str
    turns: int


def draw_plan(facts: Facts, seed: int, number: int) -> Plan:
    rng = random.Random(f"{seed} {number}")
    topic, persona, style, first, language = (
        rng.choice(facts.choices[name]) for name in ("topics", "personas", "styles", "first_messages", "languages")
    )
    return Plan(seed, number, topic, persona, style, first, language, turns=rng.randint(1, MAX_TURNS))


# ----------------------------------------------------------------------------- asking


class RejectedError(Exception):
    """A conversation that is not kept; its text is the reason, worded so that equal ones can be counted."""


RULES = (
    "Facts about the assistant:\n{facts}\n\nThe assistant says nothing about itself that these facts do not support; asked "
    "for more, it says that it does not know. It is helpful, honest and does not repeat the facts word for word."
)
WHOLE = (
    "Write one conversation between a user and the assistant.\nTopic: {topic}\nThe user: {persona}\nStyle: {style}\n"
    "Language of all messages: {language}\nThe user's first message is this, or the same in {language}, or a variation of it: "
    '"{first_message}"\nQuestions by the user: {turns}, each followed by the assistant\'s answer.\n\nReply with nothing but '
    'JSON: [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}, ...]'
)
ANSWER = "You are the assistant.\n{rules}\nAnswer in {language}."
ASK = (
    "You play the user of an assistant: {persona}. You want to know about: {topic}. Your style: {style}. Reply with nothing "
    "but your next message to the assistant, in {language}."
)


class Endpoint:
    """A model behind OpenAI's API. Requests that get 408, 409, 429 or 5xx, or no reply, are repeated, ever later."""

    def __init__(self, args: Arguments) -> None:
        import openai

        key = args.api_key or os.environ.get("OPENAI_API_KEY") or "none"  # a local server asks for none
        self.client = openai.AsyncOpenAI(base_url=args.base_url, api_key=key, max_retries=args.retries, timeout=args.timeout)
        self.model, self.temperature, self.max_tokens = args.model, args.temperature, args.max_tokens

    async def reply(self, messages: list[dict[str, str]]) -> str:
        """The model's text. Raises RejectedError if there is none, NanochatError if there will be none to any request."""
        import openai

        try:
            if not self.model:
                self.model = (await self.client.models.list()).data[0].id
            limit = {"max_tokens": self.max_tokens} if self.max_tokens else {}
            request: dict[str, Any] = {"model": self.model, "messages": messages, "temperature": self.temperature, **limit}
            choice = (await self.client.chat.completions.create(**request)).choices[0]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise NanochatError(f"{self.client.base_url} refuses the key: give --api-key or set OPENAI_API_KEY") from error
        except openai.NotFoundError as error:
            raise NanochatError(f"{self.client.base_url} has no model {self.model!r}: check --base-url and --model") from error
        except openai.APITimeoutError as error:
            raise RejectedError("no reply in time: give a larger --timeout or a smaller --concurrency") from error
        except openai.APIConnectionError as error:
            raise NanochatError(
                f"{self.client.base_url} does not answer ({error}): check --base-url, or give the same command later to go on"
            ) from error
        except openai.APIStatusError as error:
            raise RejectedError(f"HTTP {error.status_code}: {error.message[:200]}") from error
        except (openai.APIError, json.JSONDecodeError, AttributeError, LookupError, TypeError) as error:
            raise RejectedError("the reply is not one of OpenAI's API") from error
        if choice.finish_reason == "length":
            raise RejectedError("cut off: give a larger --max-tokens, or shorter facts")
        if not isinstance(choice.message.content, str) or not choice.message.content.strip():
            raise RejectedError("the reply is empty")
        return choice.message.content.strip()


async def ask_whole(endpoint: Endpoint, facts: Facts, plan: Plan) -> Messages:
    """A conversation from one reply."""
    system = f"You write conversations from which an assistant learns who it is.\n{RULES.format(facts=facts.text)}"
    reply = await endpoint.reply(
        [{"role": "system", "content": system}, {"role": "user", "content": WHOLE.format(**asdict(plan))}]
    )
    return check_conversation(find_json(reply))


async def ask_by_turns(endpoint: Endpoint, facts: Facts, plan: Plan) -> Messages:
    """A conversation message by message, the model in both roles: for models that cannot write a whole one as JSON."""
    assistant = ANSWER.format(rules=RULES.format(facts=facts.text), language=plan.language)
    user = ASK.format(**asdict(plan))
    messages: Messages = [{"role": "user", "content": plan.first_message}]
    while True:
        answer = await endpoint.reply([{"role": "system", "content": assistant}, *messages])
        messages.append({"role": "assistant", "content": answer})
        if len(messages) >= 2 * plan.turns:
            return check_conversation(messages)
        # To the model that plays the user, the assistant's messages are those that it is sent.
        swapped = [{"role": {"user": "assistant", "assistant": "user"}[m["role"]], "content": m["content"]} for m in messages]
        opening = [{"role": "system", "content": user}, {"role": "user", "content": "(begin)"}]
        messages.append({"role": "user", "content": await endpoint.reply([*opening, *swapped])})


# ----------------------------------------------------------------------------- checking


def find_json(text: str) -> Any:
    """The first list or object of a reply, which may stand in a fence or among words. Raises RejectedError."""
    for match in re.finditer(r"[\[{]", text):
        try:
            return json.JSONDecoder().raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):  # also a number or a nesting that has no end
            continue
    raise RejectedError("the reply holds no JSON")


def check_conversation(value: Any) -> Messages:
    """A list of messages, or {"messages": that list}, with white space trimmed. Raises RejectedError for anything else."""
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RejectedError("the reply is no list of messages")
    if not 2 <= len(messages) <= MAX_MESSAGES or len(messages) % 2:
        raise RejectedError(f"not an even number of messages, at most {MAX_MESSAGES}")
    checked = []
    for message, role in zip(messages, itertools.cycle(("user", "assistant")), strict=False):
        content = message.get("content")
        if message.get("role") != role:
            raise RejectedError("user and assistant do not take turns")
        if not isinstance(content, str) or not 1 <= len(content.strip()) <= MAX_CHARS:
            raise RejectedError(f"a message is empty, no text or longer than {MAX_CHARS} characters")
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise RejectedError("a message holds half a character")
        checked.append({"role": role, "content": content.strip()})
    return checked


class Signatures:
    """MinHash signatures of conversations, each compared with all before it (Broder 1997, over runs of 5 characters)."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._factors, self._offsets = rng.integers(1, 2**31 - 1, (2, HASHES, 1), dtype=np.uint64)
        self._rows = np.empty((64, HASHES), np.uint32)
        self.similarities: list[float] = []  # of each to the most similar before it, 0 to 1

    def similarity(self, messages: Messages) -> tuple[float, np.ndarray]:
        """(its largest Jaccard similarity to one that was added, by runs of characters, its signature)."""
        text = " ".join(message["content"] for message in messages).casefold()
        shingles = {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}
        hashes = np.array([zlib.crc32(shingle.encode()) >> 1 for shingle in shingles], np.uint64)  # below 2**31
        signature = ((self._factors * hashes + self._offsets) % (2**31 - 1)).min(axis=1).astype(np.uint32)
        known = self._rows[: len(self.similarities)]
        return (float((known == signature).mean(axis=1).max()) if len(known) else 0.0), signature

    def add(self, similarity: float, signature: np.ndarray) -> None:
        if len(self.similarities) == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[len(self.similarities)] = signature
        self.similarities.append(similarity)


# ----------------------------------------------------------------------------- the file


class Conversations:
    """The conversations kept so far, in the file and in memory."""

    def __init__(self, path: Path, facts: Facts, max_similarity: float) -> None:
        """Raises NanochatError if the file is not of this command, or was made with other facts."""
        self.path, self.facts, self.max_similarity = path, facts, max_similarity
        self.signatures = Signatures()
        self.rows: list[dict[str, Any]] = []
        self.rejected: Counter[str] = Counter()
        if path.exists():
            remove_cut_line(path)
            for row in read_jsonl(path):
                plan = row.get("plan") if isinstance(row, dict) else None
                if not isinstance(plan, dict) or "number" not in plan:
                    raise NanochatError(f"{path} holds conversations that this command did not make: give another --output")
                if plan["facts"] != facts.fingerprint():
                    raise NanochatError(f"{path} was made with other facts: give those, or another --output")
                self.signatures.add(*self.signatures.similarity(row["messages"]))
                self.rows.append(row)

    def numbers(self, seed: int) -> set[int]:
        """The numbers of the plans of that seed whose conversations are kept."""
        return {row["plan"]["number"] for row in self.rows if row["plan"]["seed"] == seed}

    def keep(self, messages: Messages, plan: Plan) -> None:
        """Raises RejectedError if it is nearly the same as one before."""
        similarity, signature = self.signatures.similarity(messages)
        if similarity >= self.max_similarity:
            raise RejectedError("nearly the same as another")
        row = {"messages": messages, "plan": {**asdict(plan), "facts": self.facts.fingerprint()}}
        append_json_lines(self.path, [row])
        self.signatures.add(similarity, signature)
        self.rows.append(row)


def remove_cut_line(path: Path) -> None:
    """A crash while a line was written left a part of it, which no reader of JSONL accepts."""
    complete, newline, last = path.read_bytes().rpartition(b"\n")
    try:
        json.loads(last or b"0")
    except ValueError:
        if last[:12] == b'{"messages":'[: len(last)]:  # not of a file that somebody else wrote
            atomic_write(path, complete + newline)


def describe_diversity(conversations: Conversations) -> Iterator[str]:
    """Lines that say how much the conversations differ."""
    rows = conversations.rows
    messages = [message for row in rows for message in row["messages"]]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    firsts = [row["messages"][0]["content"] for row in rows]
    pairs = [pair for message in messages for pair in itertools.pairwise(re.findall(r"\w+", message["content"].casefold()))]
    openings = [" ".join(answer.casefold().split()[:3]) for answer in answers]
    similarities = np.array(conversations.signatures.similarities)
    length = sum(len(message["content"]) for message in messages) / len(messages)
    yield f"{len(rows)} conversations, {len(messages) / len(rows):.1f} messages each, of {length:.0f} characters"
    distinct = {"first messages": firsts, "answers": answers, "beginnings of answers": openings, "pairs of words": pairs}
    yield "share that is different: " + ", ".join(f"{_distinct(values)} of {name}" for name, values in distinct.items())
    common, times = Counter(openings).most_common(1)[0]
    yield f'most frequent beginning of an answer: "{common}", {times / len(answers):.0%}'
    yield f"similarity to the nearest one before: median {np.median(similarities):.2f}, highest {similarities.max():.2f}"
    for name in ("language", "topic", "persona", "style"):
        counts = Counter(row["plan"][name] for row in rows).most_common()
        (most, n), (least, m) = counts[0], counts[-1]
        yield f"{name}: {len(counts)} different, from {m} ({least}) to {n} ({most})"


def _distinct(values: list[Any]) -> str:
    return f"{len(set(values)) / max(1, len(values)):.0%}"


# ----------------------------------------------------------------------------- the command


async def generate(endpoint: Endpoint, conversations: Conversations, args: Arguments) -> None:
    """Ask until the file holds `args.number` conversations. Raises NanochatError if too many in a row are rejected."""
    ask = ask_by_turns if args.by_turns else ask_whole
    done = conversations.numbers(args.seed)
    plans = (draw_plan(conversations.facts, args.seed, n) for n in itertools.count() if n not in done)
    failures = 0  # in a row

    async def work() -> None:
        nonlocal failures
        while len(conversations.rows) < args.number:
            plan = next(plans)
            try:
                messages = await ask(endpoint, conversations.facts, plan)
                if len(conversations.rows) < args.number:  # others may have filled it meanwhile
                    conversations.keep(messages, plan)
                    progress.update(len(conversations.rows), f"rejected {conversations.rejected.total():,}")
                failures = 0
            except RejectedError as error:
                conversations.rejected[str(error)] += 1
                failures += 1
                if failures >= max(FAILURES_IN_A_ROW, 2 * args.concurrency):
                    raise NanochatError(
                        f"{failures} conversations in a row were rejected, the last because: {error}; the "
                        f"{len(conversations.rows)} kept are in {conversations.path}"
                    ) from error

    with Progress("synthetic", args.number, "conversation", start=len(conversations.rows)) as progress:
        workers = [asyncio.create_task(work()) for _ in range(args.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await endpoint.client.close()


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Conversations about the model itself, written by another model.", examples=["%(prog)s --facts facts.toml -n 500"]
    )
    parser.add_argument("--facts", type=Path, required=True, help="what is true of the model: a text, or a .toml file")
    parser.add_argument("--output", type=Path, default=Path("identity.jsonl"), help="appended to")
    parser.add_argument("-n", "--number", type=int, default=1000, help="conversations in the file at the end")
    parser.add_argument("--seed", type=int, default=0, help="seed of the plans")
    parser.add_argument("--by-turns", action="store_true", help="a request for each message; for models that write no JSON")
    parser.add_argument("--max-similarity", type=float, default=0.6, help="drop what is more like an earlier one, 0 to 1")
    endpoint = parser.add_argument_group("endpoint")
    endpoint.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL") or "http://127.0.0.1:8000/v1",
                          metavar="URL", help="address of the API")  # fmt: skip
    endpoint.add_argument("--api-key", default=None, metavar="KEY", help="else the environment's OPENAI_API_KEY")
    endpoint.add_argument("--model", default=None, help="its name there (default: the first that the endpoint lists)")
    endpoint.add_argument("--temperature", type=float, default=1.0, help="sampling temperature")
    endpoint.add_argument("--max-tokens", type=int, default=0, help="limit for a reply (default: the endpoint's)")
    endpoint.add_argument("--concurrency", type=int, default=8, help="requests at once")
    endpoint.add_argument("--retries", type=int, default=6, help="for a request that gets 429, 5xx or no reply")
    endpoint.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="to wait for a reply")
    args = parser.parse_args(argv)
    if min(args.number, args.concurrency) < 1 or args.retries < 0 or not 0 < args.max_similarity <= 1:
        raise NanochatError("--number and --concurrency start at 1, --retries at 0, --max-similarity is above 0 and at most 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        conversations = Conversations(args.output, read_facts(args.facts), args.max_similarity)
        if len(conversations.rows) < args.number:
            asyncio.run(generate(Endpoint(args), conversations, args))
    except ModuleNotFoundError as error:
        raise NanochatError(f"the package {error.name} is missing: bash runs/setup.sh synthetic") from error
    for reason, times in conversations.rejected.most_common():
        print(f"rejected {times}: {reason}")
    for line in describe_diversity(conversations):
        print(line)
    print(f'written: {args.output}; fine-tune with: python -m scripts.chat_sft --tasks "{args.output},SmolTalk"')
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
