"""THE training loop. Pretraining, SFT and RL differ only in the loader, the loss and the callbacks that they bring.

`state_dict()` holds everything that decides what comes next: a run that is stopped and resumed continues exactly as if
it had not been, on the same number of ranks or on another. Order at a step: save, evaluate, sample, then train. So an
exception in an evaluation costs nothing; a kill costs the updates since the newest checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from nanochat.checkpoint_manager import MODEL_FILE, OPTIMIZER_FILE, save_sharded
from nanochat.checkpoint_writer import CheckpointWriter
from nanochat.common import NanochatError, describe_error, get_dist_info
from nanochat.compilation import can_compile, try_to_compile
from nanochat.devices import is_lost_connection, peak_memory_bytes, synchronize
from nanochat.gpt import GPT
from nanochat.loss_scale import LossScale
from nanochat.machine import measure_matmul_rate, reference_rate
from nanochat.metrics import METRICS_FILE, MetricsLog, read_metrics, series
from nanochat.optim import MuonAdamW
from nanochat.pace import TimeLimit
from nanochat.passes import Batch, LossFn, Passes, count_supervised, summed_loss
from nanochat.progress import Progress
from nanochat.quantities import describe_line, quantity
from nanochat.ranks import all_or_none, any_rank, gather_objects, on_rank0, sum_over_ranks
from nanochat.runs import list_steps
from nanochat.schedules import Schedule
from nanochat.stopping import StopRequest, collect_garbage, frozen_garbage

Evaluation = Callable[[], dict[str, float]]
COLLECT_EVERY = 200  # steps: a recomputed block or a save leaves some garbage that refers to itself
NOT_SAVED = "warning: a checkpoint could not be written; training goes on."


class Loader(Protocol):
    """An endless source of micro-batches whose position can be saved and restored exactly."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...  # this rank's, as JSON
    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None: ...  # those of all ranks that saved


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Schedule):
    """A schedule and the loop's other settings. Periods are in steps; 0 or less: only at the last step."""

    total_batch_size: int  # tokens in an update, over all ranks; 0: it varies, and speed is not counted in tokens
    grad_accum_steps: int = 1
    eval_first: bool = False  # evaluate also before the first update
    sample_every: int = 2000  # below 0: not at the last step either
    save_every: int = -1  # below 0: before each evaluation, which may kill the process (out of memory)
    keep_last: int = -1  # newest checkpoints to keep, besides the best; 0 or less keeps all
    compare_every: int = 100  # check that all ranks still hold the same parameters
    best_metric: str = "-val/bpb"  # the evaluation's metric by which the best checkpoint is chosen; with -: lower is better
    log_every: int = 1
    compile: bool = True
    stage_name: str = "training"


class Trainer:
    """Trains `model` from `loader` until `config.num_iterations` updates are done.

    stage_dir: where nothing else may write meanwhile; a stage (stage.py) holds its lock.
    evaluations: pairs (period in steps, () -> {"val/bpb": ...}), called in this order with the model in eval mode.
    sample: () -> [{"prompt": ..., "text": ...}].
    loss_fn: (model, batch) -> loss, a sum over rows, since a pass may take only some rows at a time (passes.py); the
    trainer divides it by the sum of count_fn(batch) over the step.
    step_metrics: () -> more entries for a step's row of metrics, called with this rank's gradients, before the update.
    update_metrics: the same, called after the update; together they tell what it changed.
    time_limit: for a run that is to end at some time, whatever else the machine does.
    meta: what a checkpoint records besides the model's config (tokenizer, settings, lineage), as JSON.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: MuonAdamW,
        loader: Loader,
        config: TrainConfig,
        stage_dir: Path,
        metrics: MetricsLog,
        meta: dict[str, Any],
        evaluations: Sequence[tuple[int, Evaluation]] = (),
        sample: Callable[[], list[dict[str, str]]] | None = None,
        loss_fn: LossFn = summed_loss,
        count_fn: Callable[[Batch], torch.Tensor] = count_supervised,
        step_metrics: Callable[[], dict[str, float]] = dict,
        update_metrics: Callable[[], dict[str, float]] = dict,
        time_limit: TimeLimit | None = None,
    ) -> None:
        self.model, self.optimizer, self.loader, self.config = model, optimizer, loader, config
        self._recompute_blocks = model.recompute_blocks
        self.stage_dir, self.metrics, self.meta = stage_dir, metrics, meta
        self._resume = f"the same command and --model-tag {stage_dir.parent.name} --resume auto"
        self.evaluations = evaluations
        self.sample_fn = None if model.is_sharded else sample  # sampling needs an unsharded model
        self.count_fn, self._time_limit = count_fn, time_limit
        self.step_metrics, self.update_metrics = step_metrics, update_metrics
        self._passes, self._loss_scale = Passes(model, loss_fn), LossScale(model.get_compute_dtype())
        self.ddp, self.rank, _, self.world_size = get_dist_info()
        self.device = model.get_device()
        self._flops_per_token = [model.estimate_flops(idle_blocks) for idle_blocks in (model.config.n_layer - 1, 0)]
        self.matmul_rate: float | None = None  # of all ranks together, FLOP/s; None until it is measured
        self.step = 0
        self.time_s, self.flops = 0.0, 0  # spent in training only, over all sessions of the run
        self._logged = (0.0, 0)  # time_s and flops when the newest row was written
        self.results: dict[str, float] = {}  # of the newest evaluations
        self._scores: dict[int, float] = {}  # by step, the results that decide which is the best
        self._saved_step: int | None = None  # the step of the newest checkpoint
        self._writer = CheckpointWriter(stage_dir, config.keep_last)
        self._loader_state: dict[str, Any] | None = None  # while batches are fetched, the state before them
        self._pending: list[torch.Tensor] = []  # losses not yet read from the device
        self._stop = StopRequest()

    # ------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All that decides how the run continues, apart from the tensors of model and optimizer; JSON. A collective call."""
        return {
            "step": self.step, "time_s": self.time_s, "flops": self.flops, "results": self.results,
            "loader": gather_objects(self._loader_state or self.loader.state_dict()),
            "loss_scale": self._loss_scale.state_dict(), "expansion_step": self.config.expansion_step,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the trainer that saved this state would have; it may have had another number of ranks."""
        self.step, self.time_s, self.results = state["step"], state["time_s"], state["results"]
        # Blocks that have joined stay, also where the plan has changed since.
        expansion_step = state.get("expansion_step", self.config.expansion_step)
        self.config = self.config.replanned(self.config.num_iterations, expansion_step)
        # A run that did not count yet has worked as planned.
        self.flops = state.get("flops", self.config.total_batch_size * self._work(self.step))
        self._logged = (self.time_s, self.flops)
        self._saved_step = self.step
        self._loss_scale.load_state_dict(state["loss_scale"])
        self.loader.load_state_dict(state["loader"])
        self._scores = on_rank0(self._read_scores)

    def save(self, wait: bool = False) -> None:
        """Begin to write a checkpoint of this step; `wait`: return once it is on disk (a collective call).

        With `wait`, raises OSError if it cannot be written. Otherwise a failure is reported when the next checkpoint is due,
        and training goes on; earlier checkpoints stay.
        """
        self._compare_ranks()
        self._check_finite()
        if self.rank == 0:
            self._report_failed_save()  # first: a step that was not written cannot be the best
        meta = {"model_config": asdict(self.model.config), **self.meta, "trainer": self.state_dict()}
        optimizer_state = self.optimizer.state_dict()
        if self.model.is_sharded:
            self._save_sharded(optimizer_state, meta, wait)
            return
        best = self.best_step if self.rank == 0 else None
        checkpoint = (self.step, self.model.state_dict(), optimizer_state, meta, best)
        self._saved_step = self.step
        if wait:
            on_rank0(lambda: self._writer.write(*checkpoint))
        elif self.rank == 0:
            self._writer.start(*checkpoint)

    def _save_sharded(self, optimizer_state: dict[str, torch.Tensor], meta: dict[str, Any], wait: bool) -> None:
        """Each rank writes its part while all wait: there is no memory for a second copy of such a model."""
        try:
            states = {MODEL_FILE: self.model.state_dict(), OPTIMIZER_FILE: optimizer_state}
            save_sharded(self.stage_dir, self.step, states, meta)
            self._prune()
            self._saved_step = self.step
        except (OSError, NanochatError) as error:
            if wait:
                raise
            self.progress.print(f"{NOT_SAVED} {describe_error(error)}")

    @property
    def best_step(self) -> int | None:
        """Of the steps on disk the one with the best evaluation, the first of equal ones; None if none was evaluated."""
        sign = -1 if self.config.best_metric.startswith("-") else 1
        known = [step for step in list_steps(self.stage_dir) if step in self._scores]
        return max(known, key=lambda step: sign * self._scores[step], default=None)

    def _read_scores(self) -> dict[int, float]:
        """The results up to this step that decide which is the best; later ones are of an abandoned attempt."""
        rows = [row for row in read_metrics(self.stage_dir / METRICS_FILE) if row["step"] <= self.step]
        return dict(zip(*series(rows, self.config.best_metric.removeprefix("-")), strict=True))

    def _prune(self) -> None:
        if self.rank == 0:
            self._writer.prune(self.step, self.best_step)

    def _report_failed_save(self) -> bool:
        """Wait for the checkpoint being written; True if it failed."""
        try:
            self._writer.wait()
            return False
        except OSError as error:
            self.progress.print(f"{NOT_SAVED} {describe_error(error)}")
            return True

    def _save_before_leaving(self) -> None:
        if any_rank(self._report_failed_save()):
            self._saved_step = None
        if self.step > 0 and self.step != self._saved_step:
            self.save(wait=True)
            self.progress.print(f"step {self.step} is saved; once the cause is fixed, go on with {self._resume}")

    def _check_finite(self) -> None:
        """Raise NanochatError if parameters are not finite: such a checkpoint would take the place of a good one."""
        params: list[Any] = [p for group in self.optimizer.groups for p in group.params]
        parts = [p.to_local() if self.model.is_sharded else p for p in params]
        if any_rank(not torch.stack([part.isfinite().all() for part in parts]).all()):
            raise NanochatError(f"parameters are no longer numbers at step {self.step}: {self._way_out()}")

    def _compare_ranks(self) -> None:
        """Raise NanochatError if checksums show that ranks no longer hold the same parameters."""
        if not self.ddp or self.model.is_sharded:
            return
        names, sums = zip(*((name, p.data.view(torch.int32).sum()) for name, p in self.model.named_parameters()), strict=True)
        least = torch.stack(sums)
        most = least.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        different = [name for name, same in zip(names, (least == most).tolist(), strict=True) if not same]
        if different:
            raise NanochatError(
                f"the ranks hold different parameters at step {self.step} ({len(different)}, first {different[0]}), as after "
                f"a fault of memory or network: {self._last_good()}; go on from there with {self._resume}"
            )

    # ------------------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run to the end. Ctrl-C, SIGTERM or SIGHUP saves a checkpoint and raises KeyboardInterrupt.

        Raises NanochatError if the loss stops being a number, naming the last good checkpoint.
        """
        with (
            Progress(self.config.stage_name, self.config.num_iterations, start=self.step, work=self._work) as self.progress,
            self._stop.listening(),
            frozen_garbage(),
        ):
            self.model.train()
            try:
                self._loop()
            finally:
                self._report_failed_save()
                self.metrics.close()

    def _loop(self) -> None:
        while True:
            self._keep_to_time()
            config = self.config
            last = self.step >= config.num_iterations
            self._choose_blocks()
            first = config.eval_first and self.step == 0
            due = [evaluate for period, evaluate in self.evaluations if last or first or self._due(period)]
            saves = self._due(config.save_every) if config.save_every >= 0 else bool(due) and self.step > 0
            samples = self._due(config.sample_every) or (last and config.sample_every >= 0)
            if due or saves or samples:
                self._settle()
            if (last or saves) and self.step != self._saved_step:
                self.save(wait=last)
            if due:
                self._evaluate(due)
            if samples:
                self._sample()
            if last:
                self._prune()  # the last step may be the best now, in place of an earlier one
                if any_rank(self._stop.asked):
                    raise KeyboardInterrupt  # all is saved, but the command after this one must not start
                return
            if self._due(config.compare_every):
                self._compare_ranks()
            if self._due(COLLECT_EVERY):
                collect_garbage()
            self._get_up_to_speed()
            self._train_step()
            self._check_stop()

    def _keep_to_time(self) -> None:
        """Plan as many updates as end in time, fewer or more than were planned; all schedules follow."""
        if self._time_limit is None or self._pending:  # while losses are pending, a GPU may still be at work on earlier steps
            return
        planned, updates = self.config.num_iterations, self._time_limit.updates(self.step, self.time_s, self.config)
        if updates == planned:
            return
        self.config = self.config.replanned(updates, self.config.expansion_step)
        self.progress.total = updates
        why = "slower than planned" if updates < planned else "faster than planned"
        self.progress.print(f"step {self.step}: {why}; {updates} updates in place of {planned}, to end in time")
        self._time_limit.record(updates)

    def _choose_blocks(self) -> None:
        """Decide which blocks learn in this step: only the last one, or all."""
        idle_before = self.model.idle_blocks
        expanded = self.step >= self.config.expansion_step
        self.model.idle_blocks = 0 if expanded else self.model.config.n_layer - 1
        if idle_before and expanded:
            self.progress.print(f"step {self.step}: all blocks learn from here on, and updates take longer")

    def _get_up_to_speed(self) -> None:
        """Measure the device and compile: before the first update, or after it in a new run on a CPU.

        On a CPU this takes half a minute, and a first update without it shows within seconds that data, memory and loss are
        right; a resumed run computes what the uninterrupted one did. A GPU may have no memory for an uncompiled batch.
        """
        to_compile = self.config.compile and not self.model.is_compiled
        if to_compile and (reason := can_compile(self.device)) is not None:
            self._give_up_compiling(reason)
            to_compile = False
        self.model.recompute_blocks = self._recompute_blocks
        if self.device.type == "cpu" and self.step == 0 and not self.model.is_compiled:
            # Uncompiled blocks keep several times as much for the backward pass; if not run in pieces, recompute them.
            self.model.recompute_blocks |= to_compile and not self._passes.in_pieces
            return
        if self.matmul_rate is None:
            self.matmul_rate = self._measure_device()
        if to_compile:
            self._compile()

    def _compile(self) -> None:
        if (reason := try_to_compile(self.device)) is not None:
            self._give_up_compiling(reason)
            return
        if self.device.type == "cpu":
            self.progress.print("compiling; the next step takes up to a minute, later runs find it cached")
        self.model.compile()

    def _give_up_compiling(self, reason: str) -> None:
        self.progress.print(f"training without torch.compile: {reason}")
        self.config = replace(self.config, compile=False)

    def _measure_device(self) -> float:
        """The rate of all ranks' matrix products together, FLOP/s."""
        return reference_rate(self.device, self.model.get_compute_dtype()) * self.world_size

    def _settle(self) -> None:
        """Before anything else is computed, wait for training queued on a GPU, and count it as training time."""
        started = time.perf_counter()
        synchronize(self.device)
        self.time_s += time.perf_counter() - started

    def _due(self, period: int) -> bool:
        return period > 0 and self.step > 0 and self.step % period == 0

    def _train_step(self) -> None:
        """One update: gradients of all micro-batches, schedules, optimizer."""
        config = self.config
        started = time.perf_counter()
        batches, count = self._fetch()
        scale = self._loss_scale.factor
        loss = self._passes.run(batches, count.clamp(min=1) / scale) / scale
        factor = self._set_schedules()
        # In RL (total_batch_size 0), answers that all earn the same teach nothing: momentum would still move the model.
        learns = (config.total_batch_size > 0 or bool(count)) and self._loss_scale.unscale(self.model.parameters())
        self.flops += config.total_batch_size * (self._work(self.step + 1) - self._work(self.step))
        self.step += 1
        is_logged = self._due(config.log_every) or self.step == config.num_iterations
        more = self.step_metrics() if is_logged else {}  # now, for the update may overwrite the gradients
        if learns:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._pending.append(loss)
        if is_logged:
            self._log(factor, started, more | self.update_metrics())
        else:
            self.time_s += time.perf_counter() - started

    def _fetch(self) -> tuple[list[Batch], torch.Tensor]:
        """This update's batches, and the count over all ranks that its loss is divided by (0: nothing to learn).

        If the data fails on any rank, all ranks save the state before this update and stop.
        """
        self._loader_state = self.loader.state_dict()
        try:
            batches = all_or_none(lambda: [next(self.loader) for _ in range(self.config.grad_accum_steps)])
        except Exception:  # whatever it is, nothing learned so far may be lost
            self._save_before_leaving()
            raise
        self._loader_state = None
        count = torch.stack([self.count_fn(batch) for batch in batches]).sum()
        sum_over_ranks(count)
        return batches, count

    def _set_schedules(self) -> float:
        """Set learning rates, momentum and weight decay for this step; returns the learning rate's factor."""
        factor, decay_factor = self.config.learning_rate_factor(self.step), self.config.weight_decay_factor(self.step)
        for group in self.optimizer.groups:
            group.lr = group.initial_lr * factor
            group.weight_decay = group.initial_weight_decay * decay_factor
            group.momentum = self.config.muon_momentum(self.step, group.initial_momentum)
        return factor

    def _log(self, factor: float, started: float, more: dict[str, float]) -> None:
        """Read the pending losses (this waits for the device) and write one row for the steps since the last row."""
        losses = torch.stack(self._pending)
        sum_over_ranks(losses)  # each rank holds its share of the loss
        values = losses.tolist()
        self._pending.clear()
        self.time_s += time.perf_counter() - started
        if not all(map(math.isfinite, values)):
            raise NanochatError(f"the loss is no longer a number at step {self.step}: {self._way_out()}")
        steps = len(values)
        time_before, flops_before = self._logged
        elapsed, self._logged = self.time_s - time_before, (self.time_s, self.flops)
        row = {"train/loss": sum(values) / steps, "train/lrm": factor}
        if batch_size := self.config.total_batch_size:
            row |= {
                "train/tok_per_s": round(batch_size * steps / elapsed, 1),
                "train/tokens": self.step * batch_size,
                "train/flops": self.flops,
            }
            if self.matmul_rate is not None:
                rate = (self.flops - flops_before) / elapsed
                if rate > self.matmul_rate and self.device.type == "cpu":  # other work slowed the measurement down
                    measure_matmul_rate.cache_clear()
                    self.matmul_rate = max(rate, self._measure_device())
                row["train/mfu"] = rate / self.matmul_rate
        row["train/peak_memory_mb"] = round(peak_memory_bytes(self.device) / 1e6)
        row |= more
        self._write_row(row)
        self.progress.update(self.step, *describe_line(row | self.results))

    def _write_row(self, values: dict[str, Any]) -> None:
        self.metrics.log({"step": self.step, "time_s": round(self.time_s, 4), **values})

    def _work(self, steps: int) -> int:
        """Floating-point operations that the present plan has in the first `steps` updates, per token of a batch."""
        alone = min(steps, self.config.expansion_step)
        one_block, all_blocks = self._flops_per_token
        return alone * one_block + (steps - alone) * all_blocks

    def _way_out(self) -> str:
        """Of a run that has diverged."""
        last_good = self._last_good()  # first, since it waits for a checkpoint that is being written
        goes_on = "resume from it" if list_steps(self.stage_dir) else "start again"
        return f"{last_good}; {goes_on} with a lower learning rate (--matrix-lr, --embedding-lr)"

    def _last_good(self) -> str:
        self._report_failed_save()
        steps = list_steps(self.stage_dir)
        return f"the last good checkpoint is step {steps[-1]} in {self.stage_dir}" if steps else "no checkpoint exists yet"

    # ------------------------------------------------------------------------- callbacks

    def _evaluate(self, evaluations: Sequence[Evaluation]) -> None:
        self.model.eval()
        try:
            with torch.no_grad():
                results = {name: value for evaluate in evaluations for name, value in evaluate().items()}
        except (Exception, KeyboardInterrupt) as error:
            # All ranks get here together (see all_or_none), unless a sharded model failed in the middle of a collective
            # computation or only some ranks received the Ctrl-C.
            together = not isinstance(error, KeyboardInterrupt) and not is_lost_connection(error) and not self.model.is_sharded
            if together or not self.ddp:
                self._save_before_leaving()
            raise
        self.model.train()
        self.results = {**self.results, **results}
        if math.isfinite(score := results.get(self.config.best_metric.removeprefix("-"), math.nan)):  # no other is logged
            self._scores[self.step] = score
        self._write_row(results)
        text = ", ".join(f"{name} {quantity(name).show(value)}" for name, value in results.items())
        self.progress.print(f"step {self.step}: {text}")

    def _sample(self) -> None:
        """Show what the model writes. Only rank 0 does; the others wait at the next collective."""
        if self.sample_fn is None or self.rank != 0:
            return
        self.model.eval()
        try:
            samples = self.sample_fn()
        except Exception as error:  # whatever it is, training goes on
            reason = describe_error(error) or repr(error)
            self.progress.print(f"warning: no samples at step {self.step}; training goes on. {reason}")
            samples = []
        for sample in samples:
            self._write_row({f"sample/{name}": sample[name] for name in ("prompt", "text")})
            self.progress.print(f"{sample['prompt']!r} -> {sample['text']!r}")
        self.model.train()

    # ------------------------------------------------------------------------- stopping

    def _check_stop(self) -> None:
        if any_rank(self._stop.asked):  # all ranks must agree: saving is collective
            self.save(wait=True)
            self.progress.print(f"stopped after step {self.step}; saved. Go on with {self._resume}")
            raise KeyboardInterrupt
