"""The stages of data preparation, and who runs them: this machine, a Ray cluster or Slurm. Used by scripts/data_prep."""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from nanochat import prep_steps as steps
from nanochat.common import NanochatError
from nanochat.cpu import usable_cores
from nanochat.files import atomic_write
from nanochat.prep_output import MAX_JOBS, OutputLayout, PrepSettings, describe_output
from nanochat.progress import Progress
from nanochat.settings import Arguments

MINHASH_BANDS = 14  # datatrove's own: 14 bands of 8 hashes find texts that share about 3 of 4 five-word sequences


@dataclass(frozen=True)
class PrepStage:
    """Steps that a number of tasks run in parallel, once all tasks of the previous stage are done."""

    name: str
    steps: list[PipelineStep]
    tasks: int


def build_stages(settings: PrepSettings, layout: OutputLayout) -> list[PrepStage]:
    """All stages of the work, in order."""
    read, write = steps.ReadShard(settings, layout), steps.WriteShard(settings, layout)
    near_stages, near_filter = _near_duplicates(settings, layout, read) if settings.min_hash else ([], [])
    return [
        PrepStage("scatter", [steps.ReadDocuments(settings), steps.ScatterDocuments(settings, layout)], settings.tasks),
        PrepStage("validation", [steps.ChooseValidation(settings, layout)], 1),
        *near_stages,
        PrepStage("gather", [read, *near_filter, write], settings.num_shards),
        PrepStage("manifest", [steps.WriteManifest(settings, layout)], 1),
    ]


def _near_duplicates(
    settings: PrepSettings, layout: OutputLayout, read: steps.ReadShard
) -> tuple[list[PrepStage], list[PipelineStep]]:
    """Stages that find near-duplicates with datatrove's MinHash, and the step that then drops them.

    It works on shards, whose documents are always the same, so the result does not depend on the number of tasks.
    """
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.hashing import HashConfig

    config = minhash.MinhashConfig(num_buckets=MINHASH_BANDS, seed=1, hash_config=HashConfig(hash_fc="sha1"))
    signatures, pairs, clusters = (str(layout.scratch / name) for name in ("signatures", "pairs", "clusters"))
    sign = minhash.MinhashDedupSignature(signatures, config, language=steps.SplitAtSpaces())
    num_pair_tasks = MINHASH_BANDS * max(1, settings.num_shards // 100)
    stages = [
        PrepStage("signatures", [read, sign], settings.num_shards),
        PrepStage("pairs", [minhash.MinhashDedupBuckets(signatures, pairs, config=config)], num_pair_tasks),
        PrepStage("clusters", [minhash.MinhashDedupCluster(pairs, clusters, config=config)], 1),
    ]
    return stages, [minhash.MinhashDedupFilter(clusters)]


# ----------------------------------------------------------------------------- executors


def run_here(args: Arguments, stages: list[PrepStage], layout: OutputLayout) -> None:
    """With the local or the Ray executor: stage by stage, until all is done."""
    if args.executor == "ray":
        import ray

        ray.init(log_to_driver=False, logging_level="ERROR")  # the cluster at RAY_ADDRESS, else this machine
    started = time.perf_counter()
    for stage in stages:
        options: dict[str, Any] = {"pipeline": stage.steps, "tasks": stage.tasks, "logging_dir": str(layout.log(stage.name))}
        if args.executor == "local":
            executor = LocalExecutor(**options, workers=args.workers or usable_cores())
        else:
            executor = RayPipelineExecutor(
                **options, workers=args.workers or -1, cpus_per_task=args.cpus_per_task, mem_per_cpu_gb=args.mem_per_cpu
            )
            print(f"{stage.name}: {stage.tasks} tasks")
        if executor.get_incomplete_ranks():
            executor.run()
        if failed := executor.get_incomplete_ranks():
            logs = layout.log(stage.name) / "logs"
            raise NanochatError(f"{len(failed)} of {stage.tasks} tasks of {stage.name} failed: {logs} say why")
    seconds = time.perf_counter() - started
    print(f"{layout.output}: {describe_output(layout)}; {seconds:.1f} s")


def submit(args: Arguments, stages: list[PrepStage], layout: OutputLayout) -> None:
    """With Slurm: one job array per stage, each after the previous one; returns when they are in the queue."""
    if not args.partition:
        raise NanochatError("--executor slurm needs a --partition: sinfo lists them")
    jobs_file = layout.output / "work" / "slurm_jobs"
    if jobs_file.exists() and (waiting := _in_queue(jobs_file.read_text(encoding="utf-8"))):
        raise NanochatError(f"jobs of {layout.output} are still in the queue ({waiting}): wait for them, or scancel them")
    activate = Path(sys.prefix) / "bin" / "activate"
    more = dict(item.partition("=")[::2] for item in args.sbatch)
    executor = None
    job_ids = []
    for stage in stages:
        executor = SlurmPipelineExecutor(
            stage.steps, stage.tasks, args.time, args.partition, depends=executor, logging_dir=str(layout.log(stage.name)),
            job_name=f"nanochat-{stage.name}", workers=args.workers or -1, cpus_per_task=args.cpus_per_task,
            mem_per_cpu_gb=args.mem_per_cpu, qos=more.get("qos"), venv_path=str(activate) if activate.exists() else None,
            sbatch_args={"kill-on-invalid-dep": "yes", **more}, tasks_per_job=math.ceil(stage.tasks / MAX_JOBS),
        )  # fmt: skip
        try:
            executor.run()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise NanochatError(f"sbatch did not take {stage.name} ({error}): submit from a machine of the cluster") from error
        if executor.job_id != -1:
            job_ids.append(str(executor.job_id))
            atomic_write(jobs_file, ",".join(job_ids))
            print(f"{stage.name}: {stage.tasks} tasks, job {executor.job_id}")
    print(f"submitted; {layout.manifest} appears when all is done; if jobs fail, the same command continues")


def _in_queue(job_ids: str) -> str:
    """Those of the jobs that are waiting or running; "" if Slurm no longer knows any of them."""
    result = subprocess.run(["squeue", "--noheader", "--format=%i", f"--jobs={job_ids}"], capture_output=True, text=True)
    return " ".join(result.stdout.split()) if result.returncode == 0 else ""


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor with one progress line, which notices when one of its processes dies."""

    def run(self) -> None:
        """Raises NanochatError if a task fails or its process dies; tasks that are done stay done."""
        ranks = self.get_incomplete_ranks()
        self.save_executor_as_json()
        done = self.tasks - len(ranks)
        with Progress(Path(self.logging_dir.path).name, self.tasks, unit="task", start=done) as progress:
            for number, _ in enumerate(self._run_tasks(ranks), done + 1):
                progress.update(number)

    def _run_tasks(self, ranks: list[int]) -> Iterator[None]:
        if min(self.workers, len(ranks)) == 1:
            for rank in ranks:
                with contextlib.redirect_stderr(io.StringIO()):  # where datatrove logs, beside its file
                    deepcopy(self)._run_for_rank(rank)
                yield
            return
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload([__name__])
        pool = ProcessPoolExecutor(min(self.workers, len(ranks)), context, initializer=_start_worker)
        try:
            for future in as_completed([pool.submit(self._run_for_rank, rank) for rank in ranks]):
                future.result()
                yield
        except BrokenProcessPool as error:
            raise NanochatError(
                "a worker process died, perhaps out of memory: the same command with fewer --workers continues from here"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Silences a worker on the screen and makes it end with the command, however that ends."""
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this is no worker")

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
