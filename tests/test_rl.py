"""RL: what is learned of an answer, what it is worth, that sampling and training agree, resume, ranks, and learning."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import rl
from nanochat.checkpoint_manager import hash_of_weights, load_checkpoint, read_meta, save_checkpoint
from nanochat.common import NanochatError
from nanochat.engine import Engine
from nanochat.files import read_json_lines
from nanochat.kv_cache import BLOCK_SIZE
from nanochat.lanes import epoch_order
from nanochat.rl import OBJECTIVES, RolloutLoader, RolloutSettings, compute_advantages, make_policy_loss, target_logprobs
from nanochat.runs import get_stage_dir, list_steps
from nanochat.sequence import Sequence as Answer
from nanochat.tokenizer import Tokenizer
from scripts import chat_rl
from tasks.common import Conversation, Task
from tests.helpers import load_all, make_document, make_engine, make_model, write_gsm8k
from tests.many_ranks import Ranks

FLAGS = [
    "--model-tag=tiny", "--task=Arithmetic", "--examples-per-step=3", "--num-samples=4", "--max-new-tokens=12",
    "--eval-examples=2", "--eval-samples=2", "--eval-every=-1", "--device-batch-size=4", "--init-lr-frac=1",
    "--device-type=cpu", "--no-compile",
]  # fmt: skip


class Vowels(Task):
    """The more of the answer's letters are an e, the better."""

    def num_examples(self) -> int:
        return 10

    def get_example(self, index: int) -> Conversation:
        question = make_document(index, 1)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "e"}]}

    def evaluate(self, conversation: Conversation, completion: str) -> float:
        return completion.count("e") / max(1, len(completion))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    return make_engine(tokenizer, 256, max_rows=16)


@pytest.fixture
def ending(engine: Engine) -> Engine:
    """Answers end after five tokens on average; those of a model that has learned nothing hardly ever do."""
    engine.scheduler.stop_ids |= set(range(3, engine.model.config.vocab_size, 5))
    return engine


def _settings(**changes: object) -> RolloutSettings:
    return RolloutSettings(**{"examples_per_step": 3, "num_samples": 4, "max_tokens": 10, **changes})


def _draw(loader: RolloutLoader) -> tuple[list[Answer], list[tuple[torch.Tensor, ...]]]:
    """(the answers of an update, its batches)."""
    answers: list[Answer] = []
    run = loader.engine.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader.engine, "run", lambda these: answers.extend(these) or run(these))
        return answers, [next(loader) for _ in range(loader.micro_batches)]


def test_advantages_compare_answers_to_the_same_problem() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    for objective in ("dapo", "grpo"):
        advantages = compute_advantages(rewards, objective, 0.5)
        torch.testing.assert_close(advantages.sum(1), torch.zeros(3))
        assert (advantages[1] == 0).all() and advantages[2, 3] > 0 > advantages[2, 0]
    torch.testing.assert_close(compute_advantages(rewards, "grpo", 0.5)[[0, 2]].std(1, correction=0), torch.ones(2))
    torch.testing.assert_close(compute_advantages(rewards, "dapo", 0.5) + rewards.mean(1, keepdim=True), rewards)
    assert torch.equal(compute_advantages(rewards, "reinforce", 0.5), rewards - 0.5)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 5), (1.7, 40)])
def test_training_sees_the_distribution_that_was_sampled(engine: Engine, temperature: float, top_k: int) -> None:
    """So the correction is 1, the tokens are the ones that were drawn, and the stop token is one of them."""
    settings = _settings(temperature=temperature, top_k=top_k, num_samples=8)
    engine.scheduler.stop_ids = set(range(0, 300, 7))  # so that many end by a stop token
    loader = RolloutLoader(engine, Vowels(), settings, micro_batches=3)
    checked = stopped = 0
    for inputs, targets, _, _, sampled_logprobs in (next(loader) for _ in range(3)):
        assert inputs.size(1) == rl.ROW_STEP  # no wider than they must be
        drawn = targets >= 0
        logprobs = target_logprobs(engine.model, inputs, targets, temperature, top_k)
        torch.testing.assert_close(logprobs[drawn], sampled_logprobs[drawn], atol=2e-4, rtol=0)
        assert torch.equal(targets[:, :-1][drawn[:, :-1]], inputs[:, 1:][drawn[:, :-1]])
        last = drawn.flip(1).float().argmax(1)
        ends = targets.flip(1)[torch.arange(len(targets)), last]
        stopped += sum(int(token) in engine.stop_ids for token in ends)
        checked += int(drawn.sum())
    assert checked > 20 and stopped > 3


def test_tool_output_is_not_learned(engine: Engine) -> None:
    """A model that can hardly say anything but calls: what comes back is forced, and so has no target."""
    special = engine.tokenizer.encode_special
    start, end, output = special("<|python_start|>"), special("<|python_end|>"), special("<|output_start|>")
    five = engine.tokenizer.encode("5")[0]
    with torch.no_grad():
        engine.model.lm_head.weight.zero_()
    logits = engine.model.logits

    def loaded(x: torch.Tensor) -> torch.Tensor:
        result = logits(x)
        result[..., [start, end, five]] += 6.0
        return result

    engine.model.logits = loaded
    settings = _settings(max_tokens=40, kl_weight=0.1)  # so that all answers have a say
    answers, [(inputs, targets, *_)] = _draw(RolloutLoader(engine, Vowels(), settings, micro_batches=1))
    assert len(answers) == len(inputs)
    outputs = 0
    for row, answer in enumerate(sorted(answers, key=lambda answer: answer.length)):
        text = answer.prompt + answer.tokens
        for i, token in enumerate(answer.tokens):
            place = len(answer.prompt) + i - 1
            assert int(targets[row, place]) == (token if answer.masks[i] else -1)
            assert place + 1 >= inputs.size(1) or int(inputs[row, place + 1]) == text[place + 1]
        outputs += answer.tokens.count(output)
        assert (targets[row, : len(answer.prompt) - 1] == -1).all()
        assert int((targets[row] >= 0).sum()) == len(answer.policy_logprobs)
    assert outputs > 3


def test_each_epoch_has_an_order_of_its_own() -> None:
    """Always the same one: runs go on as they began."""
    orders = [epoch_order(-1, epoch, 50).tolist() for epoch in range(6)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 6
    assert orders[3] == np.random.default_rng([2**64 - 1, 3]).permutation(50).tolist() == epoch_order(-1, 3, 50).tolist()


def test_the_gradient_is_that_of_the_weighted_likelihood(ending: Engine) -> None:
    """Against the formula written out over whole, unpadded answers; for every objective and a distance, too."""
    reference = make_model(seed=5, vocab_size=ending.model.config.vocab_size, sequence_len=256)
    for objective, kl_weight in (("dapo", 0.0), ("grpo", 0.0), ("reinforce", 0.0), ("dapo", 0.3)):
        settings = _settings(objective=objective, kl_weight=kl_weight)
        loader = RolloutLoader(ending, Vowels(), settings, micro_batches=3)
        answers, batches = _draw(loader)
        earned = [Vowels().evaluate({}, ending.tokenizer.decode(a.tokens)) * (a.stop_token is not None) for a in answers]
        rewards = torch.tensor(earned).view(3, 4)
        loss_fn, count_fn = make_policy_loss(settings, reference if kl_weight else None)
        count = sum(count_fn(batch) for batch in batches)
        ending.model.zero_grad()
        for batch in batches:
            (loss_fn(ending.model, batch) / count).backward()
        gradient = ending.model.lm_head.weight.grad.clone()

        advantages = compute_advantages(rewards, objective, float(rewards.mean())).flatten().tolist()
        total, tokens, rows = 0.0, 0, 0
        for answer, advantage in zip(answers, advantages, strict=True):
            ids = answer.prompt + answer.tokens + ([answer.stop_token] if answer.stop_token is not None else [])
            drawn = range(len(answer.prompt), len(ids))
            logprobs = ending.model(torch.tensor([ids]))[0].log_softmax(-1)
            own = torch.stack([logprobs[i - 1, ids[i]] for i in drawn])
            gain = advantage * own
            if kl_weight:
                with torch.no_grad():
                    expected = reference(torch.tensor([ids]))[0].log_softmax(-1)
                ratio = torch.stack([expected[i - 1, ids[i]] for i in drawn]) - own
                gain = gain - kl_weight * (ratio.exp() - ratio - 1)
            if advantage or kl_weight:
                total = total - (gain.sum() if objective == "dapo" else gain.mean())
                tokens, rows = tokens + len(own), rows + 1
        ending.model.zero_grad()
        (total / (tokens if objective == "dapo" else rows)).backward()
        torch.testing.assert_close(gradient, ending.model.lm_head.weight.grad, atol=2e-5, rtol=2e-3)


def test_what_sampling_saw_otherwise_counts_less_and_at_most_twice(ending: Engine) -> None:
    """Tokens that are a third as likely now as when they were drawn count a third; thrice as likely ones are held at two."""
    settings = _settings()
    inputs, targets, advantages, scale, _ = next(RolloutLoader(ending, Vowels(), settings, micro_batches=1))
    loss_fn, _ = make_policy_loss(settings)
    own = target_logprobs(ending.model, inputs, targets, 1.0, 0).detach()

    def loss_and_gradient(sampled_logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = loss_fn(ending.model, (inputs, targets, advantages, scale, sampled_logprobs))
        return loss.detach(), torch.autograd.grad(loss, ending.model.lm_head.weight)[0]

    loss, gradient = loss_and_gradient(own)
    assert gradient.any()
    for shift, factor in ((math.log(3), 1 / 3), (-math.log(1.5), 1.5), (-math.log(3), 2.0)):
        found = loss_and_gradient(own + shift)
        torch.testing.assert_close(found, (factor * loss, factor * gradient), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reward", [1.0, 0.3])  # three times the second is not what they are together, in float32
def test_nothing_to_learn_gives_no_gradient(engine: Engine, objective: str, reward: float) -> None:
    class Fair(Vowels):
        def reward(self, conversation: Conversation, completion: str) -> float:
            return reward

    engine.scheduler.stop_ids = set(range(engine.model.config.vocab_size))
    settings = _settings(objective=objective, num_samples=6)
    loss_fn, count_fn = make_policy_loss(settings)
    loader = RolloutLoader(engine, Fair(), settings, micro_batches=2)
    for batch in (next(loader), next(loader)):
        assert int(count_fn(batch)) == 0
        loss_fn(engine.model, batch).backward()
    assert all(p.grad is None or not p.grad.any() for p in engine.model.parameters())
    assert loader.metrics()["rl/reward"] == pytest.approx(reward) and loader.metrics()["rl/mixed_groups"] == 0


def test_ranks_share_an_update_and_epochs_see_every_problem_once(engine: Engine) -> None:
    alone = RolloutLoader(engine, Vowels(), _settings(examples_per_step=4), 1)
    shares = [RolloutLoader(engine, Vowels(), _settings(examples_per_step=4), 1, rank, 3) for rank in range(3)]
    seen = []
    for step in range(5):
        for loader in (alone, *shares):
            loader.load_state_dict([{"step": step}])
        together = sorted(pair for loader in shares for pair in loader._problems())
        assert together == alone._problems()
        seen += [index for _, index in together]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    with pytest.raises(NanochatError, match="2 problems a step, of 10, are too few for 3 ranks"):
        RolloutLoader(engine, Vowels(), _settings(examples_per_step=2), 1, 0, 3)


def test_an_answer_that_never_ends_earns_nothing(ending: Engine) -> None:
    class Kind(Vowels):
        def evaluate(self, conversation: Conversation, completion: str) -> bool:
            return True

    settings = _settings(objective="reinforce", num_samples=8, max_tokens=4)
    loader = RolloutLoader(ending, Kind(), settings, micro_batches=1)
    answers, [(_, _, advantages, *_)] = _draw(loader)
    answers.sort(key=lambda answer: answer.length)
    rewards = torch.tensor([float(answer.stop_token is not None) for answer in answers])
    assert 0 < rewards.mean() < 1 and loader.metrics()["rl/reward"] == pytest.approx(rewards.mean().item())
    torch.testing.assert_close(advantages[:, 0], rewards - rewards.mean())


def test_no_answer_that_ended_is_worth_less_than_one_that_did_not() -> None:
    assert rl.fill_in([1.0, None, 0.0]) == [1.0, 0.0, 0.0]
    assert rl.fill_in([-1.0, None, 1.0]) == [-1.0, -1.0, 1.0]
    assert rl.fill_in([None, None]) == [0.0, 0.0]


def test_an_answer_as_good_as_its_group_counts(ending: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graded rewards may be the mean of their group; a group of equal ones teaches nothing and does not count."""
    given = iter([0.0, 0.5, 1.0, *[0.5] * 3])
    monkeypatch.setattr(rl, "usable_cores", lambda: 1)  # so that they are judged in order
    monkeypatch.setattr(RolloutLoader, "_judge", lambda *_: next(given))
    loader = RolloutLoader(ending, Vowels(), _settings(examples_per_step=2, num_samples=3), micro_batches=1)
    _, targets, advantages, *_ = next(loader)
    assert sorted(advantages[:, 0].tolist()) == [-0.5, 0.0, 0.5] and (targets >= 0).any(dim=1).all()


def test_an_update_is_answered_by_the_weights_as_they_are(engine: Engine) -> None:
    """The same problem again, after an update: as by an engine that has never seen it."""

    class One(Vowels):
        def num_examples(self) -> int:
            return 1

        def get_example(self, index: int) -> Conversation:
            return {"messages": [{"role": "user", "content": make_document(0, 6)}, {"role": "assistant", "content": "e"}]}

    prompt = engine.tokenizer.render_for_completion(One()[0])
    assert len(prompt) > BLOCK_SIZE  # so that there is what might be shared
    loader = RolloutLoader(engine, One(), _settings(examples_per_step=1), micro_batches=1)
    next(loader)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(-0.5)
    fresh = RolloutLoader(Engine(engine.model, engine.tokenizer), One(), _settings(examples_per_step=1), micro_batches=1)
    fresh.load_state_dict([loader.state_dict()])
    for found, expected in zip(next(loader), next(fresh), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"objective": "ppo"}, "ppo"), ({"num_samples": 1}, "num-samples 1"), ({"temperature": 0.0}, "temperature 0"),
     ({"kl_weight": 0.1, "top_k": 5}, "top-k"), ({"top_k": -1}, "top_k cannot be -1"), ({"top_k": 1}, "--top-k 1 leaves"),
     ({"temperature": math.nan}, "nan"), ({"objective": "reinforce", "num_samples": 1, "examples_per_step": 1}, "samples 1")],
)  # fmt: skip
def test_settings_that_cannot_learn_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(NanochatError, match=words):
        _settings(**settings)
    _settings(objective="reinforce", num_samples=1, examples_per_step=2)  # which compares answers to different problems


# ----------------------------------------------------------------------------- the command


def _final_weights(tag: str) -> dict[str, torch.Tensor]:
    stage_dir = get_stage_dir(tag, "rl")
    return load_checkpoint(stage_dir, list_steps(stage_dir)[-1])[0]


def test_a_resumed_run_goes_the_way_of_one_never_stopped(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, after a stop in mid-run, given the machine's flags alone; the rewards are logged at every update."""
    monkeypatch.setattr(RolloutLoader, "_judge", lambda self, problem, answer: float(sum(answer.tokens) % 3))
    assert chat_rl.main([*FLAGS, "--source=base", "--num-iterations=4", "--save-every=1", "--kl-weight=0.1"]) == 0
    whole = _final_weights("tiny")
    stage_dir = get_stage_dir("tiny", "rl")
    rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = {row["step"]: row["rl/reward"] for row in rows if "rl/reward" in row}
    assert list(rewards) == [1, 2, 3, 4]
    assert {"val/pass@1", "val/pass@2"} <= set(rows[0]) and rows[0]["step"] == 0
    for step in (3, 4):
        for file in (stage_dir / f"step_{step:06d}").iterdir():
            file.unlink()
    on = ["--model-tag=tiny", "--resume=auto", "--device-batch-size=4", "--device-type=cpu", "--no-compile"]
    assert chat_rl.main(on) == 0
    with pytest.raises(NanochatError, match="'tiny' was started from base step 6, not sft: leave --source out to go on"):
        chat_rl.main([*on, "--source=sft"])
    assert all(torch.equal(whole[name], tensor) for name, tensor in _final_weights("tiny").items())
    start = load_checkpoint(get_stage_dir("tiny", "base"), 6)[0]
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


def test_a_resumed_run_compares_with_the_model_that_it_began_from(tiny_run: Path) -> None:
    """Not with another one that was made since, of the same step; a run that does not compare needs neither."""
    flags = [*FLAGS, "--num-iterations=2", "--save-every=1", "--kl-weight=0.1"]
    assert chat_rl.main(flags) == 0
    step_dir, rl = tiny_run / "sft" / "step_000004", tiny_run / "rl"
    weights, optimizer, meta = load_all(tiny_run / "sft", 4)
    shutil.copytree(step_dir, step_dir.parent / "before")
    save_checkpoint(tiny_run / "sft", 4, {name: value * 1.01 for name, value in weights.items()}, optimizer, meta)
    with pytest.raises(NanochatError, match="sft step 4 of run 'tiny' has other weights than when .* was begun from it"):
        chat_rl.main([*flags, "--resume=1"])
    assert list_steps(rl) == [1, 2]  # nothing was set aside
    shutil.rmtree(step_dir)
    (step_dir.parent / "before").rename(step_dir)
    assert chat_rl.main([*flags, "--resume=1"]) == 0
    parent = read_meta(rl, 2)["parent"]
    assert parent == {"stage": "sft", "step": 4, "weights": hash_of_weights(tiny_run / "sft", 4)}


def test_a_resumed_run_goes_on_with_the_problems_that_it_began_with(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others of the same name are refused; a run that is complete needs none."""
    flags = [*FLAGS, "--num-iterations=2", "--save-every=1"]
    assert chat_rl.main(flags) == 0
    monkeypatch.setattr("tasks.arithmetic.Arithmetic.__len__", lambda self: 7)
    with pytest.raises(NanochatError, match=r"the mixture, 7 conversations, is not the one that run 'tiny' was started with"):
        chat_rl.main([*flags, "--resume=1"])
    assert chat_rl.main([*flags, "--resume=auto"]) == 0
    assert list_steps(tiny_run / "rl") == [1, 2]


def test_a_resumed_run_knows_where_its_problems_are(tiny_run: Path, tmp_path: Path) -> None:
    write_gsm8k(tmp_path, 40)
    flags = [flag for flag in FLAGS if not flag.startswith("--task=")]
    assert chat_rl.main([*flags, "--task=GSM8K", f"--task-data={tmp_path}", "--num-iterations=2", "--save-every=1"]) == 0
    shutil.rmtree(tiny_run / "rl" / "step_000002")
    assert chat_rl.main([*flags, "--resume=auto"]) == 0
    assert list_steps(tiny_run / "rl") == [1, 2]


def test_updates_without_anything_to_learn_change_nothing(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is answered is worth the same; the loss is that of nothing, not a division by none."""
    monkeypatch.setattr(RolloutLoader, "_judge", lambda *_: 1.0)
    assert chat_rl.main([*FLAGS, "--num-iterations=2", "--kl-weight=0"]) == 0
    rows = [row for row in read_json_lines(tiny_run / "rl" / "metrics.jsonl") if "train/loss" in row]
    assert [(row["train/loss"], row["rl/mixed_groups"]) for row in rows] == [(0, 0)] * 2
    start = load_checkpoint(get_stage_dir("tiny", "sft"), 4)[0]
    assert all(torch.equal(tensor, start[name]) for name, tensor in _final_weights("tiny").items())


def test_momentum_alone_moves_nothing(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update that taught something, others that teach nothing."""
    calls = itertools.count()
    answers = 3 * 4  # of an update
    monkeypatch.setattr(RolloutLoader, "_judge", lambda *_: float(n % 2) if (n := next(calls)) < answers else 0.3)
    assert chat_rl.main([*FLAGS, "--num-iterations=3", "--save-every=1", "--keep-last=-1", "--eval-every=-1"]) == 0
    start, *after = (load_checkpoint(*place)[0] for place in (
        (tiny_run / "sft", 4), (tiny_run / "rl", 1), (tiny_run / "rl", 2), (tiny_run / "rl", 3)))  # fmt: skip
    assert not torch.equal(start["lm_head.weight"], after[0]["lm_head.weight"])
    assert all(torch.equal(state[name], tensor) for state in after[1:] for name, tensor in after[0].items())


def test_the_best_checkpoint_has_solved_the_most(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = iter((0.9, 0.2, 0.7, 0.1, 0.3))  # the first is of the model at the start, of which rl saves no checkpoint
    measure = chat_rl.evaluate_task
    monkeypatch.setattr(chat_rl, "evaluate_task", lambda *a, **k: replace(measure(*a, **k), pass_at={1: next(solved), 2: 1.0}))
    assert chat_rl.main([*FLAGS, "--num-iterations=4", "--save-every=1", "--eval-every=1", "--keep-last=1"]) == 0
    assert list_steps(tiny_run / "rl") == [2, 4]


def test_bad_input_of_the_command(tiny_run: Path, tmp_path: Path) -> None:
    write_gsm8k(tmp_path, 9)
    for flags, words in (
        (["--task=GSM8K", f"--task-data={tmp_path}"], "GSM8K has too few problems to hold some out"),
        (["--task=GSM8K", "--task-data=/nowhere"], "nowhere"),
        (["--max-new-tokens=128"], "context of 128"),
        (["--model-tag=absent"], "absent"),
        (["--objective=magic"], "magic"),
        (["--examples-per-step=0"], "--examples-per-step 0 is too small"),
        (["--num-epochs=0"], "--num-epochs 0 is too small"),
        (["--kl-weight=-1"], "--kl-weight -1 is out of range: choose 0 or more"),
    ):
        with pytest.raises(NanochatError, match=words):
            chat_rl.main([*FLAGS, *flags])
    assert not (tiny_run / "rl").exists()


@pytest.mark.slow
def test_reward_rises(ending: Engine) -> None:
    """A small model finds out, from rewards alone, that the letter e is what is wanted."""
    ending.model.init_weights(0)
    ending.model.train()
    optimizer = ending.model.setup_optimizer(matrix_lr=0.01, embedding_lr=0.05, unembedding_lr=0.004, scalar_lr=0.0)
    settings = _settings(examples_per_step=4, num_samples=16)
    loader = RolloutLoader(ending, Vowels(), settings, micro_batches=1)
    loss_fn, count_fn = make_policy_loss(settings)
    rewards = []
    for _ in range(30):
        batch = next(loader)
        (loss_fn(ending.model, batch) / count_fn(batch).clamp(min=1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(loader.metrics()["rl/reward"])
    assert sum(rewards[:3]) / 3 < 0.15
    assert sum(rewards[-3:]) / 3 > 0.5


@pytest.mark.slow
def test_two_ranks_reinforce_and_measure_like_one(many_ranks: Ranks, tiny_run: Path, base_dir: Path) -> None:
    """The same answers, rewards and scores; the update differs by rounding alone."""
    flags = ["--num-iterations=1", "--objective=reinforce", "--examples-per-step=4", "--eval-examples=3"]
    measure = ["--model-tag=tiny", "-a", "Arithmetic", "-x", "9", "-n", "2", "-t", "1", "-m", "8", "--device-type=cpu"]
    metrics, scores = [], []
    for ranks in (1, 2):
        many_ranks.run(ranks, "-m", "tests.reinforce", *FLAGS, *flags)
        many_ranks.run(ranks, "-m", "scripts.chat_eval", *measure)
        rows = read_json_lines(tiny_run / "rl" / "metrics.jsonl")
        metrics.append({name: value for row in rows for name, value in row.items() if name.startswith(("rl/", "val/"))})
        (path,) = (tiny_run / "sft" / "chat_eval").glob("*/Arithmetic*")
        scores.append(sorted(read_json_lines(path), key=lambda row: row["index"]))
        shutil.move(tiny_run / "rl", base_dir / f"rl{ranks}")
        shutil.rmtree(tiny_run / "sft" / "chat_eval")
    speed = "rl/rollout_tok_per_s"
    assert metrics[0].pop(speed) > 0 and metrics[1].pop(speed) > 0
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6) and scores[0] == scores[1]
    one, two = (load_checkpoint(base_dir / f"rl{ranks}", 1)[0] for ranks in (1, 2))
    assert not torch.equal(one["lm_head.weight"], load_checkpoint(tiny_run / "sft", 4)[0]["lm_head.weight"])
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-3, rtol=1e-2, msg=name)


def test_seeds_of_two_runs_share_no_draw(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, run = [], engine.run
    monkeypatch.setattr(engine, "run", lambda answers: drawn.append([a.params.seed for a in answers]) or run(answers))
    for seed in (1, 2):
        next(RolloutLoader(engine, Vowels(), _settings(max_tokens=4, seed=seed), 1))
    assert len({*drawn[0], *drawn[1]}) == 24


def test_a_reference_is_kept_to_where_rewards_say_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RolloutLoader, "_judge", lambda *_: 1.0)
    for kl_weight, rows in ((0.1, 8), (0.0, 0)):
        settings = _settings(examples_per_step=2, max_tokens=4, kl_weight=kl_weight)
        _, targets, *_ = next(RolloutLoader(engine, Vowels(), settings, 1))
        assert (targets >= 0).any(dim=1).sum() == rows


def test_prompts_that_were_cut_are_counted(tokenizer: Tokenizer) -> None:
    class Same(Vowels):
        def get_example(self, index: int) -> Conversation:
            return super().get_example(0)

    length = len(tokenizer.render_for_completion(Same()[0]))
    for context, cut in ((length + 8, 0), (length + 7, 2)):
        engine = make_engine(tokenizer, context)
        loader = RolloutLoader(engine, Same(), _settings(examples_per_step=2, num_samples=2, max_tokens=8), 1)
        next(loader)
        assert loader.metrics()["rl/shortened_prompts"] == cut and engine.model.training


def test_shares_of_unfinished_answers_and_mixed_groups(ending: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RolloutLoader, "_judge", lambda self, problem, answer: float(len(answer.tokens) > 1))
    loader = RolloutLoader(ending, Vowels(), _settings(examples_per_step=8, max_tokens=4), 1)
    answers, _ = _draw(loader)
    found = loader.metrics()
    unfinished = [answer.stop_token is None for answer in answers]
    assert found["rl/unfinished"] == sum(unfinished) / 32 and 0 < sum(unfinished) < 32
    groups = [{len(answer.tokens) > 1 for answer in answers[i : i + 4]} for i in range(0, 32, 4)]
    mixed = sum(len(group) == 2 for group in groups)
    assert found["rl/mixed_groups"] == mixed / 8 and 0 < mixed < 8
    assert found["rl/answer_tokens"] == sum(sum(answer.masks) for answer in answers) / 32
