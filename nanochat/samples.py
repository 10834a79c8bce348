"""Samples of a model's text, for people to look at during training and in reports. Used by training scripts and base_eval."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from nanochat.dataset import Source
from nanochat.engine import Engine
from nanochat.sampling import SamplingParams
from nanochat.tokenizer import as_text
from nanochat.trimming import prompt_room, trim_prompt

if TYPE_CHECKING:
    from tasks.common import Task


def continue_openings(
    engine: Engine, source: Source, num_samples: int = 4, max_tokens: int = 48, temperature: float = 0.0
) -> list[dict[str, str]]:
    """The first words of a few validation documents, of text or of tokens, and how the model goes on."""
    tokenizer = engine.tokenizer
    documents = (document for _, document in itertools.islice(source.numbered("val"), num_samples))
    texts = (document if isinstance(document, str) else tokenizer.decode(document[:64].tolist()) for document in documents)
    openings = [tokenizer.encode(" ".join(text.split()[:6])) for text in texts]
    most = min(64, engine.model.config.sequence_len // 2)  # in a script without spaces, six "words" are whole paragraphs
    prompts = [[tokenizer.get_bos_token_id(), *opening[:most]] for opening in openings]
    rows = engine.complete(prompts, SamplingParams(temperature, max_tokens=max_tokens))
    return [
        {"prompt": tokenizer.decode(prompt[1:]), "text": tokenizer.decode(row.tokens)}
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def sample_answers(engine: Engine, task: Task, count: int = 4, max_tokens: int = 64) -> list[dict[str, str]]:
    """A task's first questions (one per kind in a mixture) with the model's greedy answers, as [{"prompt", "text"}]."""
    kinds = getattr(task, "tasks", [task])
    examples = (kind[i] for i in range(count) for kind in kinds if i < len(kind))
    chosen = itertools.islice(examples, max(count, len(kinds)))
    openings = [list(itertools.takewhile(lambda message: message["role"] != "assistant", e["messages"])) for e in chosen]
    most = prompt_room(engine.model.config.sequence_len, max_tokens, context_share=1)
    prompts = [trim_prompt(engine.tokenizer.render_for_completion({"messages": opening}), most) for opening in openings]
    rows = engine.complete(prompts, SamplingParams(0, max_tokens=max_tokens))
    return [
        {"prompt": as_text(opening[-1]["content"]), "text": engine.tokenizer.decode(row.tokens)}
        for opening, row in zip(openings, rows, strict=True)
    ]
