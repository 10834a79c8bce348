"""Fixtures that every test may use: a base directory of its own, the real data, and one tiny trained run."""

from __future__ import annotations

import gc
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

from nanochat import builtin_corpus, stopping
from nanochat.checkpoint_manager import load_model
from nanochat.common import find_test_data
from nanochat.engine import Engine
from nanochat.pace import TimeLimit
from nanochat.tokenizer import Tokenizer
from tests.helpers import make_document, write_corpus
from tests.many_ranks import Ranks, stop_all
from tests.nursery import ROOT, Nursery

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

pytest_plugins = ["tests.recovery_helpers", "tests.page_helpers"]  # their fixtures, for several files

# What a loaded machine takes long for is no error. The rest stays as it is, here or, repeatable, in continuous integration.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run on a CPU, too (test_kernels.py)

TINY_TRAINING = [
    "--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=128", "--total-batch-size=512",
    "--num-iterations=6", "--device-type=cpu", "--no-compile", "--eval-tokens=512", "--sample-every=-1",
    # Gently: its answers begin with text and not with a call of the calculator.
    "--matrix-lr=0.0126", "--embedding-lr=0.19", "--unembedding-lr=0.005", "--scalar-lr=0.32", "--weight-decay=0",
    "--set", "bigrams=1",
]  # fmt: skip
TINY_TUNING = [
    "--tasks=Arithmetic:60,Identity:40", "--num-iterations=4", "--no-compile", "--device-type=cpu", "--model-tag=tiny",
    "--eval-tokens=512", "--save-every=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test writes below its own NANOCHAT_BASE_DIR, so tests run in parallel and leave nothing behind."""
    path = tmp_path / "nanochat"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path


@pytest.fixture(autouse=True)
def _no_full_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each training they took a fifth of the time of three files of tests; what they do is in test_stopping.py."""
    monkeypatch.setattr(stopping, "collect_garbage", gc.freeze)


@pytest.fixture(autouse=True)
def _small_builtin_corpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builtin corpus from a few of the standard library's modules, unless a test is marked whole_corpus."""
    if "whole_corpus" not in request.keywords:
        library = Path(sysconfig.get_paths()["stdlib"])
        names = [
            path.relative_to(library) for part in ("email", "asyncio", "logging") for path in (library / part).glob("*.py")
        ]
        files = [(str(library / name), ".".join(name.with_suffix("").parts)) for name in sorted(names)]
        monkeypatch.setattr(builtin_corpus, "find_source_files", lambda: files)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real texts and tasks; the test is skipped where it is absent."""
    path = find_test_data()
    if path is None:
        pytest.skip("real data is absent: set NANOCHAT_TEST_DATA to its folder")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """512 tokens learned from the small grammar."""
    return Tokenizer.train((make_document(seed) for seed in range(300)), 400)


@pytest.fixture
def tokenizer_in_place(tokenizer: Tokenizer, base_dir: Path) -> None:
    """The default one of this test's base directory, so that training need not make one."""
    tokenizer.save(base_dir / "tokenizers" / "default")


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    if not hasattr(os, "fork"):
        pytest.skip("programs are forked, which this system cannot")
    nursery = Nursery(tmp_path_factory.mktemp("lives"))
    yield nursery
    nursery.close()


@pytest.fixture
def many_ranks(nursery: Nursery, tokenizer_in_place: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Ranks with float32, a core each, the checkout, a tokenizer; none of them outlives the test."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ranks = Ranks(nursery)
    yield ranks
    ranks.stop()
    stop_all()


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of reports are not drawn, which takes most of a report's time: for tests of its text."""

    def save_nothing(figure: object, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()

    monkeypatch.setattr("nanochat.report.save_png", save_nothing)
    monkeypatch.setattr("nanochat.report.to_svg", lambda figure, description: "<svg></svg>")


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails to be fetched is tried again at once."""
    monkeypatch.setattr("nanochat.shard_cache.RETRY_WAITS_S", (0.0, 0.0))


@pytest.fixture
def planned_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs by time do as many updates as planned, however slow the machine becomes."""
    monkeypatch.setattr(TimeLimit, "updates", lambda self, step, seconds, schedule: schedule.num_iterations)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def _tiny_base_dir(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: Tokenizer) -> Path:
    """A base directory with a tokenizer and a run "tiny" of which base and sft are done."""
    from scripts import base_train, chat_sft

    directory = tmp_path_factory.mktemp("tiny")
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(directory)
    try:
        tokenizer.save(directory / "tokenizers" / "default")
        assert base_train.main([*TINY_TRAINING, "--data", str(corpus), "--model-tag=tiny", "--save-every=3"]) == 0
        assert chat_sft.main(TINY_TUNING) == 0
    finally:
        if before is None:
            del os.environ["NANOCHAT_BASE_DIR"]
        else:
            os.environ["NANOCHAT_BASE_DIR"] = before
    return directory


@pytest.fixture
def tiny_run(_tiny_base_dir: Path, base_dir: Path) -> Path:
    """A copy of the tiny run in this test's base directory; returns the run's directory."""
    shutil.copytree(_tiny_base_dir, base_dir, dirs_exist_ok=True)
    return base_dir / "runs" / "tiny"


@pytest.fixture
def engine(tiny_run: Path) -> Engine:
    """With the tiny run's chat model."""
    model, tokenizer, _ = load_model("sft", "cpu", "eval", "tiny")
    return Engine(model, tokenizer)


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    """Of a server with that engine, or the one that a test's file has in its place."""
    from fastapi.testclient import TestClient  # here, since tests on a GPU need no server

    from nanochat.server import create_app

    with TestClient(create_app([engine], "tiny")) as client:
        yield client
