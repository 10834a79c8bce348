"""What tests share: a small corpus, a small model, a trainer of it, a server, waiting."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import uvicorn

from nanochat.checkpoint_manager import OPTIMIZER_FILE, load_checkpoint, read_tensors, verify_checkpoint
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.metrics import MetricsLog, read_metrics
from nanochat.passes import Batch
from nanochat.runs import step_dir
from nanochat.sampling import RowSettings
from nanochat.sequence import Sequence as Text
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import TrainConfig, Trainer

SUBJECTS = ("the cat", "a small dog", "my old friend", "the teacher", "one quick fox", "her brother", "the king")
VERBS = ("sees", "likes", "follows", "finds", "calls", "remembers", "builds")
OBJECTS = ("a house", "the river", "some bread", "the blue book", "an answer", "his garden", "two stones")

# What PyTorch, cuBLAS, Triton and CUDA raise where a device has no memory left.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    torch.AcceleratorError("CUDA error: out of memory"),
]


def make_document(seed: int, sentences: int | None = None) -> str:
    """Sentences of a small grammar; the same for the same seed."""
    rng = random.Random(seed)
    count = sentences or rng.randrange(2, 30)
    return " ".join(
        f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.randrange(100)}." for _ in range(count)
    )


DOCUMENTS = [make_document(seed) for seed in range(100)]


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """A file of its name's kind: lines, text between blank lines, or row groups of seven; its folder need not be there."""
    documents = list(documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": documents}), path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    else:
        path.write_text("\n\n".join(documents), encoding="utf-8")


def write_corpus(folder: Path, documents: int = 200) -> Path:
    """A folder with train.jsonl and val.jsonl."""
    for name, seeds in (("train", range(documents)), ("val", range(10_000, 10_000 + documents // 10))):
        write_documents(folder / f"{name}.jsonl", map(make_document, seeds))
    return folder


def write_program(path: Path, script: str) -> None:
    """A bash script that can be called, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def load_all(stage_dir: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """(weights, the optimizer's state, meta) of a step, each of its files verified."""
    weights, meta = load_checkpoint(stage_dir, step)
    directory = step_dir(stage_dir, step)
    verify_checkpoint(directory)
    return weights, read_tensors(directory, OPTIMIZER_FILE), meta


def logged(stage_dir: Path, name: str = "train/loss") -> list[float]:
    """A number's values in a stage's metrics, in the order in which they were logged."""
    return [row[name] for row in read_metrics(stage_dir / "metrics.jsonl") if name in row]


def write_gsm8k(folder: Path, questions: int) -> None:
    """A folder for --task-data, with questions of GSM8K's form to learn from."""
    rows = [{"question": f"How much is {i} and 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(questions)]
    (folder / "gsm8k").mkdir(parents=True)
    (folder / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


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


def make_engine(tokenizer: Tokenizer, sequence_len: int = 512, **options: Any) -> Engine:
    """With the model of `make_model`, for this tokenizer's tokens."""
    return Engine(make_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=sequence_len), tokenizer, **options)


def make_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Of a few tokens each, and one of a hundred."""
    texts = ["the cat", "my old friend likes some bread " * 20, "a", "one quick fox finds"]
    return [tokenizer.encode(text, prepend="<|bos|>") for text in texts]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference's norm over that of what is expected."""
    exact = expected.detach().cpu().double()
    return float((found.detach().cpu().double() - exact).norm() / exact.norm())


class RandomBatches:
    """Endless batches of 2 x 16 tokens, the same in every run."""

    def __init__(self) -> None:
        self.step = 0

    def __iter__(self) -> RandomBatches:
        return self

    def __next__(self) -> Batch:
        self.step += 1
        tokens = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(self.step))
        return tokens[:, :-1], tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        self.step = states[0]["step"]


def make_trainer(stage_dir: Path, **config: Any) -> Trainer:
    """Of a small model, which is not compiled; config: of TrainConfig, what is not as here."""
    settings = {"num_iterations": 6, "total_batch_size": 32, "warmup_steps": 0, "compile": False, **config}
    model, log = make_model(), MetricsLog(stage_dir, {})
    optimizer = model.setup_optimizer(weight_decay=0.2)
    return Trainer(model, optimizer, RandomBatches(), TrainConfig(**settings), stage_dir, log, meta={})


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
    """What condition() gives once it is true; the test fails, and says for what it waited, if that takes too long."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def serve(app: Any) -> Iterator[int]:
    """Run an app on a free port of this machine, as scripts/chat_web does; yields the port."""
    from nanochat.guard import CarefulProtocol  # here, since tests on a GPU need no server

    config = uvicorn.Config(app, port=0, http=CarefulProtocol, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def run_texts(engine: Engine, sequences: list[Text]) -> list[Text]:
    """Submit texts and compute until all have ended."""
    for sequence in sequences:
        engine.scheduler.submit(sequence)
    while any(sequence.finish_reason is None for sequence in sequences):
        if engine.scheduler.is_idle:
            engine.scheduler.wait(timeout_s=10)
        engine.scheduler.step()
    return sequences


def make_it_say(engine: Engine, monkeypatch: pytest.MonkeyPatch, script: list[int]) -> None:
    """Make the model say these tokens, however it is asked; after them, token 5."""
    said: dict[int, int] = {}

    def speak(logits: torch.Tensor, rows: RowSettings, uniform: list[float]) -> torch.Tensor:
        drawn = []
        for p in rows.params:
            n = said[p.seed] = said.get(p.seed, -1) + 1
            drawn.append(script[n] if n < len(script) and p.seed >= 1000 else 5)
        return torch.tensor(drawn)

    monkeypatch.setattr("nanochat.scheduler.sample", speak)


def calculator_call(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a call of the calculator."""
    special = tokenizer.encode_special
    return [special("<|python_start|>"), *tokenizer.encode(text), special("<|python_end|>")]
