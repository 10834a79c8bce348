"""What fits: counted bytes are those of real tensors, and each way to save memory saves some."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat import memory
from nanochat.common import NanochatError
from nanochat.memory import TrainingLayout, activation_bytes, largest_depth, loss_bytes, main, step_bytes, training_bytes
from nanochat.scaling import config_for_depth
from tests.helpers import make_model


def test_weights_and_optimizer_are_counted_as_they_are() -> None:
    """Without activations to speak of: what the parameters, their gradients and the optimizer's tensors, there from the
    start, really take."""
    model = make_model(sequence_len=2048, n_layer=2)  # for which activations take more than the optimizer does on its way
    optimizer = model.setup_optimizer()
    real = sum(8 * parameter.numel() for parameter in model.parameters())
    real += sum(tensor.nbytes for tensor in optimizer.state_dict().values())
    counted = training_bytes(model.config) - activation_bytes(model.config, 1) - loss_bytes(model.config, 1)
    assert counted == pytest.approx(real, rel=0.02)  # but for the small second moments


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile take at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before | self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("bigrams", [2, 40])  # whose table is the smaller or the larger part of the work
def test_a_step_takes_about_what_is_counted(world_size: int, bigrams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somewhat less on a CPU, which updates matrices one at a time."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    if world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        model = make_model(n_layer=4, n_embd=128, bigrams=bigrams)
        optimizer = model.setup_optimizer()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Peak() as peak:
            optimizer.step()
        assert 0.7 < peak.most / step_bytes(optimizer.groups, TrainingLayout(world_size)) < 1.1
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def test_activations_grow_with_rows_and_layers() -> None:
    small, deep = config_for_depth(4, 512, 256), config_for_depth(8, 512, 256, aspect_ratio=32)
    one, two, three = (activation_bytes(small, rows) for rows in (1, 2, 3))  # and weights in bfloat16, once
    assert three - two == two - one > one / 2
    assert activation_bytes(deep, 1) == pytest.approx(2 * activation_bytes(small, 1), rel=0.2)
    assert activation_bytes(small, 4, recompute=True) < activation_bytes(small, 4) / 2
    two_wide, three_wide = (activation_bytes(small, rows, dtype=torch.float32) for rows in (2, 3))
    assert 1.5 < (three_wide - two_wide) / (three - two) < 2  # some is float32 in any case


def test_each_way_to_save_memory_saves_some() -> None:
    layouts = (TrainingLayout(), TrainingLayout(8), TrainingLayout(8, fsdp=True), TrainingLayout(8, fsdp=True, recompute=True))
    sizes = [training_bytes(config_for_depth(20, 4096, 1024), 4, layout) for layout in layouts]
    assert sizes == sorted(set(sizes), reverse=True)
    depths = [largest_depth(12e9, 1024, 4096, 4, layout) for layout in layouts]
    assert depths == sorted(depths)
    assert depths[-1] > depths[0]
    assert largest_depth(1e6, 1024, 4096, 1, TrainingLayout()) == 0


def test_the_largest_table_is_whole_while_it_is_read() -> None:
    """Of a model that is cut: that of pairs of tokens, where it has one, with its gradient."""
    config = config_for_depth(4, 4096, 256)
    layout = TrainingLayout(10**9, fsdp=True)  # what is cut is next to nothing
    sizes = [training_bytes(replace(config, bigrams=bigrams), 1, layout) for bigrams in (2, 4)]
    assert sizes[1] - sizes[0] == 8 * 2 * 4096 * config.n_embd


def test_the_table(capsys: pytest.CaptureFixture) -> None:
    assert main(["--gb", "2", "--max-seq-len=256", "--vocab-size=4096"]) == 0
    assert capsys.readouterr().out.count("2 GB: d") == 5
    assert main(["--gb", "0.001", "2", "--max-seq-len=256", "--vocab-size=4096"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert all("0.001 GB: none " in line for line in lines)
    assert len({line.index("2 GB: d") for line in lines}) == 1  # one column below the other


@pytest.mark.parametrize("flag", ["gb", "world-size", "max-seq-len", "vocab-size", "rows"])
def test_sizes_that_mean_nothing_are_refused(flag: str) -> None:
    for value in ("0", "-1", *(["1e30", "nan"] if flag == "gb" else [])):
        with pytest.raises(NanochatError, match=f"^--{flag} {value.replace('1e30', '1e.30')} is "):
            main([f"--{flag}", value])


def test_two_pairs_of_layers_tell_of_all() -> None:
    config = config_for_depth(8, vocab_size=512, sequence_len=256, aspect_ratio=16, head_dim=16)
    assert memory._kept_bytes(config, 2, torch.bfloat16) == memory._count_kept_bytes(config, 2, torch.bfloat16)
