"""On an NVIDIA GPU every path computes what a CPU computes in float32, nothing in a step waits, and a run goes on exactly.

Skipped where there is no such GPU; the rest of the tests need none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat import block_attention, flash_attention
from nanochat.block_attention import QK_SCALE
from nanochat.checkpoint_manager import load_model, read_tensors
from nanochat.common import get_base_dir
from nanochat.compilation import can_compile
from nanochat.engine import Engine
from nanochat.flash_attention import AttentionPlan
from nanochat.fp8 import LOWEST_CAPABILITY, enable_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import AMPERE, HOPPER, choose_kernels
from nanochat.memory import training_bytes
from nanochat.passes import Passes, summed_loss
from nanochat.runner import prepare_for_inference
from nanochat.runs import list_steps, step_dir
from nanochat.sampling import RowSettings, SamplingParams, policy_logprobs, sample
from nanochat.sequence import Sequence
from nanochat.tokenizer import Tokenizer
from scripts import base_train, chat_eval, chat_rl, chat_sft
from tests.conftest import TINY_TRAINING
from tests.helpers import logged, make_model, make_prompts, relative_error
from tests.nursery import ROOT

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
    pytest.mark.slow,  # nearly all of them compile
]
GPU = torch.device("cuda", 0)
CONFIG = GPTConfig(512, vocab_size=500, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, window_pattern="SL", bigrams=2)


@pytest.fixture(autouse=True)
def _one_gpu() -> Iterator[None]:
    if can_compile(GPU) is not None:
        pytest.skip(f"nothing compiles here: {can_compile(GPU)}")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


# ----------------------------------------------------------------------------- attention


BACKENDS = {
    "flex": (flash_attention.attend_flex, flash_attention.flex_mask),
    "plain": (block_attention.attend_plain, block_attention.plain_mask),
    "flash_attn_interface": (flash_attention.attend_fa3, flash_attention.no_mask),
    "flash_attn.cute": (flash_attention.attend_fa4, flash_attention.no_mask),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "window", "kv_heads", "D"), [(512, 128, 2, 64), (300, 100, 1, 128), (257, 1000, 2, 64)])
def test_attention_equals_naive_masked_softmax(backend: str, T: int, window: int, kv_heads: int, D: int) -> None:
    if "flash_attn" in backend:
        pytest.importorskip(backend)
    generator = torch.Generator().manual_seed(T)
    inputs = [torch.randn(2, T, heads, D, generator=generator) for heads in (2, kv_heads, kv_heads)]
    inputs[:2] = [F.rms_norm(x, (D,)) * QK_SCALE for x in inputs[:2]]
    grad = torch.randn(2, T, 2, D, generator=generator)

    attend, make_mask = BACKENDS[backend]
    mine = [x.to(GPU, torch.bfloat16).requires_grad_() for x in inputs]
    result = attend(*mine, AttentionPlan(attend, window, make_mask(T, window, GPU)))
    grads = torch.autograd.grad(result, mine, grad.to(GPU, torch.bfloat16))

    exact = [x.requires_grad_() for x in inputs]
    q, k, v = (x.repeat_interleave(2 // x.size(2), dim=2).transpose(1, 2) for x in exact)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = (q @ k.mT * D**-0.5).masked_fill((distance < 0) | (distance > window), float("-inf"))
    expected = (scores.softmax(dim=-1) @ v).transpose(1, 2)
    assert relative_error(result, expected) < 0.01
    for found, naive in zip(grads, torch.autograd.grad(expected, exact, grad), strict=True):
        assert relative_error(found, naive) < 0.02


def test_the_chosen_attention_skips_what_a_window_hides() -> None:
    """Nobody trains on the slow backend unawares."""
    backend = flash_attention.choose_backend(torch.device("cuda", 0), torch.bfloat16, 128, True)
    assert backend.name in ("fa3", "fa4", "flex")


def test_our_kernels_are_chosen() -> None:
    """What they compute: test_kernels.py."""
    kernels, capability = choose_kernels(GPU, torch.bfloat16), torch.cuda.get_device_capability(GPU)
    assert (kernels.sort_ids is not None, kernels.heads is not None) == (capability >= AMPERE,) * 2
    assert (kernels.mlp is not None) == (capability == HOPPER)


# ----------------------------------------------------------------------------- training


def _pair() -> tuple[GPT, GPT]:
    """The same model on the CPU, in float32, and on the GPU."""
    exact, mine = (make_model(**CONFIG.__dict__).train() for _ in range(2))
    for model in (exact, mine):
        with torch.no_grad():
            for parameter in model.blocks.parameters():
                parameter.mul_(0.3)
    return exact, mine.to(GPU)


def _ids(rows: int = 4, seed: int = 0, T: int = 512) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (rows, T + 1), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_every_gradient(dtype: torch.dtype, compiled: bool) -> None:
    exact, mine = _pair()
    mine.compute_dtype = dtype
    if compiled:
        mine.compile()
    ids = _ids()
    losses = []
    for model, batch in ((exact, ids), (mine, ids.to(GPU))):
        losses.append(model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()))
        losses[-1].backward()
    fine = dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5 if fine else 5e-3)
    for (name, a), b in zip(exact.named_parameters(), mine.parameters(), strict=True):
        assert b.grad is not None
        assert relative_error(b.grad, a.grad) < (1e-3 if fine else 0.08), name


def test_an_update_moves_parameters_as_on_a_cpu() -> None:
    exact, mine = _pair()
    before = {name: p.detach().clone() for name, p in exact.named_parameters()}
    optimizers = [model.setup_optimizer() for model in (exact, mine)]
    for seed in range(3):
        ids = _ids(2, seed)
        exact(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        for a, b in zip(exact.parameters(), mine.parameters(), strict=True):
            b.grad = (a.grad.to_dense() if a.grad.is_sparse else a.grad).to(GPU)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(exact.named_parameters(), mine.parameters(), strict=True):
        assert relative_error(b.detach().cpu() - before[name], a.detach() - before[name]) < 0.1, name


@pytest.mark.parametrize("fp8", [False, True])
def test_it_learns_what_a_cpu_learns(fp8: bool) -> None:
    if fp8 and torch.cuda.get_device_capability(GPU) < LOWEST_CAPABILITY:
        pytest.skip("this GPU does not multiply in 8 bits")
    curves = []
    for device in (torch.device("cpu"), GPU):
        model = GPT(CONFIG)
        model.init_weights(0)
        model.to(device)
        model.compute_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        if device.type == "cuda":
            model.compile()
            assert not fp8 or enable_fp8(model, device)
        optimizer, losses = model.setup_optimizer(), []
        for _ in range(30):
            ids = _ids(2, T=256).to(device)
            loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1][0] == pytest.approx(curves[0][0], rel=0.01)
    assert curves[1][-1] < 0.6 * curves[1][0]
    assert curves[1][-1] == pytest.approx(curves[0][-1], abs=0.1 if not fp8 else 0.3)


def test_a_recorded_pass_gives_what_a_launched_one_gives() -> None:
    """With all blocks and with one, with more passes in an update and with fewer, and again and again."""
    model = _pair()[1]
    model.compute_dtype = None
    model.compile()
    batches = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in (_ids(seed=seed).to(GPU) for seed in range(3))]
    count = torch.tensor(1000, device=GPU)
    recorded, launched = Passes(model), Passes(model, lambda model, batch: summed_loss(model, batch))

    def gradients(passes: Passes, batches: list) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = passes.run(batches, count)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss, found

    for model.idle_blocks in (1, 0):
        for some in (batches, batches[1:], batches):
            (loss, found), (again, _), (expected_loss, expected) = (
                gradients(passes, some) for passes in (recorded, recorded, launched)
            )
            assert recorded._recording is not None
            assert torch.equal(loss, again)
            assert relative_error(loss, expected_loss.cpu()) < 1e-4
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                assert relative_error(gradient, expected[name].cpu()) < 0.01, name
    assert launched._recording is None


def test_passes_are_not_recorded_where_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_CUDA_GRAPHS", "0")
    model = _pair()[1]
    model.compile()
    ids, passes = _ids().to(GPU), Passes(model)
    passes.run([(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())], torch.tensor(1000, device=GPU))
    assert passes._recording is None


def test_nothing_in_a_step_waits_for_the_gpu() -> None:
    """So that the host is always ahead of it, and the GPU never idle."""
    model = _pair()[1]
    model.compute_dtype = None
    model.compile()
    optimizer = model.setup_optimizer()
    ids = _ids().to(GPU)

    def step() -> None:
        count = (ids[:, 1:] >= 0).sum()
        (model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), loss_reduction="sum") / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_counted_memory_is_what_training_takes() -> None:
    config = GPTConfig(sequence_len=1024, vocab_size=8192, n_layer=6, n_head=4, n_kv_head=4, n_embd=512, bigrams=2)
    model = GPT(config)
    model.init_weights(0)
    model.to(GPU).compile()
    optimizer = model.setup_optimizer()
    ids = torch.randint(8192, (8, 1024), device=GPU)
    for attempt in range(3):
        if attempt == 2:
            torch.cuda.reset_peak_memory_stats(GPU)
        model(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    # What is counted is an uncompiled pass's; a compiled one keeps less.
    assert 0.4 < torch.cuda.max_memory_allocated(GPU) / training_bytes(config, rows=8) < 1.05


# ----------------------------------------------------------------------------- generation


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    model = make_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=512).to(GPU)
    engine = Engine(model, tokenizer)
    engine.scheduler.stop_ids = set()
    return engine


@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_equals_plain_generation(engine: Engine, tokenizer: Tokenizer, compiled: bool) -> None:
    """With CUDA graphs and without, past the window, alone, among others, and several times."""
    assert not compiled or engine.compile() is None
    prompts = make_prompts(tokenizer)
    expected = [list(engine.model.generate(prompt, 60, temperature=0)) for prompt in prompts]
    assert [row.tokens for row in engine.complete(prompts, SamplingParams(0, max_tokens=60))] == expected
    assert [engine.complete([prompt], SamplingParams(0, max_tokens=60))[0].tokens for prompt in prompts] == expected
    three = engine.complete([prompt for prompt in prompts for _ in range(3)], SamplingParams(0, max_tokens=60))
    assert [row.tokens for row in three] == [tokens for tokens in expected for _ in range(3)]
    assert not compiled or engine.scheduler.runner._graphs


def test_what_is_forced_is_in_the_context(engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calculator's long answer is written step by step while nothing waits for the GPU, and read by what comes after."""
    assert engine.compile() is None
    special, seen = tokenizer.encode_special, []
    script = [special("<|python_start|>"), *tokenizer.encode("6*7"), special("<|python_end|>")]

    def speak(logits: torch.Tensor, rows: RowSettings, uniform: list) -> torch.Tensor:
        seen.append(logits[0].clone())
        return torch.tensor([[*script, 5][min(len(seen) - 1, len(script))]])

    monkeypatch.setattr("nanochat.scheduler.sample", speak)
    engine.scheduler.calculator = lambda expression: "42 " * 40
    prompt = make_prompts(tokenizer)[0]
    row = Sequence(prompt, SamplingParams(max_tokens=150))
    engine.run([row])
    known = [*prompt, *row.tokens[: row.tokens.index(special("<|output_end|>")) + 1]]
    expected = engine.model(torch.tensor([known], device=GPU))[0, -1]
    assert relative_error(seen[len(script)], expected.cpu()) < 1e-3


@pytest.mark.parametrize("vocab_size", [4096, 8192, 50257, 131072])
def test_what_is_drawn_depends_on_a_row_alone(vocab_size: int) -> None:
    """Sums of floats would not: a GPU adds up one row in another order than several."""
    logits = 3 * torch.randn(16, vocab_size, device=GPU)
    params = [SamplingParams(temperature=0.8, top_p=(1.0, 0.9)[i % 2], top_k=(0, 0, 50)[i % 3]) for i in range(16)]
    uniform = [(i + 0.5) / 16 for i in range(16)]
    settings = RowSettings(params, GPU)
    together = sample(logits, settings, uniform)
    logprobs = policy_logprobs(logits, settings, together)
    for rows in (slice(i, i + B) for B in (1, 2, 3, 8) for i in range(0, 16, B)):
        own = RowSettings(params[rows], GPU)
        assert torch.equal(sample(logits[rows], own, uniform[rows]), together[rows])
        assert torch.equal(policy_logprobs(logits[rows], own, together[rows]), logprobs[rows])


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_compiled_decoding_in_the_gpus_own_dtype(tokenizer: Tokenizer, weights: str) -> None:
    """As in float32 but for rounding, compiled or not, whatever a text's company."""
    inputs = list(range(32)), list(range(7, 39)), [60 + i for i in range(32)]

    def make_engine(device: torch.device, dtype: torch.dtype) -> Engine:
        model = make_model(vocab_size=tokenizer.get_vocab_size(), n_embd=128, sequence_len=512).to(device)
        model.compute_dtype = dtype
        engine = Engine(prepare_for_inference(model, weights), tokenizer)
        engine.scheduler.runner.table[:32, :8] = torch.arange(1, 257, device=device).view(32, 8)
        return engine

    exact = make_engine(torch.device("cpu"), torch.float32).scheduler.runner.decode(*inputs)
    engine = make_engine(GPU, torch.bfloat16)
    runner = engine.scheduler.runner
    assert relative_error(runner.decode(*inputs), exact) < 0.03
    assert engine.compile() is None
    for B in (32, 31, 8, 3, 1):  # fewer and fewer: a row that is left empty writes over its text
        assert relative_error(runner.decode(*(row[:B] for row in inputs)), exact[:B]) < 0.03


# ----------------------------------------------------------------------------- commands


def _flags(tag: str, corpus: Path, *more: str) -> list[str]:
    left_out = ("--device-type=cpu", "--no-compile")
    return [*(f for f in TINY_TRAINING if f not in left_out), "--data", str(corpus), "--model-tag", tag, *more]


def _weights(tag: str) -> dict[str, torch.Tensor]:
    stage_dir = get_base_dir() / "runs" / tag / "base"
    return read_tensors(step_dir(stage_dir, list_steps(stage_dir)[-1]), "model.safetensors")


def test_resumed_equals_uninterrupted(corpus: Path, tokenizer_in_place: None) -> None:
    """To the last bit, compiled, with the kernels that training uses."""
    assert base_train.main(_flags("whole", corpus, "--save-every=3")) == 0
    assert base_train.main(_flags("whole", corpus, "--resume=3")) == 0
    resumed = _weights("whole")
    assert base_train.main(_flags("again", corpus)) == 0
    for name, tensor in _weights("again").items():
        assert torch.equal(tensor, resumed[name]), name


def test_training_in_float16_follows_float32(corpus: Path, tokenizer_in_place: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs before Ampere train, with the kernels of this one."""
    curves = []
    for dtype in ("float32", "float16"):
        monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
        assert base_train.main(_flags(dtype, corpus)) == 0
        curves.append(logged(get_base_dir() / "runs" / dtype / "base"))
    assert curves[1] == pytest.approx(curves[0], abs=0.02)


def test_a_whole_life(corpus: Path, tokenizer_in_place: None, capsys: pytest.CaptureFixture) -> None:
    """Pretraining, fine-tuning, reinforcement and evaluation by the commands that users type."""
    assert base_train.main(_flags("life", corpus, "--num-iterations=-1", "--target-minutes=0.1", "--sample-every=50")) == 0
    tuning = ["--model-tag=life", "--tasks=Arithmetic:60,Identity:40", "--num-iterations=3", "--eval-tokens=512"]
    assert chat_sft.main(tuning) == 0
    rollouts = ["--num-samples=4", "--max-new-tokens=16", "--examples-per-step=2", "--eval-examples=4"]
    assert chat_rl.main(["--model-tag=life", "--task=Arithmetic", "--num-iterations=2", *rollouts]) == 0
    assert chat_eval.main(["-i", "rl", "-g", "life", "-a", "Arithmetic", "--max-problems=8", "--max-new-tokens=16"]) == 0
    assert "cuda" in capsys.readouterr().out


def test_under_torchrun_with_nccl_it_learns_the_same(corpus: Path, tokenizer_in_place: None) -> None:
    """One rank, whole and, compiled, cut by --fsdp: the code paths of many GPUs as far as one can walk them."""
    assert base_train.main(_flags("alone", corpus, "--no-compile")) == 0
    for tag, more in (("ranks", ["--no-compile"]), ("cut", ["--fsdp"])):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "--",
                   "scripts.base_train", *_flags(tag, corpus, *more)]  # fmt: skip
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=300)
    alone = _weights("alone")
    for name, tensor in _weights("ranks").items():
        assert torch.equal(tensor, alone[name]), name
    assert base_train.main(_flags("compiled", corpus)) == 0  # or the scalars' first gradients would be other rounding errors
    compiled = _weights("compiled")
    cut, *_ = load_model("base", torch.device("cpu"), "eval", "cut")
    for name, tensor in cut.state_dict().items():
        assert relative_error(tensor, compiled[name].float()) < 0.02, name
