"""What tests share: a small corpus, a small tokenizer, a small model."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn

from nanochat.gpt import GPT, GPTConfig

SUBJECTS = ("the cat", "a small dog", "my old friend", "the teacher", "one quick fox", "her brother", "the king")
VERBS = ("sees", "likes", "follows", "finds", "calls", "remembers", "builds")
OBJECTS = ("a house", "the river", "some bread", "the blue book", "an answer", "his garden", "two stones")


def make_document(seed: int, sentences: int | None = None) -> str:
    """Sentences of a small grammar; the same for the same seed."""
    rng = random.Random(seed)
    count = sentences or rng.randrange(2, 30)
    return " ".join(
        f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.randrange(100)}." for _ in range(count)
    )


def write_corpus(folder: Path, documents: int = 200) -> Path:
    """A folder with train.jsonl and val.jsonl."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    for name, seeds in (("train", range(documents)), ("val", range(10_000, 10_000 + documents // 10))):
        lines = [json.dumps({"text": make_document(seed)}) for seed in seeds]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def make_model(seed: int = 0, **config: object) -> GPT:
    """A float32 model whose every matrix matters (a fresh one has zeros in its projections)."""
    settings = {
        "sequence_len": 512, "vocab_size": 300, "n_layer": 3, "n_head": 2, "n_kv_head": 2, "n_embd": 32,
        "window_pattern": "SSL", "bigrams": 2, **config,
    }  # fmt: skip
    model = GPT(GPTConfig(**settings))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    model.compute_dtype = torch.float32
    return model.eval()


@contextlib.contextmanager
def serve(app: Any) -> Iterator[int]:
    """Run an app on a free port of this machine, as scripts/chat_web does; yields the port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
