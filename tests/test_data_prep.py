"""Raw text to shards: every distinct document once, in an order that only the seed decides, whatever does the work."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import NanochatError
from nanochat.dataset import get_source
from nanochat.metrics import read_metrics
from nanochat.prep_input import list_inputs
from nanochat.prep_output import OutputLayout, PrepSettings
from nanochat.tokenizer import Tokenizer
from scripts import base_eval, base_train, data_prep
from tests.conftest import TINY_TRAINING
from tests.helpers import DOCUMENTS, make_document, write_documents, write_program

pytest.importorskip("datatrove", reason="data preparation needs bash runs/setup.sh data")

from nanochat.prep_stages import build_stages
from nanochat.prep_steps import ReadDocuments, ScatterDocuments, document_key

NUM_DISTINCT = 300
SHARD_TOKENS = "--shard-tokens=3000"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return sorted(
        {make_document(seed, 6) for seed in range(NUM_DISTINCT)} | {"Grüße aus Köln. 你好 🙂", "\u1e9bx 12345 <|bos|>"}
    )


@pytest.fixture(scope="module")
def raw(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file; the first 40 documents twice, 20 more that differ in case and space, 3 without text."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "below").mkdir()
    thirds = [texts[i::3] for i in range(3)]
    pq.write_table(pa.table({"text": [*thirds[0], None, " \n"], "id": range(len(thirds[0]) + 2)}), folder / "a.parquet")
    lines = [json.dumps({"text": text}) for text in [*thirds[1], *texts[:40]]]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    with gzip.open(folder / "below" / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in thirds[2][:50])
    rest = "".join(json.dumps({"content": text}) + "\n" for text in [*thirds[2][50:], ""])
    rest += "".join(json.dumps({"content": text.upper().replace(" ", "\n ")}) + "\n" for text in texts[:20])
    with pa.CompressedOutputStream(str(folder / "below" / "d.jsonl.zst"), "zstd") as stream:
        stream.write(rest.encode())
    (folder / "notes.csv").write_text("no,text\n", encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer_dir(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return tokenizer.save(tmp_path / "tokenizer").parent


@pytest.fixture
def prepare(raw: Path, tokenizer_dir: Path, tmp_path: Path):
    def run(name: str, *flags: str, source: Path | str = raw) -> Path:
        common = ["--input", str(source), "--output", str(tmp_path / name), "--tokenizer", str(tokenizer_dir)]
        assert data_prep.main([*common, SHARD_TOKENS, "--workers=1", *flags]) == 0
        return tmp_path / name

    return run


def _shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("*.parquet"))}


def _rows(output: Path, column: str = "tokens") -> dict[str, list[Any]]:
    return {path.name: pq.read_table(path)[column].to_pylist() for path in sorted(output.glob("*.parquet"))}


def _texts(output: Path, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(row) for rows in _rows(output).values() for row in rows]


def _fold(texts: list[str]) -> list[str]:
    return sorted(" ".join(text.casefold().split()) for text in texts)


# ----------------------------------------------------------------------------- the shards


def test_every_distinct_document_is_there_once_and_decodes_to_its_text(prepare, texts: list[str], tokenizer) -> None:
    output = prepare("out", "--val-documents=20")
    found = _texts(output, tokenizer)
    assert _fold(found) == _fold(texts)
    assert set(found) <= set(texts) | {text.upper().replace(" ", "\n ") for text in texts[:20]}
    counts = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["counts"]
    assert counts["documents"] == len(texts) + 40 + 20 + 3
    assert (counts["empty"], counts["duplicates"]) == (3, 60)
    assert (counts["val_documents"], counts["train_documents"]) == (20, len(texts) - 20)
    assert counts["val_tokens"] + counts["train_tokens"] == sum(len(row) for rows in _rows(output).values() for row in rows)


def test_shards_are_what_training_reads(prepare, tokenizer: Tokenizer) -> None:
    output = prepare("out")
    names = list(_shards(output))
    assert len(names) > 3
    assert names[0] == "shard_00000.parquet"
    assert names[-1] == "shard_val.parquet"
    for name in names:
        schema = pq.read_schema(output / name)
        assert schema.field("tokens").type == pa.list_(pa.uint16())
        assert schema.metadata[b"nanochat.tokenizer"] == tokenizer.fingerprint().encode()
    bos = tokenizer.get_bos_token_id()
    assert all(row and bos not in row for rows in _rows(output).values() for row in rows)
    assert Tokenizer.load(output).fingerprint() == tokenizer.fingerprint()
    sizes = [shard["tokens"] for shard in json.loads((output / "manifest.json").read_text())["shards"].values()]
    assert max(sizes) < 2 * 3000


def test_shards_serve_training_and_its_samples(prepare, base_dir: Path, tokenizer: Tokenizer) -> None:
    output = prepare("out")
    flags = ["--data", str(output), "--tokenizer", str(output), "--model-tag=prepared", "--sample-every=2"]
    assert base_train.main([*TINY_TRAINING, "--num-iterations=2", *flags]) == 0
    rows = read_metrics(base_dir / "runs" / "prepared" / "base" / "metrics.jsonl")
    prompts = [row["sample/prompt"] for row in rows if "sample/prompt" in row]
    first = tokenizer.decode(_rows(output)["shard_val.parquet"][0])
    assert prompts[0] == " ".join(first.split()[:6])
    assert len(prompts) == 4
    another = Tokenizer.train(["another text"], 300).save(base_dir / "another").parent
    other = prepare("other", "--tokenizer", str(another))
    with pytest.raises(NanochatError, match="tokens of another tokenizer"):
        base_eval.main(["--model-tag=prepared", "--device-type=cpu", "--data", str(other)])


def test_training_reads_no_part_of_an_output(prepare, tokenizer_dir: Path) -> None:
    """Neither of one that is not finished, nor of one that has lost a shard; other JSON beside texts is nobody's business."""
    output = prepare("out")
    shard, manifest = output / "shard_00001.parquet", output / "manifest.json"
    for folder in (output, output.parent, f"file://{output}"):
        get_source(str(folder))
    content = shard.read_bytes()
    shard.unlink()
    for folder in (output, output.parent):
        with pytest.raises(NanochatError, match=r"lacks 1 of \d+ shards .*first: shard_00001\.parquet"):
            get_source(str(folder))
    shard.write_bytes(content)
    manifest.unlink()
    with pytest.raises(NanochatError, match="unfinished output of scripts.data_prep .*give its command again"):
        get_source(str(output))
    for others in ('{"editor": 1}', "[]", "{"):
        (output / "settings.json").write_text(others, encoding="utf-8")
        get_source(str(output))


def test_the_number_of_tasks_and_workers_changes_no_byte(prepare) -> None:
    one = _shards(prepare("one", "--tasks=1"))
    assert _shards(prepare("three", "--tasks=3", "--workers=2")) == one
    assert _shards(prepare("many", "--tasks=9")) == one


def test_the_seed_decides_order_and_validation(prepare, tokenizer: Tokenizer) -> None:
    first, second = (_rows(prepare(f"seed{seed}", f"--seed={seed}")) for seed in (1, 2))
    assert first != second
    assert first["shard_val.parquet"] != second["shard_val.parquet"]
    in_input_order = sum(a < b for a, b in zip(first["shard_00001.parquet"], first["shard_00001.parquet"][1:], strict=False))
    assert 0.2 < in_input_order / len(first["shard_00001.parquet"]) < 0.8


def test_text_shards_hold_the_same_documents(prepare, texts: list[str]) -> None:
    output = prepare("out", "--no-tokenize", "--val-documents=20")
    rows = _rows(output, "text")
    assert _fold([text for shard in rows.values() for text in shard]) == _fold(texts)
    assert len(rows["shard_val.parquet"]) == 20


def test_without_dedup_copies_stay_in_one_split_and_one_shard(prepare, texts: list[str], tokenizer) -> None:
    output = prepare("out", "--no-dedup", "--val-documents=30")
    shards = [_fold([tokenizer.decode(row) for row in rows]) for rows in _rows(output).values()]
    assert sum(map(len, shards)) == len(texts) + 60
    assert sum(len(set(shard)) for shard in shards) == len(texts)
    assert _shards(prepare("again", "--no-dedup", "--val-documents=30", "--tasks=2")) == _shards(output)


def test_validation_may_fill_more_than_a_shard(prepare, texts: list[str], tokenizer) -> None:
    output = prepare("out", "--val-documents=150")
    val = {name: rows for name, rows in _rows(output).items() if "val" in name}
    assert len(val) > 1
    assert sum(map(len, val.values())) == 150
    assert _fold(_texts(output, tokenizer)) == _fold(texts)


def test_a_large_vocabulary_gets_wider_ids(tmp_path: Path, tokenizer: Tokenizer, raw: Path) -> None:
    tokens = [*tokenizer.tokens, *(b"\xff" + number.to_bytes(4, "big") for number in range(66_000))]
    Tokenizer(tokens).save(tmp_path / "large")
    flags = ["--input", str(raw), "--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "large"), "--workers=1"]
    assert data_prep.main(flags) == 0
    assert pq.read_schema(tmp_path / "out" / "shard_00000.parquet").field("tokens").type == pa.list_(pa.int32())


def test_plain_text_is_cut_at_blank_lines(prepare, tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "a.txt").write_text("".join(f"{make_document(i)}\n\n" for i in range(60)), encoding="utf-8")
    output = prepare("out", "--no-tokenize", "--val-documents=1", source=tmp_path / "book" / "*.txt")
    lengths = [len(text) for rows in _rows(output, "text").values() for text in rows]
    assert len(lengths) > 3
    assert sum(length >= 4000 for length in lengths) == len(lengths) - 1


def test_memory_bounds_the_runs_and_changes_nothing(raw: Path, tmp_path: Path) -> None:
    """A task that writes many small runs gives each shard the same rows as one that writes a single run."""
    found = []
    for name, run_bytes in (("many", 5000), ("one", 10**9)):
        settings = PrepSettings(
            input=str(raw), inputs=list_inputs(str(raw)), text_column=None, tokenizer=None, seed=1, val_documents=1,
            shard_tokens=1, num_shards=5, dedup=True, min_hash=False, tasks=1,
        )  # fmt: skip
        layout = OutputLayout(tmp_path / name)
        ScatterDocuments(settings, layout, run_bytes).run(ReadDocuments(settings).run())
        reader = build_stages(settings, layout)[2].steps[0]
        found.append([[document.text for document in reader.run(rank=shard)] for shard in range(5)])
        assert (len(list(layout.runs.iterdir())) > 5) == (name == "many")
    assert found[0] == found[1]


def test_keys_ignore_case_space_and_composition() -> None:
    assert document_key("Caf\u00e9  au\tlait\n", 1) == document_key("CAFE\u0301 au lait", 1)
    assert document_key("cafe au lait", 1) != document_key("caf\u00e9 au lait", 1)
    assert document_key("a", 1) != document_key("a", 2)


def test_near_duplicates_are_kept_once(prepare, tmp_path: Path, texts: list[str]) -> None:
    pytest.importorskip("tokenizers", reason="--min-hash needs the package tokenizers")
    folder = tmp_path / "near"
    long = [make_document(seed, 40) for seed in range(30)]
    changed = [text.replace("cat", "dog", 1) + " The end." for text in long[:10]]
    write_documents(folder / "a.jsonl", [*long, *changed])
    flags = ["--min-hash", "--val-documents=5", "--no-tokenize"]
    output = prepare("out", *flags, source=folder)
    counts = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["counts"]
    assert counts["near_duplicates"] == 10
    kept = [text for rows in _rows(output, "text").values() for text in rows]
    assert len(kept) == 30
    assert all((text in kept) != (other in kept) for text, other in zip(long[:10], changed, strict=True))
    assert _shards(prepare("again", *flags, "--tasks=2", source=folder)) == _shards(output)


# ----------------------------------------------------------------------------- stopping and going on


def test_a_complete_output_is_left_alone(prepare, capsys: pytest.CaptureFixture) -> None:
    output = prepare("out")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    capsys.readouterr()
    prepare("out", "--workers=2")
    assert "is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert not (output / "work" / "scratch").exists()


def test_other_settings_into_the_same_output_are_refused(prepare) -> None:
    output = prepare("out")
    before = _shards(output)
    for flag, name in (("--seed=7", "seed"), ("--no-dedup", "dedup"), ("--tasks=2", "tasks"), ("--no-tokenize", "tokenizer")):
        with pytest.raises(NanochatError, match=f"out was begun with {name} "):
            prepare("out", flag)
    assert _shards(output) == before


def test_a_changed_input_is_noticed(prepare, tmp_path: Path) -> None:
    folder = tmp_path / "changing"
    write_documents(folder / "a.jsonl", DOCUMENTS[:20])
    prepare("out", source=folder)
    write_documents(folder / "b.jsonl", ["more"])
    with pytest.raises(NanochatError, match="other input files"):
        prepare("out", source=folder)


def test_a_failed_task_is_taken_up_again(prepare, tmp_path: Path, raw: Path, tokenizer) -> None:
    """A damaged file stops the command with its name; once it is mended the same command finishes."""
    folder = tmp_path / "damaged"
    for number in range(3):
        write_documents(folder / f"{number}.jsonl", DOCUMENTS[20 * number : 20 * number + 20])
    whole = _shards(prepare("whole", source=folder))
    good = (folder / "2.jsonl").read_bytes()
    (folder / "2.jsonl").write_bytes(good.replace(b'"}', b'"]', 1))
    with pytest.raises(NanochatError, match=r"2\.jsonl, line 1, is not JSON"):
        prepare("out", "--workers=2", source=folder)
    assert not _shards(tmp_path / "out")
    (folder / "2.jsonl").write_bytes(good)
    assert _shards(prepare("out", source=folder)) == whole


def test_a_lost_document_is_noticed(prepare) -> None:
    """The manifest, and with it the word that all is done, is not written unless the counts of all tasks agree."""
    output = prepare("out")
    (output / "manifest.json").unlink()
    (output / "work" / "log" / "manifest" / "completions" / "00000").unlink()
    (output / "work" / "log" / "gather" / "stats" / "00002.json").unlink()
    with pytest.raises(NanochatError, match="documents were lost"):
        prepare("out")
    assert not (output / "manifest.json").exists()


def test_two_commands_do_not_prepare_one_output(
    prepare, raw: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second says who is at it and changes nothing."""
    flags = ["--input", str(raw), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir), SHARD_TOKENS]
    read, second = ReadDocuments.run, []

    def run(self: ReadDocuments, *place: Any) -> Any:
        if not second:
            command = [sys.executable, "-m", "scripts.data_prep", *flags]
            second.append(subprocess.run(command, capture_output=True, text=True, timeout=60))
        return read(self, *place)

    monkeypatch.setattr(ReadDocuments, "run", run)
    output = prepare("out")
    assert second[0].returncode == 1
    assert f"is being prepared by process {os.getpid()} on " in second[0].stderr
    assert _shards(output) == _shards(prepare("alone"))


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_shards(prepare, raw: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    whole = _shards(prepare("whole"))
    output = tmp_path / "killed"
    flags = ["--input", str(raw), "--output", str(output), "--tokenizer", str(tokenizer_dir), SHARD_TOKENS, "--workers=2"]
    codes = []
    for awaited in ("work/log/scatter/completions/*", "work/log/gather/completions/*", "shard_00003.parquet"):
        process = subprocess.Popen([sys.executable, "-m", "scripts.data_prep", *flags], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not any(output.glob(awaited)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        codes.append(process.wait())
    assert codes[:2] == [-signal.SIGKILL] * 2
    result = subprocess.run([sys.executable, "-m", "scripts.data_prep", *flags], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert _shards(output) == whole
    assert not list(output.glob(".*.tmp"))


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input=/nowhere/at/all"], "/nowhere/at/all"),
        (["--input=nosuch://bucket/folder"], "nosuch"),
        (["--text-column=body"], "no column body"),
        (["--tokenizer=unknown"], "tok_train"),
        (["--output=/dev/null/shards"], "/dev/null/shards"),
        (["--shard-tokens=0"], "shard-tokens 0"),
        (["--val-documents=5000"], "holds 302 different documents"),
        (["--executor=slurm"], "--partition"),
        (["--partition=cpu", "--executor=ray"], "only Slurm uses --partition: give --executor slurm"),
    ],
)
def test_bad_input_is_one_sentence(prepare, flags: list[str], message: str) -> None:
    with pytest.raises(NanochatError) as error:
        prepare("out", *flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_folders_and_files_are_named(prepare, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.csv").write_text("text\n", encoding="utf-8")
    with pytest.raises(NanochatError, match=r"holds no .*\.parquet"):
        prepare("out", source=folder)
    for name, content in (("a.parquet", b"PAR1 not really"), ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9])):
        (folder / name).write_bytes(content)
        with pytest.raises(NanochatError, match=f"{name} cannot be read"):
            prepare(f"out-{name}", source=folder)
        (folder / name).unlink()
    (folder / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(NanochatError, match=r"a\.txt is not UTF-8"):
        prepare("out-txt", source=folder)


def test_output_in_input_is_refused_however_it_is_written(prepare, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(raw)
    for source in (raw, tmp_path / "link", raw / "below" / ".."):
        with pytest.raises(NanochatError, match="overlap"):
            prepare("out", "--output", str(raw / "shards"), source=source)


def test_absent_packages_are_one_sentence(prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, flags, extra in (
        ("datatrove", [], "data"),
        ("tokenizers", ["--min-hash"], "data"),
        ("ray", ["--executor=ray"], "data ray"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(NanochatError, match=f"{package} is not installed: bash runs/setup.sh {extra}"):
                prepare("out", *flags)


@pytest.mark.slow
def test_the_screen_shows_only_progress(raw: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    flags = ["--input", str(raw), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir), SHARD_TOKENS]
    result = subprocess.run([sys.executable, "-m", "scripts.data_prep", *flags], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    unread, *lines = result.stdout.splitlines()
    assert unread.startswith("not read, being of another kind: notes.csv;")
    assert all(re.match(r"about |scatter: |validation: |gather: |manifest: |/", line) for line in lines)


# ----------------------------------------------------------------------------- Slurm and Ray

# Stand-ins for Slurm's commands. With RUN_JOBS, sbatch runs the array at once, one task after the other.
SBATCH = r"""
count=$(ls "$FAKE_SLURM" | wc -l); id=$((100 + count))
echo "$@" > "$FAKE_SLURM/$id.args"; script="${@: -1}"; cp "$script" "$FAKE_SLURM/$id.sh"; touch "$FAKE_SLURM/$id.more"
if [ -n "$RUN_JOBS" ]; then
  last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
  for i in $(seq 0 "${last:-0}"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here RUN_OFFSET=0 bash "$script" > "$FAKE_SLURM/../$id.$i.out" 2>&1 || exit 1
  done
fi
echo "Submitted batch job $id"
"""
SRUN = 'while [[ "$1" == -* ]]; do if [[ "$1" == -n ]]; then shift; fi; shift; done\nexec "$@"'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that records what was submitted to a Slurm of shell scripts."""
    folder, record = tmp_path / "bin", tmp_path / "jobs"
    record.mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", "echo here"), ("squeue", 'echo "$WAITING"')):
        write_program(folder / name, script)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(record))
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    return record


SLURM_FLAGS = ["--executor=slurm", "--partition=cpu", "--time=01:00:00", "--cpus-per-task=2", "--mem-per-cpu=3"]


def test_slurm_jobs_wait_for_those_before(prepare, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("out", *SLURM_FLAGS, "--sbatch=account=lab", "--tasks=3", "--workers=2")
    scripts = {int(path.stem): path.read_text() for path in slurm.glob("*.sh")}
    names = {id: re.search(r"--job-name=(\S+)", script).group(1) for id, script in scripts.items()}
    arrays = [id for id in sorted(scripts) if "launch_pickled_pipeline" in scripts[id]]
    assert [names[id] for id in arrays] == [f"nanochat-{stage}" for stage in ("scatter", "validation", "gather", "manifest")]
    for id in arrays:
        for line in ("partition=cpu", "time=01:00:00", "cpus-per-task=2", "mem-per-cpu=3G", "account=lab"):
            assert f"#SBATCH --{line}\n" in scripts[id]
    assert "--array=0-2%2" in scripts[arrays[0]]
    for before, after in zip(arrays, arrays[1:], strict=False):
        assert f"--dependency=afterok:{before}" in (slurm / f"{after}.args").read_text()
    monkeypatch.setenv("WAITING", "100")
    with pytest.raises(NanochatError, match="still in the queue"):
        prepare("out", *SLURM_FLAGS, "--tasks=3")


@pytest.mark.slow
def test_slurm_jobs_give_the_same_shards(prepare, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_JOBS", "1")
    flags = ["--shard-tokens=10000"]
    assert _shards(prepare("slurm", *flags, *SLURM_FLAGS, "--tasks=2")) == _shards(prepare("local", *flags))


@pytest.mark.slow
def test_ray_gives_the_same_shards(prepare, raw: Path) -> None:
    ray = pytest.importorskip("ray", reason="needs bash runs/setup.sh data ray")
    try:
        flags = ["--executor=ray", "--workers=2", "--mem-per-cpu=1", "--shard-tokens=10000"]
        assert _shards(prepare("ray", *flags)) == _shards(prepare("local", "--shard-tokens=10000"))
    finally:
        ray.shutdown()
