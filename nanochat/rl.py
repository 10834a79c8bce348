"""Learning from rewards: rollouts of a task, advantages, and the policy-gradient loss. Used by scripts/chat_rl.

An update answers some problems several times each with the current weights, rewards the answers, and makes better ones
more likely. Tool output is not learned; the token that ends an answer is.

Methods: REINFORCE (Williams 1992), GRPO (arXiv 2402.03300), DAPO's normalization by tokens and its filtering of groups
with equal rewards (arXiv 2503.14476), without division by the group's standard deviation (arXiv 2503.20783).
To add an objective, extend `compute_advantages` and `OBJECTIVES`, and decide in `_pack` and `make_policy_loss` whether
tokens or answers are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nanochat.chat_eval import verdict
from nanochat.common import NanochatError
from nanochat.cpu import usable_cores
from nanochat.cross_entropy import token_losses
from nanochat.engine import Engine
from nanochat.gpt import GPT, LOGIT_CAP
from nanochat.lanes import epoch_order
from nanochat.ranks import all_or_none, sum_over_ranks
from nanochat.sampling import SamplingParams
from nanochat.sequence import Sequence as Answer
from nanochat.trimming import prompt_room, trim_prompt

if TYPE_CHECKING:
    from tasks.common import Conversation, Task

OBJECTIVES = ("dapo", "grpo", "reinforce")
CORRECTION_LIMIT = 2.0  # upper limit on the ratio of a token's probabilities in training and in sampling
ROW_STEP = 64  # tokens: rows are padded to a multiple of this, so that few shapes occur

# (inputs, targets, advantages, scale, sampled_logprobs): (B, T) int64, (B, T) int64 with -1 where nothing was sampled,
# (B, 1) float32, (B, 1) float32 the weight of a token, (B, T) float32 its log-probability when it was drawn
RolloutBatch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class RolloutSettings:
    """How answers are drawn and compared. Raises NanochatError for meaningless values."""

    objective: str = "dapo"
    examples_per_step: int = 16
    num_samples: int = 16  # answers to a problem
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    kl_weight: float = 0.0  # weight of the KL penalty against the starting model
    seed: int = 42

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise NanochatError(f"--objective {self.objective!r} is not known: choose {', '.join(OBJECTIVES)}")
        if self.num_samples * (self.examples_per_step if self.objective == "reinforce" else 1) < 2:
            raise NanochatError(f"--num-samples {self.num_samples} leaves nothing to compare: choose 2 or more")
        if self.temperature < 0.01:
            raise NanochatError(f"--temperature {self.temperature} leaves nothing to explore: choose 0.01 or more")
        if self.top_k == 1:  # its answers to a problem would all be the same
            raise NanochatError("--top-k 1 leaves nothing to explore: choose 2 or more, or 0 for all tokens")
        if self.kl_weight > 0 and self.top_k > 0:
            raise NanochatError("--kl-weight compares whole distributions: leave --top-k at 0 with it")
        self.sampling()

    def sampling(self) -> SamplingParams:
        """How each answer is drawn, apart from its seed. Raises NanochatError."""
        return SamplingParams(self.temperature, self.top_k, max_tokens=self.max_tokens, policy_logprobs=True)


def fill_in(rewards: Sequence[float | None]) -> list[float]:
    """The rewards of a problem's answers; one that never ended (None) gets the lowest reward of the others, at most 0.

    With more than that, a model would learn not to stop.
    """
    least = min([0.0, *(reward for reward in rewards if reward is not None)])
    return [least if reward is None else reward for reward in rewards]


def compute_advantages(rewards: torch.Tensor, objective: str, baseline: float) -> torch.Tensor:
    """How much better each answer is than expected; (problems, answers) float32, like the rewards.

    dapo: compared to the mean of its group; grpo: the same in units of the group's standard deviation; both give 0 in a
    group with equal rewards. reinforce: compared to `baseline`, the mean reward of the whole step.
    """
    if objective == "reinforce":  # 0 for rewards that equal the mean up to rounding
        return (rewards - baseline).masked_fill(torch.isclose(rewards, torch.full_like(rewards, baseline), rtol=1e-6), 0.0)
    relative = rewards - rewards.mean(dim=1, keepdim=True)
    if objective == "grpo":
        relative = relative / rewards.std(dim=1, keepdim=True, correction=0).clamp(min=1e-6)
    same = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # rounding may move their mean
    return relative.masked_fill(same, 0.0)


class RolloutLoader:
    """Endless micro-batches of rollouts, `micro_batches` per update; requesting an update's first one draws all of them.

    Each rank answers its share of an update's problems. The next rollouts depend only on the number of the update and the
    weights, so a resumed run continues as it would have. `metrics()` describes the newest update.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        settings: RolloutSettings,
        micro_batches: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if settings.examples_per_step < world_size or len(task) < 1:
            raise NanochatError(
                f"{settings.examples_per_step} problems a step, of {len(task)}, are too few for {world_size} ranks: "
                "raise --examples-per-step or give more data"
            )
        self.engine, self.task, self.settings, self.micro_batches = engine, task, settings, micro_batches
        self.rank, self.world_size = rank, world_size
        self.device = engine.model.get_device()
        self.step = 0
        self._batches: list[RolloutBatch] = []
        self._metrics: dict[str, float] = {}

    def __iter__(self) -> Iterator[RolloutBatch]:
        return self

    def __next__(self) -> RolloutBatch:
        if not self._batches:
            answers, rewards, sums, seconds = all_or_none(self._roll_out)
            self._metrics = self._count(sums, seconds)
            self._batches = self._make_batches(answers, rewards, baseline=self._metrics["rl/reward"])
            self.step += 1
        return self._batches.pop(0)

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        self.step, self._batches = states[0]["step"], []

    # ------------------------------------------------------------------------- drawing and judging

    def _problems(self) -> list[tuple[int, int]]:
        """(place in the run, index) of this rank's problems in the update; each epoch is one pass in its own order."""
        places = range(self.step * self.settings.examples_per_step, (self.step + 1) * self.settings.examples_per_step)
        chosen = []
        for place in places[self.rank :: self.world_size]:
            epoch, at = divmod(place, len(self.task))
            chosen.append((place, int(epoch_order(self.settings.seed, epoch, len(self.task))[at])))
        return chosen

    def _roll_out(self) -> tuple[list[Answer], torch.Tensor, torch.Tensor, float]:
        """For this rank's problems: (answers, rewards (problems, num_samples) float32, their `_sum_up`, seconds)."""
        started = time.perf_counter()
        settings, engine, n = self.settings, self.engine, self.settings.num_samples
        chosen = self._problems()
        problems = [self.task[index] for _, index in chosen]
        most = prompt_room(engine.model.config.sequence_len, settings.max_tokens, context_share=1)
        prompts = [engine.tokenizer.render_for_completion(problem) for problem in problems]
        engine.forget()  # the weights have changed since the last update
        engine.model.eval()
        params = settings.sampling()
        # The seed follows from the place in the run, so an answer's random numbers do not depend on the number of ranks.
        answers = [
            Answer(trim_prompt(prompt, most), replace(params, seed=(settings.seed << 40) + n * place + k))
            for (place, _), prompt in zip(chosen, prompts, strict=True)
            for k in range(n)
        ]
        engine.run(answers)
        engine.model.train()
        with ThreadPoolExecutor(usable_cores()) as pool:  # judging may mean running a program
            judged = list(pool.map(self._judge, [problem for problem in problems for _ in range(n)], answers))
        table = torch.tensor([fill_in(judged[i : i + n]) for i in range(0, len(judged), n)]).view(len(problems), n)
        sums = self._sum_up(answers, table, shortened=sum(len(p) > most for p in prompts))
        return answers, table, sums, time.perf_counter() - started

    def _judge(self, problem: Conversation, answer: Answer) -> float | None:
        """The reward of an answer; None if it never ended."""
        if answer.stop_token is None:
            return None
        return verdict(self.task.reward, problem, self.engine.tokenizer.decode(answer.tokens))

    def _sum_up(self, answers: list[Answer], rewards: torch.Tensor, shortened: int) -> torch.Tensor:
        """This rank's sums for `_count`: (7,), on the device."""
        sampled = sum(sum(answer.masks) for answer in answers)
        unfinished = sum(answer.stop_token is None for answer in answers)
        mixed = (rewards != rewards[:, :1]).any(dim=1).sum()
        return torch.tensor(
            [rewards.numel(), rewards.sum(), len(rewards), mixed, sampled, unfinished, shortened],
            dtype=torch.float64 if self.device.type != "mps" else torch.float32, device=self.device,
        )  # fmt: skip

    def _count(self, sums: torch.Tensor, seconds: float) -> dict[str, float]:
        """Metrics of this update's answers over all ranks, from each rank's `_sum_up`."""
        sum_over_ranks(sums)
        count, reward, groups, mixed, sampled, unfinished, shortened = sums.tolist()
        return {
            "rl/reward": reward / count,
            "rl/mixed_groups": mixed / groups,  # only these teach something
            "rl/answer_tokens": sampled / count,
            "rl/unfinished": unfinished / count,
            "rl/shortened_prompts": shortened,
            "rl/rollout_tok_per_s": round(sampled / seconds, 1),
        }

    # ------------------------------------------------------------------------- packing

    def _make_batches(self, answers: list[Answer], rewards: torch.Tensor, baseline: float) -> list[RolloutBatch]:
        """Sort answers by length into micro_batches batches.

        Problems that teach nothing are left out whole: a mere answer, at its group's mean, counts in the loss's denominator.
        """
        advantages = compute_advantages(rewards, self.settings.objective, baseline)
        teaches = (advantages != 0).any(dim=1, keepdim=True).expand_as(advantages).flatten().tolist()
        rows = zip(answers, advantages.flatten().tolist(), teaches, strict=True)
        kept = [(answer, a) for answer, a, taught in rows if taught or self.settings.kl_weight > 0]
        kept.sort(key=lambda pair: pair[0].length)
        bounds = [len(kept) * i // self.micro_batches for i in range(self.micro_batches + 1)]
        return [self._pack(kept[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]

    def _pack(self, rows: list[tuple[Answer, float]]) -> RolloutBatch:
        """Rows of prompt and answer; an empty batch becomes one row in which nothing was sampled."""
        longest = max((answer.length for answer, _ in rows), default=1)
        T = min(-(-longest // ROW_STEP) * ROW_STEP, self.engine.model.config.sequence_len)
        B = max(1, len(rows))
        ids = np.full((B, T + 1), self.engine.tokenizer.get_bos_token_id(), dtype=np.int64)
        targets = np.full((B, T), -1, dtype=np.int64)
        sampled_logprobs = np.zeros((B, T), dtype=np.float32)
        advantages, scale = np.zeros((B, 1), dtype=np.float32), np.ones((B, 1), dtype=np.float32)
        for i, (answer, advantage) in enumerate(rows):
            stop = [] if answer.stop_token is None else [answer.stop_token]
            text = [*answer.prompt, *answer.tokens, *stop]
            ids[i, : len(text)] = text
            drawn = len(answer.prompt) - 1 + np.flatnonzero([*answer.masks, *[1 for _ in stop]])
            targets[i, drawn] = ids[i, drawn + 1]
            sampled_logprobs[i, drawn] = answer.policy_logprobs
            advantages[i] = advantage
            if self.settings.objective != "dapo":
                scale[i] = 1 / max(1, len(drawn))  # every answer counts the same, however long
        arrays = (ids[:, :-1], targets, advantages, scale, sampled_logprobs)
        return tuple(torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays)


# ----------------------------------------------------------------------------- the loss


def target_logprobs(model: GPT, inputs: torch.Tensor, targets: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """(B, T) float32: log-probabilities of the targets in the distribution that sampling uses; 0 where a target is -1."""
    head = model.lm_head.weight[: model.config.vocab_size]
    losses = token_losses(model.features(inputs).flatten(0, 1), head, targets.flatten(), LOGIT_CAP, temperature, top_k)
    return -losses.view(targets.shape)


def make_policy_loss(
    settings: RolloutSettings, reference: GPT | None = None
) -> tuple[Callable[[GPT, RolloutBatch], torch.Tensor], Callable[[RolloutBatch], torch.Tensor]]:
    """(loss_fn, count_fn) for a Trainer: the summed loss of a batch, and the count that an update's sum is divided by.

    The count is the number of sampled tokens for dapo, of answers for the others. Training computes a token's probability
    slightly differently than sampling did (other kernels, other rounding), so each token is weighted by the ratio of the
    two, at most CORRECTION_LIMIT (truncated importance sampling). reference: the model to stay close to, by the k3 estimate
    of the KL divergence (http://joschu.net/blog/kl-approx.html).
    """

    def loss_fn(model: GPT, batch: RolloutBatch) -> torch.Tensor:
        inputs, targets, advantages, scale, sampled_logprobs = batch
        logprobs = target_logprobs(model, inputs, targets, settings.temperature, settings.top_k)
        correction = (logprobs.detach() - sampled_logprobs).exp().clamp(max=CORRECTION_LIMIT)
        gain = advantages * correction * logprobs
        if reference is not None:
            with torch.no_grad():
                expected = target_logprobs(reference, inputs, targets, settings.temperature, 0)
            log_ratio = expected - logprobs
            gain = gain - settings.kl_weight * (log_ratio.exp() - log_ratio - 1)
        return -(gain * scale).sum()

    def count_fn(batch: RolloutBatch) -> torch.Tensor:
        supervised = batch[1] >= 0
        return supervised.sum() if settings.objective == "dapo" else supervised.any(dim=1).sum()

    return loss_fn, count_fn
