"""What a task is: conversations to learn from, and a judge of answers. Each task has its own file beside this one.

A conversation is {"messages": [{"role", "content"}, ...]}, whose last message is the reference answer; content is a text
or a list of parts {"type": "text" | "python" | "python_output", "text"}. A task may put more keys beside the messages
for its own `evaluate`; a categorical one puts "letters", the answers to choose from.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from nanochat.common import NanochatError, first_line, get_base_dir
from nanochat.files import read_jsonl, written_whole
from nanochat.tokenizer import check_messages

Conversation = dict[str, Any]


class Task(ABC):
    """The conversations start, start + step, ... below stop of a data set.

    eval_type "generative": `evaluate` judges a generated answer; "categorical": the likeliest letter is the answer.
    """

    eval_type = "generative"
    baseline = 0.0  # accuracy of guessing

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise NanochatError(f"a slice of {start}:{stop}:{step} is not valid: 0 <= start <= stop and step >= 1")
        self.start, self.stop, self.step = start, stop, step

    @abstractmethod
    def num_examples(self) -> int:
        """Conversations in the whole data set."""

    @abstractmethod
    def get_example(self, index: int) -> Conversation:
        """One conversation of the whole data set, always the same for the same index."""

    def evaluate(self, conversation: Conversation, completion: str) -> bool | float:
        """Whether (or how well, 0 to 1) a completion answers the conversation; not defined for a task that only teaches.

        completion: the whole answer as text, with special tokens such as <|python_start|> spelled out.
        """
        raise NotImplementedError

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The reward that RL gives for a completion."""
        return float(self.evaluate(conversation, completion))

    def __len__(self) -> int:
        stop = self.num_examples() if self.stop is None else min(self.stop, self.num_examples())
        return max(0, -(-(stop - self.start) // self.step))

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        return self.get_example(self.start + index * self.step)


class RowTask(Task):
    """A task that makes each conversation from a row of a data set, `self.rows`; a subclass says how.

    `convert` raises KeyError, TypeError or ValueError for a row of the wrong kind.
    """

    rows: Sequence[dict[str, Any]]

    @staticmethod
    @abstractmethod
    def convert(row: dict[str, Any]) -> Conversation:
        """The conversation of a row."""

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        try:
            return _checked(self.convert(self.rows[index]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # only rows from the hub were not checked yet
            raise NanochatError(
                f"{type(self).__name__}, row {index} from 0, is no conversation ({type(error).__name__}: {error}): correct it "
                "in a local copy and give it with --task-data, or leave the task out"
            ) from error


def _checked(conversation: Conversation) -> Conversation:
    """Raises ValueError unless its messages are such as the tokenizer renders."""
    try:
        check_messages(conversation["messages"])
    except NanochatError as error:
        raise ValueError(f"it {error}") from error
    return conversation


class GeneratedTask(Task):
    """A task that generates each conversation from its number; a subclass says how many each split has."""

    SIZES: ClassVar[dict[str, int]]

    def __init__(self, split: str, size: int | None = None, **slicing: int) -> None:
        super().__init__(**slicing)
        if split not in self.SIZES:
            name, known = type(self).__name__, ", ".join(self.SIZES)
            raise NanochatError(f"{name} has no {split} split, only {known}: add it to its SIZES, or take another task")
        self.split = split
        self.size = size or self.SIZES[split]

    def num_examples(self) -> int:
        return self.size


class TaskSequence(Task):
    """One task after the other. Training shuffles whatever it is given."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self._places = self.places()
        if not self._places:
            raise NanochatError("these tasks hold no conversation: give others")

    def places(self) -> list[tuple[int, int]]:
        """(which task, index in it) of every conversation, in order."""
        return [(which, inner) for which, task in enumerate(self.tasks) for inner in range(len(task))]

    def num_examples(self) -> int:
        return len(self._places)

    def get_example(self, index: int) -> Conversation:
        which, inner = self._places[index]
        return self.tasks[which][inner]

    def evaluate(self, conversation: Conversation, completion: str) -> bool | float:
        raise NanochatError("judge with the single tasks: a conversation does not say which task it is from")


class TaskMixture(TaskSequence):
    """Tasks evenly interleaved, each spread over the whole mixture; list a task twice to see it twice as often."""

    def places(self) -> list[tuple[int, int]]:
        lengths = [len(task) for task in self.tasks]
        return sorted(super().places(), key=lambda place: (place[1] + 0.5) / lengths[place[0]])  # stable: equal ones by task


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A multiple-choice question for the user to ask.

    The letter comes after its choice: for small models it is easier to bind a choice to a letter that follows it.
    """
    lines = [f"Multiple Choice question: {question}"]
    lines += [f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([*lines, "", "Respond only with the letter of the correct answer."])


def multiple_choice(question: str, choices: Sequence[str], answer: int) -> Conversation:
    """A conversation that asks for the letter of a choice and answers with it. Raises ValueError if there is none."""
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} is not one of {len(choices)} choices")
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    messages = [
        {"role": "user", "content": render_mc(question, letters, choices)},
        {"role": "assistant", "content": letters[answer]},
    ]
    return {"messages": messages, "letters": letters}


class LetterTask(RowTask):
    """A task of questions with four choices, each a `multiple_choice`."""

    eval_type = "categorical"
    baseline = 0.25

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether a completion begins with the letter of the reference answer, and not with a word that begins with it."""
        letter = conversation["messages"][-1]["content"]
        return re.match(rf"\s*{re.escape(letter)}(?!\w)", completion) is not None


# ----------------------------------------------------------------------------- rows from a folder or the hub


class ArrowRows(Sequence):
    """The rows of parquet files, in any order: from an uncompressed copy beside the first, which is mapped and not loaded.

    A conversation is then read from the disk or its cache, which all ranks share; loaded, a large set takes gigabytes in each.
    """

    def __init__(self, paths: list[Path]) -> None:
        copy = paths[0].with_suffix(".arrow")
        with FileLock(f"{copy}.lock"):  # of several ranks one writes
            if not copy.exists():
                _copy_batches(paths, copy)
        self.table = pa.ipc.open_file(pa.memory_map(str(copy))).read_all()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        return self.table.slice(index, 1).to_pylist()[0]


def _copy_batches(paths: list[Path], copy: Path) -> None:
    with written_whole(copy) as temporary, pa.ipc.new_file(str(temporary), pq.read_schema(paths[0])) as writer:
        for path in paths:
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches():
                    writer.write_batch(batch)


def split_by_hash(key: str, val: float, test: float) -> str:
    """The split that a key belongs to; val, test: the shares that are held out."""
    place = hashlib.sha256(key.encode()).digest()[0] / 256
    return "val" if place < val else "test" if place < val + test else "train"


def load_rows(
    data_dir: Path | None,
    local_names: Sequence[str],
    repo_id: str,
    subset: str,
    split: str,
    convert: Callable[[Any], Conversation],
) -> Sequence[dict[str, Any]]:
    """The rows of a data set: the first of local_names (JSONL) below data_dir, else `subset/split-*.parquet` on the hub.

    Raises NanochatError saying where the data was looked for, or which line `convert` makes no conversation of.
    """
    if data_dir is not None:
        for name in local_names:
            if (data_dir / name).is_file():
                return read_jsonl(data_dir / name, lambda row: _checked(convert(row)), way_out="correct it")
        raise NanochatError(f"--task-data {data_dir} has no {' or '.join(local_names)}: add it or leave the task out")
    return ArrowRows(_download_split(repo_id, subset, split))


def _download_split(repo_id: str, subset: str, split: str) -> list[Path]:
    """The files of a split; without a network, those that were fetched before."""
    from huggingface_hub import snapshot_download

    pattern = f"{subset}/{split}-*.parquet"
    try:
        folder = snapshot_download(repo_id, repo_type="dataset", allow_patterns=pattern, cache_dir=get_base_dir() / "tasks")
    except Exception as error:  # the hub library raises a dozen kinds, all with the same way out
        raise NanochatError(
            f"{repo_id} could not be fetched from the hub ({first_line(error)[:200]}): check the network, or "
            "give a local folder with --task-data"
        ) from error
    if not (paths := sorted(Path(folder).glob(pattern))):
        raise NanochatError(f"{repo_id} has no {pattern}: its files have moved; give a local folder with --task-data")
    of = re.search(r"-of-(\d+)\.parquet$", paths[0].name)
    if of and len(paths) < int(of[1]):  # an earlier download was not finished
        raise NanochatError(f"of {int(of[1])} files of {repo_id} only {len(paths)} are here: check the network, and try again")
    return paths
