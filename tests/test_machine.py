"""What this machine can do is found out by trying, and what it cannot do is passed over with one line."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nanochat
from nanochat import block_attention, compilation, cpu, flash_attention, machine, pace
from nanochat.common import NanochatError, get_base_dir
from nanochat.devices import get_compute_dtype
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.kernels import choose_kernels
from nanochat.sampling import SamplingParams
from scripts import base_train
from tests.conftest import TINY_TRAINING
from tests.helpers import OUT_OF_MEMORY, make_model
from tests.nursery import ROOT

FOLDERS = ("nanochat", "scripts", "tasks", "dev", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize(("broken", "chosen"), [("", "fa4"), ("fa4", "flex"), ("fa4 flex", "fa3"), ("fa3 fa4 flex", "plain")])
@pytest.mark.parametrize("error", [RuntimeError("no kernel image is available for execution on the device"), AssertionError()])
def test_attention_kernels_that_cannot_launch_are_passed_over(broken: str, chosen: str, error: Exception, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def probe(backend, device, dtype, head_dim) -> None:
        if backend.name in broken.split():
            raise type(error)(*error.args)  # new, since an error holds what its traceback refers to

    monkeypatch.setattr(flash_attention, "_probe", probe)
    choose = flash_attention.choose_backend.__wrapped__
    assert choose(torch.device("cuda", 0), torch.bfloat16, 128, True).name == chosen
    for asked in ("fa4", "flex", "fa3", "plain"):
        monkeypatch.setenv("NANOCHAT_ATTENTION", asked)
        if asked in broken.split():
            with pytest.raises(NanochatError, match=f"NANOCHAT_ATTENTION={asked} cannot be used .*set it to plain"):
                choose(torch.device("cuda", 0), torch.bfloat16, 128, True)
        else:
            assert choose(torch.device("cuda", 0), torch.bfloat16, 128, True).name == asked


def test_attention_that_this_device_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where texts differ in length, though: there FlexAttention, asked for, leaves its place to the plain one."""
    choose = flash_attention.choose_backend.__wrapped__
    for asked in ("flex", "fa9"):
        monkeypatch.setenv("NANOCHAT_ATTENTION", asked)
        with pytest.raises(NanochatError, match=f"NANOCHAT_ATTENTION={asked} cannot be used .*cpu in float32"):
            choose(torch.device("cpu"), torch.float32, 128, False)
    monkeypatch.setenv("NANOCHAT_ATTENTION", "flex")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose(torch.device("cuda", 0), torch.bfloat16, 128, False).name == "plain"


def test_flex_attention_has_a_kernel_for_every_batch_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU where it also takes the whole context: not only for the first eight, whatever is tried again."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, **{"backend": "eager", **how}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", True)
    flash_attention._compiled_flex.cache_clear()
    for rows in (6, 5, 4, 3, 2, 6):
        for window in (128, 256):
            q, k, v = (torch.randn(rows, 256, 1, 16) for _ in range(3))
            mask = flash_attention.flex_mask(256, window, q.device)
            plan = flash_attention.AttentionPlan(flash_attention.attend_flex, window, mask)
            expected = block_attention._attend_by_pytorch(q, k, v, window)
            torch.testing.assert_close(flash_attention.attend_flex(q, k, v, plan), expected)
    flash_attention._compiled_flex.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "broken", "chosen"),
    [
        ((9, 0), "bfloat16", "", {"sort_ids", "heads", "mlp"}),
        ((9, 0), "bfloat16", "heads_kernel mlp_kernel", {"sort_ids"}),
        ((9, 0), "float16", "", {"sort_ids", "heads"}),
        ((9, 0), "float32", "", set()),
        ((10, 0), "bfloat16", "", {"sort_ids", "heads"}),
        ((7, 5), "float16", "", {"heads"}),
    ],
)
def test_our_own_kernels_are_used_where_they_agree_with_pytorch(
    capability: tuple[int, int], dtype: str, broken: str, chosen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("heads_kernel", "lookup_kernel", "loss_kernel", "mlp_kernel"):
        found = torch.full((2,), 1.5 if name in broken else 1.0)
        fake = SimpleNamespace(probe=lambda device, found=found: [(found, torch.ones(2))])
        fake.fused_heads = fake.sort_ids = fake.chunk_loss = fake.mlp = lambda *inputs: None
        monkeypatch.setitem(sys.modules, f"nanochat.{name}", fake)
        monkeypatch.setattr(nanochat, name, fake, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernels = choose_kernels.__wrapped__(torch.device("cuda", 0), getattr(torch, dtype))
    assert {name for name, kernel in kernels._asdict().items() if kernel is not None} == {"chunk_loss", *chosen}


def test_a_command_imports_the_compiler_only_to_compile() -> None:
    """It takes a second, and as much memory as a small model."""
    code = "import scripts.base_train, scripts.chat_cli, scripts.chat_web, sys; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_command_that_only_reads_and_writes_does_not_import_pytorch() -> None:
    """It takes seconds, and for each of data_prep's workers hundreds of MB."""
    prep = "nanochat.prep_stages, " if importlib.util.find_spec("datatrove") else ""
    code = f"import {prep}nanochat.dataset, scripts.data_prep, scripts.tok_train, scripts.tok_eval, sys; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_first_update_does_not_import_the_compiler(corpus: Path, tokenizer_in_place: None) -> None:
    """Nor does what comes before it: a new run on a CPU shows its first step before it compiles."""
    flags = [flag for flag in TINY_TRAINING if flag != "--no-compile"] + [f"--data={corpus}", "--num-iterations=1"]
    code = f"import scripts.base_train, sys; scripts.base_train.main({flags}); "
    code += "sys.exit(bool({'torch._dynamo', 'sympy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(("module", "boundless"), [("flash_attn_interface", -1), ("flash_attn.cute", None)])
@pytest.mark.parametrize("window", [100, 256])
def test_flash_attention_is_asked_for_the_same_each_time(module: str, boundless, window: int, monkeypatch) -> None:
    """Whatever a package calls no window, and whether or not it returns more than the result."""
    asked: list[dict] = []

    def flash_attn_func(q, k, v, **settings):
        asked.append(settings)
        return (q, None) if boundless is None else q

    for name in (module.split(".")[0], module):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_func=flash_attn_func))
    attend = flash_attention.attend_fa4 if boundless is None else flash_attention.attend_fa3
    q = torch.randn(1, 256, 2, 8)
    assert attend(q, q, q, flash_attention.AttentionPlan(attend, window, None)) is q
    expected = (boundless, boundless) if window == 256 else (100, 0)
    assert asked == [{"causal": True, "window_size": expected, "deterministic": True}]


def test_a_new_run_on_a_cpu_compiles_after_its_first_step(
    corpus: Path, tokenizer_in_place: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a resumed one before its first, so that it computes what the uninterrupted one did."""
    metrics = get_base_dir() / "runs" / "late" / "base" / "metrics.jsonl"
    steps_done: list[int] = []
    monkeypatch.setattr("nanochat.trainer.try_to_compile", lambda device: None)
    monkeypatch.setattr("nanochat.gpt.GPT.compile", lambda self: steps_done.append(metrics.read_text().count("train/loss")))
    flags = [flag for flag in TINY_TRAINING if flag != "--no-compile"] + ["--data", str(corpus), "--model-tag=late"]
    assert base_train.main([*flags, "--save-every=3"]) == 0
    assert steps_done[0] == 1
    steps_done.clear()
    assert base_train.main([*flags, "--resume=3"]) == 0
    assert steps_done[0] == 6  # nothing was trained before it


def test_without_a_compiler_training_runs_eagerly_and_says_so(
    corpus: Path, tokenizer_in_place: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    flags = [flag for flag in TINY_TRAINING if flag != "--no-compile"]
    assert base_train.main([*flags, "--data", str(corpus), "--num-iterations=1"]) == 0
    assert capsys.readouterr().out.count("training without torch.compile: no C++ compiler") == 1


@pytest.mark.parametrize("horizon", ["--num-iterations=2", "--target-minutes=0.02"])
def test_a_compiler_that_lacks_what_it_needs_ends_no_training(
    horizon: str, corpus: Path, tokenizer_in_place: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As g++ without Python's headers."""

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("C++ compile error\n\nx.cpp:2:10: fatal error: Python.h: No such file or directory\n")

    monkeypatch.setattr(compilation.torch, "compile", fail)
    monkeypatch.setattr(compilation, "can_compile", lambda device: None)
    compilation._why_no_kernel.cache_clear()
    flags = [flag for flag in TINY_TRAINING if flag not in ("--no-compile", "--num-iterations=6")]
    assert base_train.main([*flags, "--data", str(corpus), horizon]) == 0
    said = capsys.readouterr().out
    assert said.count("training without torch.compile: the C++ compiler builds no kernel") == 1 and "Python.h" in said
    compilation._why_no_kernel.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch tries its compiler so on Linux")
@pytest.mark.parametrize(("given", "used"), [(None, True), ("0", False)])
def test_vector_instructions_are_not_tried_unless_asked(given: str | None, used: bool) -> None:
    """Where a compiler is: in a process of its own, since PyTorch reads the wish once."""
    code = "import torch; from nanochat.compilation import can_compile; reason = can_compile(torch.device('cpu')); "
    code += "from torch._inductor import config; print(reason, config.cpp.vec_isa_ok)"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_VEC_ISA_OK"}
    environment |= {"CXX": sys.executable} | ({"TORCHINDUCTOR_VEC_ISA_OK": given} if given else {})
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["None", str(used)]


@pytest.mark.slow
@pytest.mark.parametrize("T", [300, 384])
def test_compiled_equals_eager(T: int) -> None:
    """Loss and every gradient, for all kinds of layer, in one graph each; texts of whole blocks and others."""
    if reason := compilation.can_compile(torch.device("cpu")):
        pytest.skip(f"nothing compiles here: {reason}")
    idx = torch.randint(300, (2, T), generator=torch.Generator().manual_seed(0))
    models = [make_model(n_layer=4, window_pattern="SL") for _ in range(2)]
    models[1].compile()
    eager, compiled = (model(idx, idx) for model in models)
    eager.backward()
    compiled.backward()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert models[0]._chunk_loss is None  # compiling one model leaves the others as they are, to the last bit
    with torch.no_grad():
        assert models[1](idx, idx).item() == pytest.approx(eager.item(), rel=1e-4)
        assert not models[1](idx, idx).requires_grad


def test_generation_never_runs_what_training_compiled(engine: Engine) -> None:
    def fail(*args: object) -> torch.Tensor:
        raise AssertionError("the compiled block ran")

    engine.model._compiled_block = fail
    (row,) = engine.complete([engine.tokenizer.encode("the cat", prepend="<|bos|>")], SamplingParams(max_tokens=4))
    assert row.tokens


def test_the_dtype_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert get_compute_dtype("cpu") is torch.float16
    monkeypatch.setenv("NANOCHAT_DTYPE", "int7")
    with pytest.raises(NanochatError, match=r"int7.*bfloat16"):
        get_compute_dtype("cpu")


def test_it_imports_from_any_folder(tmp_path: Path) -> None:
    code = "import nanochat.server, nanochat.trainer, scripts.base_train, scripts.chat_web, tasks"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)


def test_the_guides_imports() -> None:
    from nanochat.common import autodetect_device_type, compute_cleanup, compute_init, get_dist_info, print0
    from nanochat.gpt import GPT, GPTConfig
    from tasks.common import Task

    names = (autodetect_device_type, compute_cleanup, compute_init, get_dist_info, print0, GPT, GPTConfig, Task)
    assert all(map(callable, names))


def _mode(call: ast.Call) -> str:
    """In which a call of open opens a file: open(path, mode), filesystem.open(path, mode) or path.open(mode)."""
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[1:2]
    if not modes and isinstance(call.func, ast.Attribute):
        modes = call.args[:1]
    return str(modes[0].value) if modes and isinstance(modes[0], ast.Constant) else "r"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_sources_run_on_every_system(path: Path) -> None:
    """UTF-8 is named wherever text is read or written, and nothing that only Unix has is imported or used."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            optional = {"resource"} if path.name in ("execution_worker.py", "devices.py") else set()  # done without on Windows
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
            assert not (names - optional) & {"fcntl", "resource", "pwd", "grp", "termios"}, node.lineno
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("SIGALRM", "alarm", "fork"), node.lineno
            if not path.name.startswith("execution"):  # which refuses to run on Windows
                assert node.attr not in ("killpg", "setsid", "getuid", "geteuid", "SIGKILL", "mkfifo"), node.lineno
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            keywords = {keyword.arg for keyword in node.keywords}
            of_os = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "os"
            if name in ("read_text", "write_text") or (name == "open" and not of_os and "b" not in _mode(node)):
                assert "encoding" in keywords, f"line {node.lineno} opens text without encoding"


def test_dear_updates_ask_for_larger_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And measuring them changes no weight."""
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("nanochat.pace.measure_matmul_rate", lambda *args: 1e12)
    batches = []
    for seconds in (0.01, 0.04):
        monkeypatch.setattr("nanochat.pace.seconds_of", lambda work, device, seconds=seconds: work() or seconds)
        batches.append(pace.batch_worth_an_update(model, {"weight_decay": 0.2}))
    assert batches[1] == pytest.approx(4 * batches[0], rel=0.01)
    assert batches[0] > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Within a container's quota, and a share of them where several ranks run on this machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cpu, "CGROUP", tmp_path)
    assert cpu.usable_cores() == 8
    for quota, cores in (("max 100000", 8), ("250000 100000", 3), ("1000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n", encoding="ascii")
        assert cpu.usable_cores() == cores
    (tmp_path / "cpu.max").unlink()
    for ranks, cores in (("3", 2), ("0", 8), ("", 8), ("many", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert cpu.usable_cores() == cores


def test_memory_is_what_the_container_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Less what it uses, but for cached files."""
    monkeypatch.setattr(cpu, "CGROUP", tmp_path)
    free = cpu.available_memory()
    for name, content in (("current", "900000"), ("stat", "anon 1\ninactive_file 300000\nactive_file 1000"), ("max", "max")):
        (tmp_path / f"memory.{name}").write_text(f"{content}\n", encoding="ascii")
    assert cpu.available_memory() > free / 2
    for limit, available in (("1000000", 401_000), ("100", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n", encoding="ascii")
        assert cpu.available_memory() == available


@pytest.mark.parametrize(
    ("has_amx", "dtype", "expected"), [(True, "bfloat16", 0.25), (True, "float32", 0.5), (False, "bfloat16", 0.5)]
)
def test_plans_expect_less_of_amx(has_amx: bool, dtype: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx, raising=False)
    assert machine.expected_mfu(torch.device("cpu"), getattr(torch, dtype)) == expected


def test_answers_in_a_batch_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, beside what the engine takes; a number that was asked for stays."""
    tried: list[tuple[int, float]] = []

    def fits(model: object, rows: int, engine_share: float) -> bool:
        tried.append((rows, engine_share))
        return rows <= 8

    monkeypatch.setattr(pace, "_fits", fits)
    model = make_model()
    assert pace.choose_answer_rows(model, -1) == 32 and not tried
    monkeypatch.setattr(model, "get_device", lambda: torch.device("cuda"))
    assert pace.choose_answer_rows(model, -1) == 8
    assert [rows for rows, _ in tried] == [32, 16, 8] and all(share > 0 for _, share in tried)
    assert pace.choose_answer_rows(model, 64) == 64


@pytest.mark.parametrize(("most", "tried"), [(24, [24]), (5, [24, 12, 8, 6, 4]), (0, [24, 12, 8, 6, 4, 3, 2])])
def test_rows_on_a_gpu_are_the_most_that_fit_and_divide_the_batch(
    most: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row is not tried: there is nothing less. On a CPU, rows are chosen by their tokens."""
    model, seen = make_model(sequence_len=512), []
    assert pace.choose_device_batch_size(model, -1, 48 * 512, 2) == 12
    monkeypatch.setattr(model, "get_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(pace, "_fits", lambda model, rows, loss_fn: seen.append(rows) or rows <= most)
    assert pace.choose_device_batch_size(model, -1, 48 * 512, 2) == (tried[-1] if most else 1)
    assert seen == tried
    for rows, tokens in ((5, 48 * 512), (-1, 1000)):
        with pytest.raises(NanochatError, match="nearest"):
            pace.choose_device_batch_size(model, rows, tokens, 2)


@pytest.mark.parametrize("error", [None, *OUT_OF_MEMORY])
def test_trying_a_batch_takes_no_memory_away(error: RuntimeError | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit or not: a second try finds as much free as the first, an engine's share included."""
    model, held, kept = make_model(), [], []
    empty, forward = torch.empty, GPT.forward

    def allocate(*size: int, **how: object) -> torch.Tensor:
        tensor = empty(*size, **how)
        if how.get("dtype") == torch.uint8:
            held.append((weakref.ref(tensor), tensor.nbytes))
        return tensor

    def compute(*args: object, **more: object) -> torch.Tensor:
        if error is not None:
            raise type(error)(*error.args)  # new, since an error holds what its traceback refers to
        return forward(*args, **more)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(GPT, "forward", compute)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 8000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.append(held[-1][0]() is not None))
    assert pace._fits(model, 2, engine_share=0.25) == (error is None)
    assert kept == [False] and held[0][1] == 1000 + model.setup_optimizer().state_bytes()
    assert all(parameter.grad is None for parameter in model.parameters())

    monkeypatch.setattr(pace, "gather_objects", lambda free: [free, free - 800])  # another rank has less
    pace._fits(model, 2, engine_share=0.25)
    assert held[-1][1] == held[0][1] + 800 - 200


def test_a_batch_is_tried_with_the_loss_and_the_optimizer_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model(), []
    setup = GPT.setup_optimizer

    def watched(model: GPT, **settings: object) -> object:
        seen.append(settings)
        return setup(model, **settings)

    def loss_fn(model: GPT, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        seen.append([tuple(tensor.shape) for tensor in batch])
        return model(batch[0]).logsumexp(-1).sum()

    monkeypatch.setattr(GPT, "setup_optimizer", watched)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 8000))
    assert pace._fits(model, 3, loss_fn, muon_beta2=0.9)
    assert seen == [{"muon_beta2": 0.9}, [(3, model.config.sequence_len)] * 2]


def test_other_failures_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPT, "forward", lambda *args, **more: 1 / 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 8000))
    with pytest.raises(ZeroDivisionError):
        pace._fits(make_model(), 2)


def test_a_machine_that_multiplies_slowly_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU in float16: a product of twice the size takes eight times as long."""
    asked: list[float] = []
    monkeypatch.setattr(machine, "_fastest", lambda work, device, seconds: asked.append(seconds) or 5.0)
    rate = machine.measure_matmul_rate.__wrapped__(torch.device("cpu"), torch.float32)
    assert (rate, len(asked)) == (2 * 1024**3 / 5, 1)


@pytest.mark.parametrize(
    ("device", "dtype", "native", "of"),
    [
        ("cpu", "bfloat16", True, "bfloat16"),
        ("cpu", "bfloat16", False, "float32"),
        ("cpu", "float16", True, "float32"),
        ("cpu", "float32", True, "float32"),
        ("cuda:0", "float16", True, "float16"),
    ],
)
def test_speed_is_no_share_of_a_rate_that_is_emulated(
    device: str, dtype: str, native: bool, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or float16 on a CPU would train at several times what its large products reach."""
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(machine, "measure_matmul_rate", lambda device, dtype: dtype)
    assert machine.reference_rate(torch.device(device), getattr(torch, dtype)) == getattr(torch, of)


@pytest.mark.parametrize(("free_gb", "read_gb"), [(2, 1), (80, 4)])
def test_measuring_memory_takes_what_is_free_and_gives_it_back(
    free_gb: int, read_gb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where freed memory stays with PyTorch and its peak is reported."""
    taken: list[weakref.ref] = []
    calls: list[str] = []

    def take(numbers: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        x = torch.empty(numbers, dtype=dtype, device="meta")
        taken.append(weakref.ref(x))
        return x

    def note(name: str) -> None:
        assert taken[0]() is None
        calls.append(name)

    monkeypatch.setattr(torch, "ones", take)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb << 30, 96 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: note("given back"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: note("no peak"))
    monkeypatch.setattr(machine, "_fastest", lambda work, device, seconds: 0.5)
    assert machine.measure_memory_rate.__wrapped__(torch.device("cuda", 0)) == 2 * read_gb << 30
    assert calls == ["given back", "no peak"]
