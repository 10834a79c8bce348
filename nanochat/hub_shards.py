"""Data sets on the Hugging Face hub, in numbered parquet shards: which there are, and their download.

Used by dataset.py and doctor.py. To add one whose shards are named alike, give it a line in HUB_REPOSITORIES.
"""

from __future__ import annotations

import concurrent.futures
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import NanochatError, first_line, get_base_dir
from nanochat.progress import Progress

MOST_FAILURES = 8  # in a row: without a network, the thousands of shards that are left would take hours to fail


@dataclass(frozen=True)
class HubRepository:
    """A data set of numbered parquet shards on the Hugging Face hub; the last shard is for validation."""

    repo_id: str
    num_shards: int
    public_folder: str = ""  # where the public nanochat keeps it, in the same base directory

    @staticmethod
    def file(number: int) -> str:
        return f"shard_{number:05d}.parquet"

    @property
    def val_file(self) -> str:
        return self.file(self.num_shards - 1)


HUB_REPOSITORIES = {
    "climbmix": HubRepository("karpathy/climbmix-400b-shuffle", 6543, "base_data_climbmix"),
    "fineweb-edu": HubRepository("karpathy/fineweb-edu-100b-shuffle", 1823, "base_data"),
}


def hub_files(name: str) -> tuple[Path, list[Path]]:
    """(the directory of a hub data set, its shards on disk): the public nanochat's folder if only that holds some."""
    ours = get_base_dir() / "data" / name
    public = HUB_REPOSITORIES[name].public_folder
    for directory in (ours, get_base_dir() / public) if public else (ours,):
        if files := sorted(directory.glob("shard_*.parquet")):
            return directory, files
    return ours, []


def download(name: str, num_shards: int, workers: int = 4) -> None:
    """Fetch the first num_shards shards and the validation shard of a hub data set; whole files are not fetched again.

    huggingface_hub resumes and verifies the transfer. Raises NanochatError naming what could not be fetched.
    """
    from huggingface_hub.utils import disable_progress_bars

    if workers < 1:
        raise NanochatError(f"--num-workers {workers} is too small: choose 1 or more")
    repository = HUB_REPOSITORIES[name]
    directory, _ = hub_files(name)
    num_shards = repository.num_shards - 1 if num_shards < 0 else min(num_shards, repository.num_shards - 1)
    names = [*map(repository.file, range(num_shards)), repository.val_file]
    disable_progress_bars()  # the library shows one per file; ours covers all
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        Progress(f"downloading {name}", len(names), unit="shard") as progress,
    ):
        failures: list[str] = []
        in_a_row = 0
        for failure in progress.watch(pool.map(lambda n: _download_one(repository, n, directory), names)):
            failures += [failure] if failure else []
            in_a_row = in_a_row + 1 if failure else 0
            if in_a_row == MOST_FAILURES:
                pool.shutdown(wait=False, cancel_futures=True)
                raise NanochatError(
                    f"{in_a_row} shards of {name} in a row could not be fetched (first: {failures[-in_a_row]}): check the "
                    "network and run the same command again, it goes on where it stopped"
                )
    if failures:
        raise NanochatError(
            f"{len(failures)} of {len(names)} shards of {name} could not be fetched (first: {failures[0]}): "
            "run the same command again, it goes on where it stopped"
        )
    print(f"{len(names)} shards of {name} are in {directory}")


def _download_one(repository: HubRepository, file_name: str, directory: Path) -> str | None:
    """Fetch one shard; returns what went wrong, or None."""
    from huggingface_hub import hf_hub_download

    path = directory / file_name
    try:
        for force in (False, True):  # a complete file that does not open is fetched once more
            if force or not path.exists():
                hf_hub_download(repository.repo_id, file_name, repo_type="dataset", local_dir=directory, force_download=force)
            if _opens(path):
                print(f"{file_name}: {path.stat().st_size / 1e6:.1f} MB")
                return None
        path.unlink()
        return f"{file_name}: not a parquet file"
    except Exception as error:  # the hub library raises a dozen kinds, all with the same way out
        return f"{file_name}: {first_line(error)}"


def _opens(path: Path) -> bool:
    try:
        with pq.ParquetFile(path):
            return True
    except (pa.ArrowException, OSError):
        return False
