"""Many processes, one result: any number of ranks, whole or sharded, trains the same."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from traceback import StackSummary

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nanochat.checkpoint_manager import load_model
from nanochat.common import describe_error
from nanochat.runs import list_steps
from nanochat.sharding import write_sharded
from tests.helpers import load_all, logged, make_model
from tests.many_ranks import SMALL, WHOLE, Ranks

HANDED_OVER = "handed-over"


def _forget(stage_dir: Path, after: int) -> None:
    """As if the run had been killed just after a step was saved."""
    for step in list_steps(stage_dir):
        if step > after:
            shutil.rmtree(stage_dir / f"step_{step:06d}")


@pytest.mark.slow
def test_one_two_and_four_ranks_follow_one_curve(many_ranks: Ranks, corpus: Path) -> None:
    """To 1e-4 over 50 steps, and to the same bits per byte, with the same global batch."""
    one, *others = (many_ranks.train(ranks, corpus, f"n{ranks}", "--num-iterations=50") for ranks in (1, 2, 4))
    assert len(logged(one)) == 50
    for stage_dir in others:
        assert logged(stage_dir) == pytest.approx(logged(one), abs=1e-4)
        assert logged(stage_dir, "val/bpb") == pytest.approx(logged(one, "val/bpb"), abs=1e-4)


@pytest.mark.slow
def test_ranks_without_a_tokenizer_train_one(many_ranks: Ranks, corpus: Path, base_dir: Path) -> None:
    """In a process of its own, while the others wait."""
    shutil.rmtree(base_dir / "tokenizers", ignore_errors=True)
    assert len(logged(many_ranks.train(2, corpus, "first", "--num-iterations=2"))) == 2
    assert (base_dir / "tokenizers" / "default" / "tokenizer.json").exists()


WITH_ITS_OWN_FILES = """
import importlib, os, sys
from nanochat.common import run_command
command, own = importlib.import_module(sys.argv.pop(1)), f"{os.environ['FILES']}/{os.environ['RANK']}"
sys.exit(run_command(lambda argv: command.main([argument.replace("OWN", own) for argument in argv])))
"""


@pytest.fixture
def own_files(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders, 0 and 1, for commands started by `WITH_ITS_OWN_FILES`: text, a task, part of CORE."""
    text = json.dumps({"context": "the cat sees", "continuation": "a house", "question": "1 and 1?", "answer": "#### 2"})
    for rank in ("0", "1"):
        folder = tmp_path / rank
        shutil.copytree(corpus, folder / "text")
        for path in (folder / "gsm8k" / "test.jsonl", folder / "eval_data" / "squad.jsonl"):
            path.parent.mkdir()
            path.write_text(f"{text}\n" * 3, encoding="utf-8")
        entry = "{label: squad, dataset_uri: squad.jsonl, num_fewshot: [1], icl_task_type: language_modeling}"
        (folder / "core.yaml").write_text(f"icl_tasks: [{entry}]", encoding="utf-8")
        (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nsquad,0", encoding="utf-8")
    (tmp_path / "ranks.py").write_text(WITH_ITS_OWN_FILES, encoding="utf-8")
    monkeypatch.setenv("FILES", str(tmp_path))
    return tmp_path


def test_ranks_with_different_texts_do_not_train(many_ranks: Ranks, own_files: Path, base_dir: Path) -> None:
    """As where machines have folders of their own: each rank says so, and nothing is written."""
    (own_files / "1" / "text" / "train.jsonl").write_text('{"text": "other words"}', encoding="utf-8")
    flags = [*SMALL, "--num-iterations=2", "--model-tag=apart", "--data=OWN/text"]
    said = many_ranks.run(2, str(own_files / "ranks.py"), "scripts.base_train", *flags, fails=True)
    sizes = [(own_files / rank / "text" / "train.jsonl").stat().st_size for rank in ("0", "1")]
    sentence = f"error: the size in bytes or SHA-256 of train.jsonl is {sizes[0]} on rank 0, but {sizes[1]} on rank 1"
    assert sentence in said
    assert not (base_dir / "runs").exists()


@pytest.mark.parametrize(
    ("file", "command", "found"),
    [
        ("text/train.jsonl", ("scripts.base_eval", "--eval=bpb", "--data=OWN/text"), "bytes or SHA-256 of train.jsonl is"),
        ("eval_data/squad.jsonl", ("scripts.base_eval", "--eval=core", "--eval-bundle=OWN"), "the size in bytes of squad is"),
        ("gsm8k/test.jsonl", ("scripts.chat_eval", "--task-name=GSM8K", "--task-data=OWN"), "hash of the problems of GSM8K"),
    ],
)
def test_ranks_with_different_files_do_not_measure(
    many_ranks: Ranks, tiny_run: Path, own_files: Path, file: str, command: tuple[str, ...], found: str
) -> None:
    """What they found together would be the result of neither."""
    more = ["--no-compile"] if "--eval=core" in command else []
    path = own_files / "1" / file
    path.write_text(path.read_text(encoding="utf-8").partition("\n")[0], encoding="utf-8")
    said = many_ranks.run(2, str(own_files / "ranks.py"), *command, "--device-type=cpu", *more, fails=True)
    assert found in said
    assert not list(tiny_run.glob("*/eval.json"))


@pytest.mark.slow
def test_checkpoints_move_to_other_numbers_of_ranks(many_ranks: Ranks, corpus: Path) -> None:
    """2 -> 1 -> 4, and whole -> sharded -> whole, continue the curve of one process, while blocks join."""
    flags = ["--num-iterations=16", "--save-every=4", "--expand-at=0.4"]
    expected = logged(many_ranks.train(1, corpus, WHOLE, *flags))
    for ranks, steps, more in ((2, 4, []), (1, 8, []), (4, 12, ["--fsdp", "--activation-checkpointing"]), (2, 16, ["--fsdp"])):
        stage_dir = many_ranks.train(ranks, corpus, HANDED_OVER, *flags, "--resume=auto", *more)
        assert logged(stage_dir) == pytest.approx(expected, abs=1e-4), f"up to step {steps}"
        _forget(stage_dir, steps)
    _forget(stage_dir, 12)  # which 4 ranks wrote in parts: one process goes on from it
    assert logged(many_ranks.train(1, corpus, HANDED_OVER, *flags, "--resume=auto")) == pytest.approx(expected, abs=1e-4)
    whole = load_all(stage_dir.parent.parent / WHOLE / "base", 16)
    found = load_all(stage_dir, 16)
    for mine, theirs in zip(whole[:2], found[:2], strict=True):
        assert set(mine) == set(theirs)
        for name, tensor in mine.items():
            assert (theirs[name] - tensor).float().norm() <= 1e-2 * tensor.float().norm() + 1e-6, name


@pytest.mark.slow
def test_sharded_models_are_compiled_tuned_and_read_whole(many_ranks: Ranks, corpus: Path, base_dir: Path) -> None:
    """--fsdp: compiled like the others, read by one process, the start of SFT; a lost file of a rank is named."""
    flags = ["--num-iterations=4"]
    whole, sharded = many_ranks.train(1, corpus, WHOLE, *flags), many_ranks.train(2, corpus, "sharded", *flags, "--fsdp")
    assert logged(sharded) == pytest.approx(logged(whole), abs=1e-4)
    model, expected = (load_model("base", "cpu", "eval", tag)[0] for tag in ("sharded", WHOLE))
    idx = torch.arange(100)[None]
    torch.testing.assert_close(model(idx), expected(idx), atol=1e-3, rtol=1e-3)
    sft = ["--tasks=Arithmetic:60,Identity:40", "--num-iterations=3", "--device-type=cpu", "--no-compile", "--eval-tokens=512"]
    for tag, ranks, more in ((WHOLE, 2, []), ("sharded", 2, ["--fsdp"])):
        many_ranks.run(ranks, "-m", "scripts.chat_sft", *sft, f"--model-tag={tag}", *more)
    runs = base_dir / "runs"
    assert logged(runs / "sharded" / "sft") == pytest.approx(logged(runs / WHOLE / "sft"), abs=1e-4)
    (sharded / "step_000004" / "sharded" / "__1_0.distcp").unlink()
    with pytest.raises(Exception, match=r"__1_0\.distcp is damaged \(missing"):
        load_model("base", "cpu", "eval", "sharded")


@pytest.mark.slow
def test_tuning_and_reinforcing_are_the_same_on_any_number_of_ranks(many_ranks: Ranks, corpus: Path, base_dir: Path) -> None:
    many_ranks.train(1, corpus, WHOLE, "--num-iterations=4")
    machine = ["--device-type=cpu", "--no-compile"]
    sft = ["--tasks=Arithmetic:100,Identity:60", "--num-iterations=6", "--total-batch-size=512", "--eval-tokens=512", *machine]
    rl = ["--task=Arithmetic", "--num-iterations=2", "--examples-per-step=4", "--num-samples=4", "--max-new-tokens=8"]
    rl += ["--eval-examples=4", "--eval-samples=2", "--objective=grpo", "--kl-weight=0.1", *machine]
    runs = base_dir / "runs"
    for tag in ("two", "four"):
        shutil.copytree(runs / WHOLE, runs / tag)

    def compare(tag: str, stage: str, *names: str) -> None:
        for name in names:
            assert (expected := logged(runs / WHOLE / stage, name))
            assert logged(runs / tag / stage, name) == pytest.approx(expected, abs=1e-4), f"{name} of {tag}"

    for ranks, tag in ((1, WHOLE), (2, "two"), (4, "four")):
        many_ranks.run(ranks, "-m", "scripts.chat_sft", *sft, f"--model-tag={tag}")
        compare(tag, "sft", "train/loss", "val/bpb")
        if tag != WHOLE:  # all reinforce the very same weights: a rounding may be enough to draw another token
            shutil.rmtree(runs / tag / "sft")
            shutil.copytree(runs / WHOLE / "sft", runs / tag / "sft")
        many_ranks.run(ranks, "-m", "tests.reinforce", *rl, f"--model-tag={tag}")
        compare(tag, "rl", "train/loss", "rl/reward", "rl/answer_tokens", "val/pass@1")
        assert all(logged(runs / tag / "rl", "rl/mixed_groups"))  # each update taught something


# ----------------------------------------------------------------------------- one optimizer

SEVERAL_RANKS = """
import sys, torch, torch.distributed as dist
from tests.helpers import make_model
from tests.test_distributed import set_gradients
dist.init_process_group("gloo")
rank = dist.get_rank()
shares = {2: (0.5, 0.5), 3: (0.5, 0.25, 0.25)}[dist.get_world_size()]
model = make_model(n_layer=3, n_kv_head=1)
optimizer = model.setup_optimizer(weight_decay=0.1)
for step in range(4):
    set_gradients(model, step, shares[rank])
    optimizer.step(); optimizer.zero_grad()
state = optimizer.state_dict()
if rank == 0:
    torch.save({"model": model.state_dict(), "optimizer": state}, sys.argv[1])
dist.destroy_process_group()
"""


def set_gradients(model, step: int, share: float) -> None:
    """One rank's part of the same gradients; the first two blocks have none in the first steps. Shares are powers of two, so
    that their sum is exact: what differs then is the optimizer's doing, not rounding that Adam makes a whole step of."""
    generator = torch.Generator().manual_seed(step)
    idle = tuple(f"{kind}.{i}." for kind in ("blocks", "value_embeds") for i in range(max(0, 2 - step)))
    for name, parameter in model.named_parameters():
        if not name.startswith(idle):
            parameter.grad = torch.randn(parameter.shape, generator=generator) * share


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_optimizer_is_the_same_on_any_number_of_ranks(many_ranks: Ranks, tmp_path: Path, ranks: int) -> None:
    """Shapes that do not divide by the ranks included; state as well as weights."""
    script, result = tmp_path / "ranks.py", tmp_path / "result.pt"
    script.write_text(SEVERAL_RANKS, encoding="utf-8")
    many_ranks.run(ranks, str(script), str(result))
    model = make_model(n_layer=3, n_kv_head=1)
    optimizer = model.setup_optimizer(weight_decay=0.1)
    for step in range(4):
        set_gradients(model, step, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = torch.load(result, weights_only=True)
    for mine, theirs in ((model.state_dict(), found["model"]), (optimizer.state_dict(), found["optimizer"])):
        assert set(mine) == set(theirs)
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


AFTER_A_FAILURE = """
import torch, torch.distributed as dist
from types import SimpleNamespace
from nanochat import pace
from nanochat.gpt import GPT
from nanochat.ranks import gather_objects
from nanochat.sharding import shard
from nanochat.trainer import Trainer
from tests.helpers import make_model
dist.init_process_group("gloo")
config = make_model().config
with torch.device("meta"):
    model = GPT(config)
model.compute_dtype = torch.float32
shard(model, torch.device("cpu"))
model.to_empty(device="cpu")
model.init_weights(0)
for block in model.blocks:  # which begins with zeros, and its inside without gradients
    torch.nn.init.ones_(block.attn.c_proj.weight), torch.nn.init.ones_(block.mlp.c_proj.weight)
idx = torch.arange(32)[None] % 300

def gradients():
    model.zero_grad()
    model(idx, idx).backward()
    return {name: p.grad.to_local().abs().sum().item() for name, p in model.named_parameters() if p.grad is not None}

def fail(module, inputs, output):
    def no_room(grad):
        raise torch.OutOfMemoryError("no room")
    output.register_hook(no_room)

before = gradients()
hook = model.blocks[1].register_forward_hook(fail)
torch.cuda.mem_get_info = lambda device: (0, 0)
assert not pace._fits(model, 1)
hook.remove()
after = gradients()
assert after == before, [(n, before.get(n), after.get(n)) for n in before if before.get(n) != after.get(n)][:4]

# After an evaluation the root's parameters are whole until the next pass: a save that comes then must not mind.
trainer = SimpleNamespace(model=model, optimizer=model.setup_optimizer())
sharded, whole = (o.state_bytes() for o in (trainer.optimizer, GPT.on_meta(config).setup_optimizer()))
assert sum(gather_objects(sharded)) == sum(gather_objects(whole)) > 0
with torch.no_grad():
    model(idx, idx)
Trainer._check_finite(trainer)
dist.destroy_process_group()
"""


def test_a_sharded_model_after_a_failed_pass_and_after_an_evaluation(many_ranks: Ranks, tmp_path: Path) -> None:
    """It learns on as if there had been none, and can be saved."""
    script = tmp_path / "ranks.py"
    script.write_text(AFTER_A_FAILURE, encoding="utf-8")
    many_ranks.run(1, str(script))


@pytest.mark.parametrize(
    ("reason", "number"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), errno.ENOSPC),
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (PermissionError(errno.EACCES, "Permission denied"), errno.EACCES),
        (RuntimeError("something else"), errno.EIO),
    ],
)
def test_a_part_that_cannot_be_written_says_why(
    reason: Exception, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one rank met is an OSError on all, of a full disk above all, whatever PyTorch made of it."""

    def fail(*arguments: object, **settings: object) -> None:
        raise dcp.api.CheckpointException("save", {1: (reason, StackSummary())})

    monkeypatch.setattr(dcp, "save", fail)
    with pytest.raises(OSError) as failure:
        write_sharded(tmp_path, {})
    assert failure.value.errno == number
    assert ("disk is full" in describe_error(failure.value)) == (number == errno.ENOSPC)


FAILING_RANK_0 = """
import torch.distributed as dist
from nanochat.common import NanochatError
from nanochat.ranks import on_rank0
dist.init_process_group("gloo")

def fail(error):
    raise error

for error in (OSError(28, "No space left on device"), NanochatError("no such task")):
    try:
        on_rank0(lambda: fail(error))
    except Exception as raised:
        print(f"rank {dist.get_rank()}: {type(raised).__name__} {raised}", flush=True)
dist.destroy_process_group()
"""


def test_what_fails_on_rank_0_alone_is_raised_on_all(many_ranks: Ranks, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(FAILING_RANK_0, encoding="utf-8")
    printed = many_ranks.run(2, str(script))
    for line in (
        "rank 0: OSError [Errno 28] No space left on device",
        "rank 1: NanochatError rank 0 has failed: its reason stands above",
        "rank 0: NanochatError no such task",
        "rank 1: NanochatError no such task",
    ):
        assert line in printed


ONE_SAVED_MEANWHILE = """
import os
from nanochat import checkpoint_manager
from nanochat.devices import compute_cleanup, compute_init
list_steps = checkpoint_manager.list_steps
if os.environ["RANK"] == "0":  # looks before the others do
    checkpoint_manager.list_steps = lambda folder: list_steps(folder)[:1]
compute_init("cpu")
meta = checkpoint_manager.load_model("base", "cpu", "eval")[2]
print(f"rank {os.environ['RANK']}: step {meta['step']}", flush=True)
compute_cleanup()
"""


def test_ranks_load_one_checkpoint_of_a_run_that_still_trains(many_ranks: Ranks, tiny_run: Path, tmp_path: Path) -> None:
    """Or they would measure two models as one."""
    assert len(list_steps(tiny_run / "base")) > 1
    script = tmp_path / "ranks.py"
    script.write_text(ONE_SAVED_MEANWHILE, encoding="utf-8")
    printed, step = many_ranks.run(2, str(script)), list_steps(tiny_run / "base")[0]
    assert f"rank 0: step {step}\n" in printed
    assert f"rank 1: step {step}\n" in printed
