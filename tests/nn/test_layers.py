"""Norms, MLP, rotary positions, attention, linear maps: each against torch's own or a plain formula."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmtrain.nn.attention import Attention, KeyValueCache
from lmtrain.nn.linear import Linear
from lmtrain.nn.mlp import MLP, squared_relu
from lmtrain.nn.norms import norm, rms_norm
from lmtrain.nn.rotary import rotate, rotation

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- norms


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_are_torchs(kind):
    layer = norm(kind, 6, eps=1e-3, bias=True).double()
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(randn(6, seed=i + 1))
    h = randn(2, 3, 6).requires_grad_()
    if kind == "layernorm":
        want = F.layer_norm(h, (6,), layer.weight, layer.bias, 1e-3)
    else:
        want = F.rms_norm(h, (6,), layer.weight, 1e-3)
    g = randn(2, 3, 6, seed=9)
    ins = (h, *layer.parameters())
    torch.testing.assert_close(layer(h), want, atol=1e-12, rtol=0)
    for a, b in zip(torch.autograd.grad(layer(h), ins, g), torch.autograd.grad(want, ins, g), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    torch.autograd.gradcheck(layer, (h,))


def test_rms_norm_with_a_gain_for_each_head():
    h, w = randn(2, 3, 4, 6).requires_grad_(), randn(4, 6, seed=1).requires_grad_()
    want = torch.stack([F.rms_norm(h[:, :, i], (6,), w[i], 1e-5) for i in range(4)], dim=2)
    torch.testing.assert_close(rms_norm(h, w, eps=1e-5), want, atol=1e-12, rtol=0)
    torch.autograd.gradcheck(lambda h, w: rms_norm(h, w, eps=1e-5), (h, w))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_are_float32_inside(kind, dtype):
    """Large values whose squares overflow fp16 and whose sums lose everything in bf16."""
    layer = norm(kind, 512, eps=1e-5, bias=False)
    h = (randn(4, 512, dtype=torch.float32) * 300 + 1000).to(dtype)
    want = layer(h.float())
    got = layer.to(dtype)(h)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=0, rtol=2 * torch.finfo(dtype).eps)


# --- MLP


def test_squared_relu():
    a = randn(5, 7).requires_grad_()
    torch.testing.assert_close(squared_relu(a), torch.relu(a) ** 2)
    torch.autograd.gradcheck(squared_relu, (a,))


@pytest.mark.parametrize("activation", ["gelu", "gelu-tanh", "swiglu", "relu2"])
def test_mlp_formulas(activation):
    mlp = MLP(3, hidden=5, activation=activation, bias=True, std=0.5, out_std=0.5).double()
    with torch.no_grad():
        mlp.up.bias.copy_(randn(mlp.up.bias.numel()))
    h = randn(2, 4, 3, seed=3)
    a = (h @ mlp.up.weight.T + mlp.up.bias).detach().numpy()
    if activation == "swiglu":
        a = a[..., :5] / (1 + np.exp(-a[..., :5])) * a[..., 5:]
    elif activation == "relu2":
        a = np.maximum(a, 0) ** 2
    elif activation == "gelu":
        a = a * 0.5 * (1 + np.vectorize(math.erf)(a / math.sqrt(2)))
    else:
        a = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    want = torch.from_numpy(a) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(h), want, atol=1e-12, rtol=0)


# --- rotary


def test_rotation_is_the_block_diagonal_matrix_of_the_paper():
    d, base = 6, 100.0
    h = randn(1, 5, 2, d)
    got = rotate(h, rotation(torch.arange(5) + 3, head=d, base=base, dtype=F64))
    for t in range(5):
        matrix = np.zeros((d, d))
        for j in range(d // 2):
            angle = (t + 3) * base ** (-2 * j / d)
            matrix[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = [
                [math.cos(angle), -math.sin(angle)],
                [math.sin(angle), math.cos(angle)],
            ]
        for head in range(2):
            want = torch.from_numpy(matrix @ h[0, t, head].numpy())
            torch.testing.assert_close(got[0, t, head], want, atol=1e-12, rtol=0)


def test_rotation_depends_on_differences_alone_and_backs_up():
    d = 8
    q, k = randn(1, 1, 1, d), randn(1, 1, 1, d, seed=1)

    def score(t, s):
        turn = [rotation(torch.tensor([p]), head=d, base=1e4, dtype=F64) for p in (t, s)]
        return (rotate(q, turn[0]) * rotate(k, turn[1])).sum().item()

    assert score(9, 4) == pytest.approx(score(100_005, 100_000), abs=1e-9)
    assert abs(score(9, 4) - score(9, 5)) > 1e-6
    turn = rotation(torch.arange(5), head=d, base=1e4, dtype=F64)
    torch.autograd.gradcheck(lambda h: rotate(h, turn), (randn(2, 5, 3, d).requires_grad_(),))
    # a slice of a larger array, as in a fused product of queries, keys and values
    torch.autograd.gradcheck(lambda h: rotate(h[:, :, :2], turn), (randn(2, 5, 3, d).requires_grad_(),))


def test_far_positions_are_exact_in_float32():
    turn = rotation(torch.tensor([1_000_003]), head=2, base=1e4, dtype=torch.float32)
    assert turn.dtype == torch.complex64
    assert turn[0, 0, 0].real.item() == pytest.approx(math.cos(1_000_003), abs=1e-7)


def test_rotation_of_half_precision_keeps_its_dtype():
    h = randn(1, 4, 2, 6, dtype=torch.bfloat16)
    turn = rotation(torch.arange(4), head=6, base=1e4, dtype=torch.float32)
    got = rotate(h, turn)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, rotate(h.float(), turn).bfloat16(), atol=0, rtol=0)


# --- attention


def make(heads=4, kv_heads=4, *, qk_norm=False, bias=True, dropout=0.0):
    torch.manual_seed(0)
    layer = Attention(
        8, heads=heads, kv_heads=kv_heads, bias=bias, qk_norm=qk_norm, dropout=dropout, eps=1e-5, std=0.7, out_std=0.7
    ).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return layer


def slow_attention(layer, h, allowed, turn=None):
    """Position by position, head by head."""
    B, T, D = h.shape
    d, H, K = layer.head, layer.heads, layer.kv_heads
    qkv = F.linear(h, layer.qkv.weight, layer.qkv.bias)
    q, k, v = qkv[..., : H * d], qkv[..., H * d : (H + K) * d], qkv[..., (H + K) * d :]
    q, k, v = q.view(B, T, H, d), k.view(B, T, K, d), v.view(B, T, K, d)
    if layer.qk_norm is not None:
        q = q / (q.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.qk_norm.q_weight
        k = k / (k.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.qk_norm.k_weight
    if turn is not None:
        q, k = rotate(q, turn), rotate(k, turn)
    out = torch.zeros(B, T, H, d, dtype=h.dtype)
    for b in range(B):
        for t in range(T):
            past = [s for s in range(T) if allowed[b][t][s]]
            for i in range(H):
                j = i // (H // K)
                score = torch.stack([q[b, t, i] @ k[b, s, j] / math.sqrt(d) for s in past])
                out[b, t, i] = torch.softmax(score, 0) @ v[b, past, j]
    return F.linear(out.reshape(B, T, D), layer.out.weight, layer.out.bias)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_slow_one(kv_heads, qk_norm, rotary, masked):
    layer, h, T = make(kv_heads=kv_heads, qk_norm=qk_norm), randn(2, 5, 8, seed=2), 5
    turn = rotation(torch.arange(T), head=2, base=1e4, dtype=F64) if rotary else None
    allowed = torch.ones(2, 1, T, T, dtype=torch.bool).tril()
    if masked:
        allowed[0, 0, 3:, :3] = False
        allowed[1, 0, 1:, :1] = False
    want = slow_attention(layer, h, allowed[:, 0].tolist(), turn)
    got = layer(h, turn=turn, mask=allowed if masked else None)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cache_in_pieces_of_any_size(kv_heads):
    layer, T = make(kv_heads=kv_heads, qk_norm=True), 37
    h = randn(2, T, 8, seed=3)
    turn = rotation(torch.arange(T), head=2, base=1e4, dtype=F64)
    want = layer(h, turn=turn)
    for pieces in ([T], [1] * T, [5, 1, 1, 20, 10], [36, 1], [1, 36]):
        cache, at, got = KeyValueCache(1), 0, []
        for n in pieces:
            got.append(layer(h[:, at : at + n], turn=turn[at : at + n], cache=cache))
            cache.advance(n)
            at += n
        assert at == T
        torch.testing.assert_close(torch.cat(got, dim=1), want, atol=1e-12, rtol=0)


def test_cache_holds_key_value_heads_only():
    layer, cache = make(kv_heads=1), KeyValueCache(1)
    keys, values = cache.extend(0, randn(2, 1, 3, 2), randn(2, 1, 3, 2))
    assert keys.shape == values.shape == (2, 1, 3, 2)
    assert layer.qkv.weight.shape[0] == (4 + 1 + 1) * 2


def test_attention_dropout_is_on_in_training_only():
    layer, h = make(dropout=0.5), randn(2, 6, 8, seed=4)
    layer.eval()
    assert torch.equal(layer(h), layer(h))
    layer.train()
    torch.manual_seed(1)
    a = layer(h)
    b = layer(h)
    torch.manual_seed(1)
    assert not torch.equal(a, b)
    assert torch.equal(layer(h), a)
    many = torch.stack([layer(h) for _ in range(3000)]).mean(0)  # it leaves the mean where it was
    layer.eval()
    assert (many - layer(h)).abs().max() < 0.25 * (a - layer(h)).abs().max()


# --- linear maps and first values


def test_first_values():
    torch.manual_seed(0)
    layer = Linear(400, 300, bias=True, std=0.3)
    assert layer.weight.std().item() == pytest.approx(0.3, rel=0.02)
    assert abs(layer.weight.mean().item()) < 0.005
    assert torch.equal(layer.bias, torch.zeros(300))
    torch.manual_seed(0)
    zero = Linear(4, 3, bias=False, std=0.0)
    assert torch.equal(zero.weight, torch.zeros(3, 4))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)  # zeros draw nothing
