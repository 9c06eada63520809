"""The chunked categorical head against plain log_softmax, and the distribution against its definition."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmtrain.nn.head import Categorical, log_prob, logits

N, D, V, R = 13, 5, 7, 8


def problem(dtype, *, lead=(N,), rows=R):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(*lead, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(rows, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    x = torch.randint(V, lead, generator=generator)
    g = torch.randn(lead, dtype=torch.float64, generator=generator)
    return h, w, x, g


def plain(h, w, x):
    return torch.log_softmax(h @ w[:V].T, dim=-1).gather(-1, x[..., None])[..., 0]


@pytest.mark.parametrize("rows_at_once", [1, 2, 5, 13, 1000])
def test_value_and_gradient_are_those_of_log_softmax(rows_at_once):
    h, w, x, g = problem(torch.float64)
    out = log_prob(h, w, x, alphabet=V, chunk=rows_at_once * V)
    want = plain(h, w, x)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    got = torch.autograd.grad(out, (h, w), g)
    for a, b in zip(got, torch.autograd.grad(want, (h, w), g), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert torch.equal(got[1][V:], torch.zeros(R - V, D, dtype=torch.float64))
    torch.autograd.gradcheck(lambda h, w: log_prob(h, w, x, alphabet=V, chunk=rows_at_once * V), (h, w))


@pytest.mark.parametrize("chunk", [2 * V, 1000])
def test_only_the_wanted_gradient(chunk):
    h, w, x, g = problem(torch.float64)
    want = torch.autograd.grad(plain(h, w, x), (h, w), g)
    for leaf, other, expected in ((0, 1, want[0]), (1, 0, want[1])):
        ins = [h, w]
        ins[other] = ins[other].detach()
        (got,) = torch.autograd.grad(log_prob(*ins, x, alphabet=V, chunk=chunk), ins[leaf], g)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [3 * V, 1000])
def test_rows_of_symbols_keep_their_shape(chunk):
    h, w, x, _ = problem(torch.float64, lead=(3, 4))
    out = log_prob(h.transpose(0, 1).contiguous().transpose(0, 1), w, x, alphabet=V, chunk=chunk)
    assert out.shape == (3, 4)
    torch.testing.assert_close(out, plain(h, w, x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [3 * V, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_inside(dtype, chunk):
    h, w, x, g = problem(dtype)
    out = log_prob(h, w, x, alphabet=V, chunk=chunk)
    assert out.dtype == torch.float32
    want = plain(h.double(), w.double(), x)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    dh, dw = torch.autograd.grad(out, (h, w), g.float())
    assert dh.dtype == dw.dtype == dtype
    eh, ew = torch.autograd.grad(want, (h, w), g)
    step = torch.finfo(dtype).eps
    for a, b in ((dh, eh), (dw, ew)):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=2 * step)


def test_logits_are_float32_and_differentiable():
    h, w, _, _ = problem(torch.bfloat16)
    out = logits(h, w, alphabet=V)
    assert out.dtype == torch.float32
    assert out.shape == (N, V)
    torch.testing.assert_close(out, h.float() @ w[:V].float().T, atol=1e-5, rtol=0)
    h64, w64, _, _ = problem(torch.float64)
    torch.autograd.gradcheck(lambda h, w: logits(h, w, alphabet=V), (h64, w64))


def test_extreme_logits_stay_finite():
    h = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    w = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    x = torch.tensor([1, 1])
    for chunk in (3, 100):
        out = log_prob(h, w, x, alphabet=3, chunk=chunk)
        torch.testing.assert_close(out, torch.tensor([-400.0, 0.0]))
        for grad in torch.autograd.grad(out.sum(), (h, w)):
            assert torch.isfinite(grad).all()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_the_whole_array_of_logits_never_exists():
    n, d, v, rows = 64, 4, 100, 8
    h = torch.randn(n, d, requires_grad=True)
    w = torch.randn(v, d, requires_grad=True)
    x = torch.randint(v, (n,))
    with Largest() as plain_mode:
        torch.log_softmax(h @ w.T, dim=-1).sum().backward()
    assert plain_mode.elements == n * v
    with Largest() as mode:
        log_prob(h, w, x, alphabet=v, chunk=rows * v).sum().backward()
    assert mode.elements == rows * v
    with Largest() as mode, torch.no_grad():
        log_prob(h, w, x, alphabet=v, chunk=rows * v)
    assert mode.elements == rows * v


def test_autocast_does_not_round_the_head():
    h, w, x, _ = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = log_prob(h, w, x, alphabet=V)
        free = logits(h, w, alphabet=V)
    torch.testing.assert_close(out, plain(h, w, x), atol=1e-6, rtol=0)
    torch.testing.assert_close(free, h @ w[:V].T, atol=1e-6, rtol=0)


# --- the distribution


def test_pmf_is_exact_and_normalised():
    free = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)) * 5
    d = Categorical(free)
    torch.testing.assert_close(d.log_pmf(), torch.log_softmax(free, dim=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(d.log_pmf().double().exp().sum(1), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
    x = torch.tensor([0, 8, 3, 3])
    assert torch.equal(d.log_prob(x), d.log_pmf()[torch.arange(4), x])


def test_sample_is_the_quantile():
    p = np.array([0.125, 0.0, 0.5, 0.25, 0.125, 0.0])
    with np.errstate(divide="ignore"):
        free = torch.from_numpy(np.log(p)).float()
    noise = np.concatenate([np.linspace(0, 1, 2001)[:-1], [np.nextafter(1.0, 0.0), 0.0, 0.125, 0.625]])
    got = Categorical(free.expand(len(noise), -1)).sample(torch.from_numpy(noise)).numpy()
    # Brute force, from the definition: the smallest symbol whose cumulative probability exceeds the noise.
    want = np.array([next(v for v in range(6) if p[: v + 1].sum() > u) for u in noise])
    near_edge = np.min(np.abs(noise[:, None] - np.cumsum(p)[None]), axis=1) < 1e-9
    assert np.array_equal(got[~near_edge], want[~near_edge])
    assert set(got) == {0, 2, 3, 4}  # never a symbol without probability


def test_the_highest_noise_never_leaves_the_alphabet():
    generator = torch.Generator().manual_seed(2)
    free = torch.randn(2000, 50, generator=generator) * 10
    free[:, 40:] = -torch.inf
    noise = torch.full((2000,), np.nextafter(1.0, 0.0), dtype=torch.float64)
    x = Categorical(free).sample(noise)
    assert int(x.max()) < 40
    assert torch.isfinite(Categorical(free).log_prob(x)).all()
    assert torch.equal(Categorical(free).sample(torch.zeros(2000, dtype=torch.float64)), torch.zeros(2000).long())
