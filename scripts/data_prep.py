"""Raw text to shuffled, deduplicated, tokenized shards: python -m scripts.data_prep --input PATH --output DIR."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from nanochat.common import NanochatError, run_command
from nanochat.cpu import usable_cores
from nanochat.document_files import RemoteFile, is_remote, list_local, list_remote, without_strangers
from nanochat.files import atomic_write, locked
from nanochat.raw_files import kind_of, read_texts
from nanochat.settings import Arguments, SettingsParser
from nanochat.tokenizer import Tokenizer, get_tokenizer

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from nanochat.data_prep import Layout, PrepSettings, ReadShard, Stage

MAX_JOBS = 1000  # in a Slurm array; most clusters allow 1001
MINHASH_BANDS = 14  # datatrove's own: 14 bands of 8 hashes find texts that share about 3 of 4 five-word sequences


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Prepare text for pretraining: shuffle, deduplicate, tokenize.",
        examples=["%(prog)s --input raw/ --output prepared/", "%(prog)s --config prep.toml --executor slurm"],
    )
    parser.add_argument("--input", required=True, metavar="PATH",
                        help="a file, folder or glob of .parquet, .jsonl, .txt, .md; local or s3://...")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="where the shards go; all machines must see it")
    text = parser.add_argument_group("text")
    text.add_argument("--text-column", default=None, metavar="NAME", help="where the text is (default: text, content or body)")
    text.add_argument("--val-documents", type=int, default=None, help="validation documents (default: 2%%, at most 10,000)")
    text.add_argument("--seed", type=int, default=42, help="seed of the order")
    text.add_argument("--no-dedup", action="store_true", help="keep documents with the same text")
    text.add_argument("--min-hash", action="store_true", help="drop near-duplicates as well")
    shards = parser.add_argument_group("shards")
    shards.add_argument("--tokenizer", default="default", metavar="NAME|PATH", help="tokenizer of the shards")
    shards.add_argument("--no-tokenize", action="store_true", help="write shards of text")
    shards.add_argument("--shard-tokens", type=int, default=100_000_000, help="approximate tokens in a shard")
    machine = parser.add_argument_group("machines")
    machine.add_argument("--executor", default="local", choices=["local", "slurm", "ray"], help="who runs the tasks")
    machine.add_argument(
        "--tasks", type=int, default=None, help="tasks that share the input files (default: one per file, at most 1000)"
    )
    machine.add_argument("--workers", type=int, default=None, help="tasks at a time (default: all cores, or no limit)")
    machine.add_argument("--cpus-per-task", type=int, default=1, help="slurm, ray: cores of a task")
    machine.add_argument("--mem-per-cpu", type=int, default=4, metavar="GB", help="slurm, ray: memory of each core")
    machine.add_argument("--partition", default=None, metavar="NAME", help="slurm: partition of the cluster")
    machine.add_argument("--time", default="12:00:00", metavar="HH:MM:SS", help="slurm: time limit of one task")
    machine.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE",
                         help="slurm: another option, for example account=NAME; may be repeated")  # fmt: skip
    args = parser.parse_args(argv)
    args.require_positive("shard_tokens", "val_documents", "tasks", "workers", "cpus_per_task", "mem_per_cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    _check_installed(args)
    from nanochat.data_prep import Layout

    if "://" not in args.input:
        args.input = str(Path(os.path.expanduser(args.input)).absolute())
    layout = Layout(Path(os.path.expanduser(args.output)).absolute())
    inputs = list_inputs(args.input)
    real: Any = str if is_remote(args.input) else os.path.realpath  # links and .. may lead into the other folder
    output = Path(os.path.realpath(layout.output))
    if any(output in Path(real(path)).parents for path in inputs) or output.is_relative_to(real(args.input)):
        raise NanochatError(f"--output {layout.output} and --input {args.input} overlap: choose another folder")
    tokenizer = None if args.no_tokenize else get_tokenizer(args.tokenizer)
    settings = _open_output(args, layout, inputs, tokenizer)
    if layout.manifest.exists():
        print(f"{layout.output} is complete: {_describe(layout)}")
        return 0
    stages = build_stages(settings, layout)
    if args.executor == "slurm":
        _submit(args, stages, layout)
    else:
        with _lock(layout):
            _run_here(args, stages, layout)
    return 0


@contextlib.contextmanager
def _lock(layout: Layout) -> Iterator[None]:
    """While this lasts no other command may prepare this output here; the system ends it with the process.

    Two would write, and clean up, each other's files. Raises NanochatError if another process is at it.
    """
    folder = layout.output / "work"
    owner = folder / "owner"
    who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
    busy = f"{layout.output} is being prepared by {who}: wait for it, stop it, or choose another --output"
    with locked(folder / ".lock", busy):
        atomic_write(owner, f"process {os.getpid()} on {platform.node()}")
        yield


def _check_installed(args: Arguments) -> None:
    needed = {"datatrove": "data", **({"tokenizers": "data"} if args.min_hash else {})}
    needed |= {"ray": "data ray"} if args.executor == "ray" else {}
    for package, extra in needed.items():
        try:
            __import__(package)
        except ImportError as error:
            raise NanochatError(f"{package} is not installed: bash runs/setup.sh {extra}") from error
    from loguru import logger

    logger.remove()  # datatrove's log goes to work/log, not to the screen


def _open_output(args: Arguments, layout: Layout, inputs: dict[str, int], tokenizer: Tokenizer | None) -> PrepSettings:
    """The settings of this output, written on the first call. Raises NanochatError if it was begun with others."""
    from nanochat.data_prep import PrepSettings

    begun: Any = json.loads(layout.settings.read_text(encoding="utf-8")) if layout.settings.exists() else None
    if begun is None and layout.output.is_dir() and any(layout.output.glob("*.parquet")):
        raise NanochatError(f"--output {layout.output} holds parquet files of another origin: choose an empty folder")
    num_shards = begun["num_shards"] if begun else None
    if num_shards is None:
        tokens = estimate_tokens(args.input, inputs, args.text_column, tokenizer)
        num_shards = max(1, round(tokens / args.shard_tokens))
        print(f"about {tokens:,} tokens in {len(inputs):,} files, for {num_shards:,} shards")
    settings = PrepSettings(
        input=args.input, inputs=inputs, text_column=args.text_column,
        tokenizer=tokenizer.fingerprint() if tokenizer else None,
        seed=args.seed, val_documents=args.val_documents, shard_tokens=args.shard_tokens, num_shards=num_shards,
        dedup=not args.no_dedup, min_hash=args.min_hash, tasks=args.tasks or min(len(inputs), MAX_JOBS),
    )  # fmt: skip
    for field in fields(settings) if begun else ():
        before, now = begun.get(field.name), getattr(settings, field.name)
        if before != now:
            difference = f"with {field.name} {before}, not {now}" if field.name != "inputs" else "with other input files"
            raise NanochatError(f"{layout.output} was begun {difference}: use that again, or another --output")
    if not begun:
        try:
            if tokenizer:  # keeps the tokenizer together with its shards
                tokenizer.save(layout.output)
            atomic_write(layout.settings, json.dumps(asdict(settings), indent=1))
        except OSError as error:
            raise NanochatError(f"--output {layout.output} cannot be written ({error.strerror}): choose another") from error
    return settings


def _describe(layout: Layout) -> str:
    manifest = json.loads(layout.manifest.read_text(encoding="utf-8"))
    missing = [name for name in manifest["shards"] if not (layout.output / name).exists()]
    if missing:
        raise NanochatError(f"{missing[0]} is missing in {layout.output}, which was complete: prepare it in another --output")
    counts = manifest["counts"]
    tokens = counts["train_tokens"] + counts["val_tokens"]
    return (
        f"{counts['train_documents']:,} documents to train on and {counts['val_documents']:,} for validation"
        f"{f', {tokens:,} tokens,' if tokens else ''} in {len(manifest['shards'])} shards; left out: {counts['empty']:,} "
        f"empty, {counts['duplicates']:,} duplicates, {counts['near_duplicates']:,} near-duplicates"
    )


# ----------------------------------------------------------------------------- input and stages


def list_inputs(address: str) -> dict[str, int]:
    """{path: bytes} of the readable files at a local or remote address, sorted. Raises NanochatError if there are none."""
    found = list_remote(address) if is_remote(address) else list_local(address)
    if not found:
        raise NanochatError(f"--input {address} is no file, nor a folder or glob of files: check the path")
    files = [found[path]() for path in without_strangers([path for path in sorted(found) if kind_of(path.name)])]
    if not files:
        raise NanochatError(f"--input {address} holds no .parquet, .jsonl, .txt or .md file (all but parquet also .gz, .zst)")
    return {file.shard.path if isinstance(file, RemoteFile) else file.path.absolute().as_posix(): file.size for file in files}


def estimate_tokens(
    address: str, inputs: dict[str, int], column: str | None, tokenizer: Tokenizer | None, sample_bytes: int = 4_000_000
) -> int:
    """An estimate of the tokens in the files, from the first texts of about eight; without a tokenizer, 4 bytes per token."""
    fs = url_to_fs(address)[0]
    text_bytes, tokens, token_bytes = 0.0, 0, 0
    sampled = list(inputs)[:: -(-len(inputs) // 8)]
    for path in sampled:
        texts, text_bytes_of_file = _sample(fs, path, inputs[path], column, sample_bytes)
        text_bytes += text_bytes_of_file
        part = "".join(texts)[:200_000]
        token_bytes += len(part.encode())
        tokens += len(tokenizer.encode(part)) if tokenizer else len(part.encode()) // 4
    expansion = text_bytes / max(1, sum(inputs[path] for path in sampled))
    return round(sum(inputs.values()) * expansion * tokens / max(1, token_bytes))


def _sample(fs: Any, path: str, size: int, column: str | None, sample_bytes: int) -> tuple[list[str], float]:
    """(first texts of a file, estimated bytes of text in the whole file)."""
    texts, text_bytes, share = [], 0, 1.0
    with fs.open(path, "rb") as file:
        reader = read_texts(file, path, column)
        for text in reader:
            texts.append(text)
            text_bytes += len(text.encode())
            if text_bytes >= sample_bytes:
                if kind_of(path) == ".parquet":  # columns are not read from front to back
                    with fs.open(path, "rb") as again:
                        share = len(texts) / pq.read_metadata(again).num_rows
                else:
                    share = min(1.0, file.tell() / size)
                break
    return texts, text_bytes / share


def build_stages(settings: PrepSettings, layout: Layout) -> list[Stage]:
    """All stages of the work, in order."""
    from nanochat import data_prep as steps

    read, write = steps.ReadShard(settings, layout), steps.WriteShard(settings, layout)
    near_stages, near_filter = _near_duplicates(settings, layout, read) if settings.min_hash else ([], [])
    return [
        steps.Stage("scatter", [steps.ReadDocuments(settings), steps.ScatterDocuments(settings, layout)], settings.tasks),
        steps.Stage("validation", [steps.ChooseValidation(settings, layout)], 1),
        *near_stages,
        steps.Stage("gather", [read, *near_filter, write], settings.num_shards),
        steps.Stage("manifest", [steps.WriteManifest(settings, layout)], 1),
    ]


def _near_duplicates(settings: PrepSettings, layout: Layout, read: ReadShard) -> tuple[list[Stage], list[PipelineStep]]:
    """Stages that find near-duplicates with datatrove's MinHash, and the step that then drops them.

    It works on shards, whose documents are always the same, so the result does not depend on the number of tasks.
    """
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.hashing import HashConfig

    from nanochat import data_prep as steps

    config = minhash.MinhashConfig(num_buckets=MINHASH_BANDS, seed=1, hash_config=HashConfig(hash_fc="sha1"))
    signatures, pairs, clusters = (str(layout.scratch / name) for name in ("signatures", "pairs", "clusters"))
    sign = minhash.MinhashDedupSignature(signatures, config, language=steps.SplitAtSpaces())
    num_pair_tasks = MINHASH_BANDS * max(1, settings.num_shards // 100)
    stages = [
        steps.Stage("signatures", [read, sign], settings.num_shards),
        steps.Stage("pairs", [minhash.MinhashDedupBuckets(signatures, pairs, config=config)], num_pair_tasks),
        steps.Stage("clusters", [minhash.MinhashDedupCluster(pairs, clusters, config=config)], 1),
    ]
    return stages, [minhash.MinhashDedupFilter(clusters)]


# ----------------------------------------------------------------------------- executors


def _run_here(args: Arguments, stages: list[Stage], layout: Layout) -> None:
    """With the local or the Ray executor: stage by stage, until all is done."""
    from nanochat.data_prep import LocalExecutor

    if args.executor == "ray":
        import ray

        ray.init(log_to_driver=False, logging_level="ERROR")  # the cluster at RAY_ADDRESS, else this machine
    started = time.perf_counter()
    for stage in stages:
        options: dict[str, Any] = {"pipeline": stage.steps, "tasks": stage.tasks, "logging_dir": str(layout.log(stage.name))}
        if args.executor == "local":
            executor = LocalExecutor(**options, workers=args.workers or usable_cores())
        else:
            from datatrove.executor import RayPipelineExecutor

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
    print(f"{layout.output}: {_describe(layout)}; {seconds:.1f} s")


def _submit(args: Arguments, stages: list[Stage], layout: Layout) -> None:
    """With Slurm: one job array per stage, each after the previous one; returns when they are in the queue."""
    from datatrove.executor import SlurmPipelineExecutor

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


if __name__ == "__main__":
    sys.exit(run_command(main))
