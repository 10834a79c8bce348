"""The optimizer against straightforward versions of its parts; state; schedules; scaling."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from nanochat.common import NanochatError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import UNITS, Group, MuonAdamW
from nanochat.scaling import (
    accumulation_steps,
    config_for_depth,
    count_params,
    expansion_share,
    plan_horizon,
)
from nanochat.sharded_optim import SHARDED_UNITS
from nanochat.updates import (
    POLAR_EXPRESS,
    normalize_neurons,
    orthogonalize,
    orthogonalize_blocks,
    rows_update,
    second_moment_shape,
)
from tests.helpers import make_model


@pytest.mark.parametrize("sharded", [False, True])
def test_a_kind_of_group_without_a_unit_is_no_other_kind(sharded: bool) -> None:
    """Above all not AdamW; each kind has a unit for whole parameters and one for parts."""
    assert set(UNITS) == set(SHARDED_UNITS)
    with pytest.raises(KeyError, match="unheard of"):
        MuonAdamW([Group("unheard of", ["a"], [torch.nn.Parameter(torch.ones(2))], 0.1)], sharded)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 64), (2, 64, 16)])
def test_orthogonalize_drives_singular_values_to_one(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(x)
    before, values = torch.linalg.svdvals(x), torch.linalg.svdvals(result)
    reachable = before > 0.02 * before.amax(dim=-1, keepdim=True)  # five steps do not lift what is nearly zero
    assert values[reachable].min() > 0.65
    assert values.max() < 1.35
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    cosine = (result * (u @ vh)).sum() / (result.norm() * (u @ vh).norm())
    assert cosine > 0.98


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (16, 32), (16, 24)])
def test_steps_on_gram_matrices_are_steps_on_the_matrices(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of gradients that are zero, or have few directions, or directions of very different sizes."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(5, *shape, generator=generator), full_matrices=False)
    sizes = [torch.ones(16), torch.logspace(0, -6, 16), torch.eye(16)[3], 1e6 * torch.logspace(-3, 0, 16), torch.zeros(16)]
    x = u * torch.stack(sizes)[:, None] @ vh
    expected = x.double() / (torch.linalg.matrix_norm(x, keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalize(x), expected.float(), rtol=0, atol=2e-3)  # bfloat16 is 0.03 to 0.3 off


@pytest.mark.parametrize("block", [(8, 32), (16, 8)])
def test_blocks_are_orthogonalized_for_themselves(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows or columns of a matrix, as a head has them; the norm is that of a whole orthogonal matrix."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    x = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    result = orthogonalize_blocks(x, block)
    rows, columns = block
    part = orthogonalize(x[1:2, -rows:, -columns:])
    torch.testing.assert_close(result[1:2, -rows:, -columns:] / result[1, -1, -1], part / part[0, -1, -1])
    expected = torch.full((3,), 16**0.5)
    torch.testing.assert_close(result.norm(dim=(-2, -1)), expected, rtol=0.1, atol=0)


def test_heads_and_neurons_are_blocks() -> None:
    groups = make_model(n_kv_head=1).setup_optimizer().groups
    blocks = {name.removeprefix("blocks.0."): group.block for group in groups for name in group.names}
    assert blocks["attn.c_q.weight"] == blocks["mlp.c_fc.weight"] == (16, 32)
    assert blocks["attn.c_proj.weight"] == blocks["mlp.c_proj.weight"] == (32, 16)
    assert blocks["attn.c_k.weight"] is None  # one head is all of it


def test_adamw_is_the_textbooks() -> None:
    """eps is added after the bias correction, decay is decoupled."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    group = Group("adamw", ["p"], [parameter], 0.1, 0.5, (0.8, 0.95), 1e-3)
    optimizer = MuonAdamW([group])
    value, m, v = parameter.detach().clone(), torch.zeros(3), torch.zeros(3)
    for step in range(1, 6):
        grad = torch.tensor([0.1, -0.001, 0.0]) * step
        parameter.grad = grad.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * grad, 0.95 * v + 0.05 * grad**2
        value = value * (1 - 0.1 * 0.5)
        value = value - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-3)
        torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings_move_where_they_were_looked_up(sparse: bool) -> None:
    """By the learning rate, whatever the gradient's size; the mean square is that of a row's own gradients."""
    table = torch.nn.Parameter(torch.zeros(5, 4))
    optimizer = MuonAdamW([Group("rows", ["t"], [table], 0.1, betas=(0.0, 0.75))])

    def set_gradient(rows: dict[int, float]) -> None:
        gradient = torch.zeros(5, 4)
        for row, value in rows.items():
            gradient[row] = value
        if sparse:  # in parts, with a row that was looked up to no avail
            half = gradient.to_sparse(1) * 0.5
            nothing = torch.sparse_coo_tensor([[0]], torch.zeros(1, 4), (5, 4), check_invariants=True)
            gradient = half + half + nothing
        table.grad = gradient

    set_gradient({1: 1e-6, 3: -1e3})
    optimizer.step()
    torch.testing.assert_close(table.detach()[[1, 3]], torch.tensor([[-0.1] * 4, [0.1] * 4]))
    assert not table.detach()[[0, 2, 4]].any()
    before = table.detach().clone()
    set_gradient({1: 2e-6})
    optimizer.step()
    assert torch.equal(table.detach()[2:], before[2:])
    expected = before[1] - 0.1 * 2 / (0.75 * 1 + 0.25 * 4) ** 0.5
    torch.testing.assert_close(table.detach()[1], expected)


def test_parameters_without_gradients_stay_as_they_are() -> None:
    """And so do their states; the others move as if alone."""

    def after_steps(idle: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = make_model(n_layer=4)
        optimizer = model.setup_optimizer(weight_decay=0.5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for name, parameter in model.named_parameters():
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = None if name.startswith(tuple(f"blocks.{i}." for i in range(idle))) else gradient
            optimizer.step()
        return model.state_dict(), optimizer.state_dict()

    before = make_model(n_layer=4).state_dict()
    for found, moved in zip(after_steps(3), after_steps(0), strict=True):
        for name, tensor in found.items():
            if not name.startswith(("blocks.0.", "blocks.1.", "blocks.2.")):
                torch.testing.assert_close(tensor, moved[name])
            elif name in before:
                assert torch.equal(tensor, before[name])
            else:
                assert not tensor.any(), name


def test_arithmetic_is_float32_for_bfloat16_weights() -> None:
    """A thousand small steps that bfloat16 moments would lose still add up."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = MuonAdamW([Group("adamw", ["p"], [parameter], 1e-3, betas=(0.9, 0.999), eps=1e-10)])
    for _ in range(20):
        parameter.grad = torch.full_like(parameter, 1e-4)
        optimizer.step()
    assert all(tensor.dtype == torch.float32 for name, tensor in optimizer.state_dict().items() if name != "steps")
    assert parameter.float().mean().item() == pytest.approx(-0.02, rel=0.05)


def test_cautious_decay_never_opposes_the_update() -> None:
    weights = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))

    def moved(decay: float) -> torch.Tensor:
        parameter = torch.nn.Parameter(weights.detach().clone())
        parameter.grad = grad.clone()
        MuonAdamW([Group("muon", ["p"], [parameter], 0.1, decay, (0.0, 0.9))]).step()
        return parameter.detach() - weights.detach()

    plain, decayed = moved(0.0), moved(1.0)
    pulls_down = (-plain * weights.detach()) >= 0  # the update already shrinks the weight
    torch.testing.assert_close(decayed[~pulls_down], plain[~pulls_down])
    torch.testing.assert_close(decayed[pulls_down], (plain - 0.1 * weights.detach())[pulls_down])


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_muon_is_written_out_in_ten_lines(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nesterov momentum, orthogonalized, neurons evened out by a running mean, larger steps of a tall matrix."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = MuonAdamW([Group("muon", ["p"], [parameter], 0.1, betas=(0.0, 0.9), initial_momentum=0.95)])
    value, average, mean_square = parameter.detach().clone(), torch.zeros(shape), 0.0
    for _ in range(3):
        grad = torch.randn(shape, generator=generator)
        parameter.grad = grad.clone()
        optimizer.step()
        average = 0.95 * average + 0.05 * grad
        update = orthogonalize((0.05 * grad + 0.95 * average)[None])[0]
        mean_square = 0.9 * mean_square + 0.1 * update.square().mean(dim=1 if shape == (32, 8) else 0, keepdim=True)
        even = update / mean_square.sqrt()
        value = value - (0.1 if shape == (8, 32) else 0.2) * even * update.norm() / even.norm()
        torch.testing.assert_close(parameter.detach(), value)


def test_normalizing_neurons_keeps_the_norm_and_evens_rows() -> None:
    update = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 32)[:, None]
    before = update.norm(dim=(-2, -1))
    second_moment = update.square().mean(dim=-1, keepdim=True)
    rows = normalize_neurons(update.clone(), second_moment, 0.9)
    torch.testing.assert_close(rows.norm(dim=(-2, -1)), before)
    for norms in rows.norm(dim=-1):  # within each matrix
        assert norms.max() / norms.min() < 1.01


def test_neurons_without_an_update_spoil_no_others() -> None:
    """A neuron that was never active, a matrix of such: their running mean square is 0."""
    update = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    update[0, 1] = update[1] = 0
    found = normalize_neurons(update.clone(), torch.zeros(2, 4, 1), 0.9)
    assert not found[0, 1].any() and not found[1].any()
    torch.testing.assert_close(found[0].norm(), update[0].norm())


def test_every_parameter_is_in_one_group_and_moves() -> None:
    model = make_model()
    optimizer = model.setup_optimizer()
    grouped = [id(p) for group in optimizer.groups for p in group.params]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    kinds = {name: group.kind for group in optimizer.groups for name in group.names}
    assert kinds["blocks.0.attn.c_q.weight"] == "muon"
    assert {kinds[n] for n in ("wte.weight", "bigrams.weight", "value_embeds.2.weight")} == {"rows"}
    assert {kinds[n] for n in ("lm_head.weight", "resid_lambdas")} == {"adamw"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    idx = torch.randint(300, (2, 64))
    model(idx, idx).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"


@pytest.mark.parametrize(("n_embd", "scale"), [(48, 4.0), (192, 2.0)])
def test_rates_of_what_is_no_matrix_follow_the_width(n_embd: int, scale: float) -> None:
    """Tables and head learn by (width / 768)^-1/2; matrices, and the factors of a stream, do not."""
    optimizer = make_model(n_embd=n_embd, n_head=3, n_kv_head=3).setup_optimizer(
        matrix_lr=0.02, embedding_lr=0.3, unembedding_lr=0.008, scalar_lr=0.5
    )
    rates = {name: group.initial_lr for group in optimizer.groups for name in group.names}
    expected = {"lm_head.weight": 0.008 * scale, "wte.weight": 0.3 * scale, "bigrams.weight": 0.3 * scale,
                "value_embeds.2.weight": 0.3 * scale, "resid_lambdas": 0.005, "x0_lambdas": 0.5,
                "blocks.0.attn.c_q.weight": 0.02, "blocks.2.mlp.c_proj.weight": 0.02}  # fmt: skip
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


def test_each_setting_reaches_the_parameters_that_it_names() -> None:
    optimizer = make_model(n_layer=2).setup_optimizer(
        weight_decay=0.7, adam_betas=(0.1, 0.2), adam_eps=0.3, scalar_eps=0.4, muon_momentum=0.5, muon_beta2=0.6
    )
    groups = {name: group for group in optimizer.groups for name in group.names}
    head, table, stream, first = (groups[name] for name in ("lm_head.weight", "wte.weight", "resid_lambdas", "x0_lambdas"))
    assert head.betas == table.betas == stream.betas == (0.1, 0.2) != first.betas
    assert (head.eps, stream.eps, first.eps) == (0.3, 0.4, 0.4)
    matrices = [group for group in optimizer.groups if group.kind == "muon"]
    assert {(group.momentum, group.betas[1], group.weight_decay) for group in matrices} == {(0.5, 0.6, 0.7)}
    assert not any(group.weight_decay for group in optimizer.groups if group.kind != "muon")


def test_of_a_table_only_rows_that_were_looked_up_have_gradients_on_a_cpu() -> None:
    model = make_model()
    model.setup_optimizer()
    idx = torch.tensor([[7, 8, 7]])
    model(idx, idx).backward()
    assert sorted(model.wte.weight.grad.coalesce().indices()[0].tolist()) == [7, 8]


def test_state_goes_on_exactly() -> None:
    def train(model, optimizer, seeds) -> None:
        for seed in seeds:
            idx = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(seed))
            model(idx, idx).backward()
            optimizer.step()
            optimizer.zero_grad()

    one = make_model()
    optimizer = one.setup_optimizer()
    train(one, optimizer, range(3))
    two = make_model(seed=9)
    two.load_state_dict(one.state_dict())
    resumed = two.setup_optimizer()
    resumed.load_state_dict(optimizer.state_dict())
    train(one, optimizer, range(3, 6))
    train(two, resumed, range(3, 6))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_that_has_done_nothing_yet_has_a_state() -> None:
    """Of zeros, and of the same names and shapes as later."""
    model = make_model()
    optimizer = model.setup_optimizer()
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    idx = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    model(idx, idx).backward()
    optimizer.step()
    after = optimizer.state_dict()
    assert {name: tensor.shape for name, tensor in before.items()} == {name: tensor.shape for name, tensor in after.items()}
    assert not any(tensor.any() for tensor in before.values())
    assert any(tensor.any() for name, tensor in after.items() if name != "steps")


# ----------------------------------------------------------------------------- schedules and scaling


@pytest.mark.parametrize("depth", range(1, 13))
def test_every_depth_makes_a_model(depth: int) -> None:
    """Of so many blocks, as wide as asked for and no wider than whole heads need; a smaller one is smaller in every part."""
    for aspect_ratio, head_dim in ((64, 128), (50, 40)):
        config = config_for_depth(depth, 4096, aspect_ratio=aspect_ratio, head_dim=head_dim)
        with torch.device("meta"):
            model = GPT(config)
        assert len(model.blocks) == depth and config.head_dim == head_dim
        assert 0 <= config.n_embd - depth * aspect_ratio < head_dim
        assert model.blocks[-1].mlp.c_fc.weight.shape == (4 * config.n_embd, config.n_embd)
        assert model.wte.weight.shape == (config.padded_vocab_size, config.n_embd)
        assert config.windows()[-1] == config.sequence_len
        assert sum(p.numel() for p in model.parameters()) == count_params(config)["total"]
        if depth > 1:
            smaller = count_params(config_for_depth(depth - 1, 4096, aspect_ratio=aspect_ratio, head_dim=head_dim))
            assert smaller["matrices"] < count_params(config)["matrices"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_new_model_knows_nothing(depth: int) -> None:
    """Each token is as likely as any other: the loss is the logarithm of their number."""
    model = GPT(config_for_depth(depth, 512, sequence_len=64))
    model.init_weights()
    idx = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(depth))
    assert model(idx).shape == (2, 64, 512)
    assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(512), abs=0.1)


def test_depth_alone_decides_a_run() -> None:
    horizons = {depth: plan_horizon(config_for_depth(depth, 32768), flops_per_token=1) for depth in (4, 12, 20)}
    assert horizons[12].total_batch_size == 2**19
    assert horizons[12].lr_scale == 1
    assert horizons[12].weight_decay_scale == pytest.approx(1)
    tokens = [h.tokens for h in horizons.values()]
    assert tokens == sorted(tokens)
    for depth, horizon in horizons.items():
        wanted = 12 * count_params(config_for_depth(depth, 32768))["scaling"]
        assert horizon.tokens == pytest.approx(wanted, rel=0.05)


def test_horizon_may_be_overridden() -> None:
    config = config_for_depth(4, 4096)
    assert plan_horizon(config, 1, num_iterations=7).num_iterations == 7
    assert plan_horizon(config, 1000, target_flops=1e9, batch_multiple=96).total_batch_size % 96 == 0  # three ranks, odd rows
    usual = plan_horizon(config, 1000, target_flops=1e9)
    larger = plan_horizon(config, 1000, target_flops=1e9, least_batch_size=4 * usual.total_batch_size)
    assert larger.total_batch_size == 4 * usual.total_batch_size
    assert plan_horizon(config, 1000, target_flops=1e9, least_batch_size=1) == usual
    assert plan_horizon(config, 1000, target_flops=1e9, total_batch_size=1000).num_iterations == 1000
    whole, short, trial = (
        plan_horizon(config, 1000),
        plan_horizon(config, 1000, target_flops=1e9),
        plan_horizon(config, 1000, num_iterations=7),
    )
    assert short.total_batch_size < whole.total_batch_size  # a shorter run takes smaller batches
    for horizon in (whole, short):  # learning rate times decay times updates is the same for all
        decayed = horizon.lr_scale * horizon.weight_decay_scale * horizon.num_iterations
        assert decayed == pytest.approx(plan_horizon(config_for_depth(12, 4096), 1).num_iterations, rel=0.1)
    assert trial.total_batch_size == whole.total_batch_size  # and a trial is the start of the real one
    for nothing in (-1, 0):
        with pytest.raises(NanochatError, match="no horizon"):
            plan_horizon(config, 1, tokens_per_param=nothing)


def test_one_block_learns_alone_where_tokens_are_few() -> None:
    assert 0 < expansion_share(0.1) == expansion_share(1.9) < 1
    assert expansion_share(2.0) == expansion_share(12) == 0


def test_a_batch_that_does_not_divide_names_the_nearest() -> None:
    assert accumulation_steps(32768, 8, 512, 2) == 4
    with pytest.raises(NanochatError, match="nearest: 8192, 16384"):
        accumulation_steps(10000, 16, 512, 1)
    with pytest.raises(NanochatError, match=r"nearest: 8192$"):
        accumulation_steps(100, 16, 512, 1)


def test_flops_grow_with_context_only_by_attention() -> None:
    base = GPTConfig(sequence_len=1024, vocab_size=64, n_layer=2, n_head=1, n_kv_head=1, n_embd=64, window_pattern="L")
    with torch.device("meta"):
        short, long = (GPT(dataclasses.replace(base, sequence_len=T)).estimate_flops() for T in (1024, 2048))
    assert long - short == pytest.approx(12 * 64 * 2 * 512, rel=1e-3)
    assert math.isfinite(long)


def test_rows_without_a_gradient_keep_their_mean_square() -> None:
    group, square = Group("rows", ["x"], [], 0.1, betas=(0.8, 0.9)), torch.tensor([4.0, 4.0])
    rows_update(torch.ones(2, 3), torch.tensor([[1.0] * 3, [0.0] * 3]), square, group)
    assert square[0] != 4 and square[1] == 4


def test_a_square_matrix_has_a_mean_for_each_row() -> None:
    assert second_moment_shape((1, 4, 4)) == (1, 4, 1)
