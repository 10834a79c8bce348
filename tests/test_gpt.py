"""The model: cached equals full, causality, windows, initialization, counting; the loss equals the naive one."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from nanochat import block_attention, cross_entropy, flash_attention
from nanochat.block_attention import QK_SCALE
from nanochat.common import NanochatError
from nanochat.cross_entropy import softcap, softcapped_cross_entropy, token_losses
from nanochat.flash_attention import _attend_whole, plan_attention
from nanochat.gpt import GPT, LOGIT_CAP, Block, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.layers import Linear, multiply_joined
from nanochat.scaling import config_for_depth
from tests.helpers import make_model


@pytest.mark.parametrize("n_layer", [1, 2, 3])
@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize("chunks", [[300], [200, 100], [1] * 5 + [7, 150] + [1] * 138, [299, 1]])
def test_cached_equals_full_past_the_window(n_layer: int, n_kv_head: int, chunks: list[int]) -> None:
    model = make_model(n_layer=n_layer, n_kv_head=n_kv_head)  # the short window is 128 of 300 tokens
    idx = torch.randint(300, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(idx)
        cache = KVCache.for_model(model, 2)
        parts = [model(part, kv_cache=cache) for part in idx.split(chunks, dim=1)]
    assert cache.get_pos() == 300
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=2e-4, rtol=1e-4)


def test_a_cache_of_one_row_serves_many() -> None:
    """Filled once for what all rows begin with; and forgotten, it is as new."""
    model, idx = make_model(), torch.arange(40)[None] % 300
    one, three = KVCache.for_model(model, 1), KVCache.for_model(model, 3)
    with torch.no_grad():
        model(idx[:, :30], kv_cache=one)
        three.prefill(one)
        assert three.get_pos() == 30
        found = model(idx[:, 30:].expand(3, -1), kv_cache=three)
        torch.testing.assert_close(found, model(idx)[:, 30:].expand(3, -1, -1), atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="into an empty one"):
            three.prefill(one)
        three.reset()
        torch.testing.assert_close(model(idx.expand(3, -1), kv_cache=three)[0], model(idx)[0], atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="do not fit in a cache of 512"):
            model(torch.zeros(3, 500, dtype=torch.long), kv_cache=three)


@pytest.mark.parametrize(
    ("sequence_len", "pattern", "windows"),
    [(2048, "SSSL", [512, 512, 512, 2048, 512, 2048]), (2048, "S", [512] * 5 + [2048]),
     (600, "LSs", [600, 256, 256, 600, 256, 600]), (100, "SL", [100] * 6)],
)  # fmt: skip
def test_windows_by_hand(sequence_len: int, pattern: str, windows: list[int]) -> None:
    """A short one is a quarter of the context, in whole 128s; the last layer sees all."""
    assert GPTConfig(sequence_len=sequence_len, n_layer=6, window_pattern=pattern).windows() == windows


def test_causal_and_windowed() -> None:
    """A token is influenced by no later one and, in a model of windows only, by none beyond their reach."""
    model = make_model(n_layer=2, window_pattern="SL")
    idx = torch.randint(300, (1, 400))
    changed = idx.clone()
    changed[0, 200] = (changed[0, 200] + 1) % 300
    with torch.no_grad():
        difference = (model(idx) - model(changed)).abs().amax(dim=-1)[0]
    assert difference[:200].max() == 0
    assert difference[200:].min() > 0  # the last layer sees everything
    plan = plan_attention(400, 128, torch.device("cpu"), torch.float32)
    q, k, v = _attention_inputs(T=400)
    moved = v.clone()
    moved[:, 200] += 1
    difference = (plan.backend(q, k, v, plan) - plan.backend(q, k, moved, plan)).abs().amax(dim=(0, 2, 3))
    assert difference[:200].max() == 0
    assert difference[200:329].min() > 0
    assert difference[329:].max() == 0


def _attention_inputs(T: int, kv_heads: int = 2, D: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, T, h, D, generator=generator) for h in (2, kv_heads, kv_heads))
    q, k = (F.rms_norm(x, (D,)) * QK_SCALE for x in (q, k))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("T", [1, 5, 64, 100, 128, 129, 300])
@pytest.mark.parametrize("window", [16, 64, 1000])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_equals_naive_masked_softmax(T: int, window: int, kv_heads: int) -> None:
    inputs = _attention_inputs(T, kv_heads)
    plan = plan_attention(T, window, torch.device("cpu"), torch.float32)
    result = plan.backend(*inputs, plan)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(result, inputs, grad)

    q, k, v = (x.repeat_interleave(2 // x.size(2), dim=2).transpose(1, 2) for x in inputs)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = (q @ k.mT / 4).masked_fill((distance < 0) | (distance > window), float("-inf"))
    expected = (scores.softmax(dim=-1) @ v).transpose(1, 2)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)
    for mine, naive in zip(grads, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(mine, naive, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("window", [100, 256])
def test_attention_in_float16_is_as_exact_as_its_numbers(window: int, D: int) -> None:
    """Where all scores are far below their bound, too: its exponentials would be 0."""
    inputs = _attention_inputs(256, D=D)
    distance = torch.arange(256)[:, None] - torch.arange(256)
    visible = (distance >= 0) & (distance <= window)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), attn_mask=visible).transpose(1, 2)
    half = [x.detach().half().requires_grad_() for x in inputs]
    plain = plan_attention(256, window, torch.device("cpu"), torch.float16)
    rows = torch.where(visible, 0.0, float("-inf")).half().expand(2, 1, 256, 256)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    naive = torch.autograd.grad(expected, inputs, grad)
    for plan in (plain, plain._replace(backend=block_attention.attend_masked, mask=rows)):
        result = plan.backend(*half, plan)
        error = (result.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert result.dtype == torch.float16 and error.max() < 5e-3
        for mine, wanted in zip(torch.autograd.grad(result, half, grad.half()), naive, strict=True):
            assert (mine.float() - wanted).norm() < 5e-3 * wanted.norm()


def test_only_our_own_attention_is_given_blocks() -> None:
    """On a CPU that compiles another backend's mask may be a tensor, which says nothing of blocks."""
    mask = block_attention.plain_mask(256, 100, torch.device("cpu"))
    plan = flash_attention.AttentionPlan(block_attention.attend_plain, 100, mask, compiled=True)
    assert plan.block_size(256) == 128 and plan.block_size(200) is None
    assert plan._replace(backend=block_attention.attend_masked, mask=torch.zeros(2, 1, 256, 256)).block_size(256) is None


def test_a_backend_of_any_device_can_be_probed() -> None:
    cpu, good = torch.device("cpu"), flash_attention.choose_backend(torch.device("cpu"), torch.float32, 64, False)
    flash_attention._probe(good, cpu, torch.float32, 64)
    with pytest.raises(RuntimeError, match="off by"):
        flash_attention._probe(good._replace(attend=lambda *inputs: 2 * good.attend(*inputs)), cpu, torch.float32, 64)


def test_init_weights_sets_everything() -> None:
    """Also what belongs to switches: who adds one that is off by default turns it on here."""
    config = config_for_depth(3, 100, 64, aspect_ratio=16, head_dim=16, num_kv_heads=1)
    assert not [name for name, value in asdict(config).items() if not value], "these switches are off"
    models = []
    for _ in range(2):
        with torch.device("meta"):
            model = GPT(config)
        model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
        model.init_weights(seed=7)
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        assert not tensor.isnan().any(), f"{name} was left unset"
        assert torch.equal(tensor, models[1][name]), f"{name} is not the same under the same seed"


def test_a_new_block_changes_nothing_and_can_learn() -> None:
    """What writes into the stream is zero; what it multiplies has rows of length 1 on average, whatever the width."""
    for n_embd in (64, 256):
        model = GPT(GPTConfig(sequence_len=64, vocab_size=500, n_layer=2, n_head=2, n_kv_head=2, n_embd=n_embd, bigrams=1))
        model.init_weights(0)
        for block in model.blocks:
            assert not block.attn.c_proj.weight.any() and not block.mlp.c_proj.weight.any()
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                assert matrix.weight.norm(dim=1).mean().item() == pytest.approx(1, rel=0.05)
        assert not model.bigrams.weight.any() and not model.blocks[1].attn.ve_gate.weight.any()
        assert model.value_embeds["1"].weight.norm(dim=1).mean().item() == pytest.approx(1, rel=0.05)


def test_first_loss_is_that_of_guessing() -> None:
    model = GPT(GPTConfig(sequence_len=64, vocab_size=100, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(0)
    idx = torch.randint(100, (2, 64))
    assert model(idx, idx).item() == pytest.approx(torch.tensor(100.0).log().item(), abs=0.01)


def test_counts_by_hand() -> None:
    config = GPTConfig(sequence_len=256, vocab_size=70, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, window_pattern="SL")
    model = GPT(config)
    counts = model.num_scaling_params()
    # The vocabulary is padded to 128; a block has q, k, v, o and an MLP of 4x; only the last layer has a value embedding.
    block = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 2 * 16 * 64
    assert counts["wte"] == counts["lm_head"] == 128 * 16
    assert counts["value_embeds"] == 128 * 8
    assert counts["matrices"] == 2 * block + 16 * 1  # and its gate
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    windowed = sum(min(t, 128) + 1 for t in range(256)) / 256
    whole = (256 + 1) / 2
    assert model.estimate_flops() == int(6 * counts["scaling"] + 12 * 16 * (windowed + whole))


def test_idle_blocks_change_nothing_but_the_cost() -> None:
    """While their projections are zero a model without them computes the same, with and without a cache."""
    model = make_model(n_layer=4)
    for block in model.blocks[:3]:
        for matrix in (block.attn.c_proj, block.mlp.c_proj):
            torch.nn.init.zeros_(matrix.weight)
    model.resid_lambdas.data = torch.tensor([0.6, 1.3, 0.9, 1.1])
    model.x0_lambdas.data = torch.tensor([0.1, 0.4, 0.2, 0.3])
    idx = torch.randint(300, (2, 200), generator=torch.Generator().manual_seed(0))

    def results() -> list[torch.Tensor]:
        logits = model(idx)
        model.zero_grad()
        model(idx, idx).backward()
        with torch.no_grad():
            cached = model(idx, kv_cache=KVCache.for_model(model, 2))
        learning = (model.resid_lambdas, model.x0_lambdas, model.wte.weight, *model.blocks[3].parameters())
        return [logits, cached, *(parameter.grad for parameter in learning)]

    expected = results()
    model.idle_blocks = 3
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert all(parameter.grad is None for block in model.blocks[:3] for parameter in block.parameters())
    ran = GPTConfig(**{**vars(model.config), "n_layer": 1})
    assert model.estimate_flops(idle_blocks=3) == GPT(ran).estimate_flops()


def test_config_refuses_what_cannot_be() -> None:
    for bad, reason in (
        ({"n_embd": 100, "n_head": 3}, "n_embd 100 over n_head 3 does not give a head size"),
        ({"n_embd": 36, "n_head": 3, "n_kv_head": 3}, "a head size divisible by 8: choose n_embd as a multiple of 24"),
        ({"n_layer": 1 << 31}, "n_layer 2147483648 is not a whole number above 0"),
        ({"sequence_len": 2048.0}, "sequence_len 2048.0 is not a whole number"),
        ({"value_embeddings": 1}, "value_embeddings 1 is not true or false"),
        ({"window_pattern": ""}, "window_pattern '' may hold only S and L"),
        ({"n_embd": 64, "n_head": 4, "n_kv_head": 3}, "n_kv_head 3 does not divide n_head 4"),
        ({"window_pattern": "SX"}, "window_pattern 'SX' may hold only S and L"),
        ({"qk_scale": 0}, "qk_scale 0 is not a number above 0"),
        ({"qk_scale": 2.0}, "qk_scale 2.0 must be above 0 and at most 1.2"),
    ):
        with pytest.raises(NanochatError, match=reason):
            GPTConfig(**bad)


def test_padding_of_the_vocabulary_is_never_predicted() -> None:
    model = make_model(vocab_size=70)
    assert model.config.padded_vocab_size == 128
    assert model(torch.randint(70, (1, 8))).shape == (1, 8, 70)


def test_context_may_grow_beyond_the_trained_length() -> None:
    model = make_model(sequence_len=64)
    assert model(torch.randint(300, (1, 200))).isfinite().all()


# ----------------------------------------------------------------------------- the loss


def _naive(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.cross_entropy(softcap(x @ weight.T, LOGIT_CAP), targets, ignore_index=-1, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [1, 7, 200, 256])
def test_loss_equals_naive(reduction: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 50 * 64)  # chunks of 128, so that 200 makes a ragged one
    monkeypatch.setattr(cross_entropy, "CACHE_BYTES", 4 * 50 * 50)  # 50 rows at a time: another ragged end
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 16, generator=generator, requires_grad=True)
    weight = (2 * torch.randn(50, 16, generator=generator)).requires_grad_()
    targets = torch.randint(-1, 50, (n,), generator=generator)
    targets[0] = 3
    result = softcapped_cross_entropy(x, weight, targets, LOGIT_CAP, reduction)
    expected = _naive(x, weight, targets, reduction)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    for mine, naive in zip(
        torch.autograd.grad(result.sum(), (x, weight)), torch.autograd.grad(expected.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(mine, naive, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fp8", [False, True])
def test_matrices_joined_multiply_as_alone(fp8: bool) -> None:
    matrices = [Linear(32, rows) for rows in (48, 16, 16)]
    for matrix in matrices:
        torch.nn.init.normal_(matrix.weight)
        matrix.fp8 = fp8
    x = torch.randn(2, 16, 32)
    bound = 0.05 if fp8 else 1e-6  # joined, they share a scale
    for joined, matrix in zip(multiply_joined(x, matrices).split((48, 16, 16), dim=-1), matrices, strict=True):
        alone = torch.nn.functional.linear(x, matrix.weight)
        assert (joined - alone).norm() < bound * alone.norm()


def test_attention_without_a_window_by_pytorchs_kernels() -> None:
    q, k, v = _attention_inputs(100, kv_heads=1)
    plan = plan_attention(100, 100, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(_attend_whole(q, k, v), plan.backend(q, k, v, plan), atol=1e-5, rtol=1e-4)


def test_loss_in_float16_has_gradients_where_sums_leave_its_range() -> None:
    x, weight = (torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (40, 50))
    x, weight = x.half().requires_grad_(), weight.requires_grad_()
    targets = torch.arange(40)
    result = softcapped_cross_entropy(x, weight, targets, LOGIT_CAP)
    expected = _naive(x.float(), weight, targets, "mean")
    for mine, naive in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in (result, expected)), strict=True):
        assert (mine - naive).float().norm() < 2e-3 * naive.float().norm()


def test_the_little_that_is_left_to_learn_is_not_rounded_away() -> None:
    """In bfloat16 the gradient at a target that is all but certain is the difference of two numbers nearly alike."""
    generator = torch.Generator().manual_seed(0)
    weight, targets = torch.randn(500, 64, generator=generator) / 8, torch.randint(500, (100,), generator=generator)
    x = (20 * weight[targets]).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    naive = _naive(exact, weight.bfloat16().double(), targets, "mean")
    (found,) = torch.autograd.grad(softcapped_cross_entropy(x, weight, targets, LOGIT_CAP), x)
    (expected,) = torch.autograd.grad(naive, exact)
    assert naive < 0.05
    assert (found - expected).norm() < 0.03 * expected.norm()  # a tenth of it was lost


def test_generating_is_no_obstacle_to_training() -> None:
    """What a model keeps of its positions and masks serves both."""
    flash_attention._plan.cache_clear()
    model = make_model(window_pattern="S")  # whose mask is a tensor
    list(model.generate([1, 2, 3], 3))
    model.train()
    model(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)).backward()
    assert model.wte.weight.grad.any()


def test_a_cache_may_be_longer_than_the_context() -> None:
    model, idx = make_model(sequence_len=64), torch.randint(300, (1, 100), generator=torch.Generator().manual_seed(0))
    cache = KVCache.for_model(model, 1, seq_len=128)
    cached = torch.cat([model(part, kv_cache=cache) for part in idx.split(10, dim=1)], dim=1)
    torch.testing.assert_close(cached, model(idx), atol=1e-4, rtol=1e-3)


def test_loss_of_nothing_supervised_is_zero() -> None:
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    loss = softcapped_cross_entropy(x, weight, torch.full((8,), -1), LOGIT_CAP)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_loss_survives_extreme_logits() -> None:
    x = torch.full((4, 8), 1e4, requires_grad=True)
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 1e4
    loss = softcapped_cross_entropy(x, weight, torch.zeros(4, dtype=torch.long), LOGIT_CAP)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_a_target_that_top_k_leaves_out_has_a_loss() -> None:
    x, weight = torch.eye(4)[:1], torch.tensor([[9.0, 0, 0, 0], [5.0, 0, 0, 0], [1.0, 0, 0, 0]])
    assert token_losses(x, weight, torch.tensor([2]), LOGIT_CAP, top_k=1).isfinite().all()


def test_a_scale_beyond_the_bound_of_scores_is_refused() -> None:
    with pytest.raises(NanochatError, match="qk_scale"):
        GPTConfig(qk_scale=1.3)


def test_layers_share_the_graphs_of_their_kinds() -> None:
    """As a GPU compiles them; what differs from layer to layer, as its number, would be a graph more for each."""
    from torch._dynamo.testing import CompileCounter

    def count_graphs(n_layer: int) -> int:
        torch.compiler.reset()
        counter, model = CompileCounter(), make_model(n_layer=n_layer, sequence_len=256).train()
        model._compiled_block = torch.compile(Block.forward, backend=counter, dynamic=False)
        idx = torch.arange(512).view(2, 256) % 300
        model(idx, idx).backward()
        return counter.frame_count

    assert count_graphs(10) == count_graphs(6) <= 4


def test_recomputed_blocks_keep_as_little_while_evaluating() -> None:
    """A compiled model evaluates with gradients, and rows were chosen by what training keeps."""
    model = make_model(n_layer=6).train()
    model._compiled_block = Block.forward  # stands for compiled code
    model.recompute_blocks = True
    tokens = torch.zeros(2, 32, dtype=torch.long)

    def bytes_kept() -> int:
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(tokens, tokens)
        return kept

    in_training = bytes_kept()
    model.eval()
    with torch.no_grad():
        assert 0 < bytes_kept() <= in_training
        assert not model.features(tokens).requires_grad
