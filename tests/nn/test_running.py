"""Running hidden units against a loop over the equations, in value, in gradient and in memory."""

import pytest
import torch

from lmtrain.nn.running import RunningHidden

B, D, H, OUT = 5, 11, 7, 3


def layer(*, activation, scaled, chunk=2**22):
    torch.manual_seed(0)
    made = RunningHidden(
        D, H, first_O=[0.1, -0.2, 0.3], activation=activation, scaled=scaled, std=0.7, chunk=chunk
    ).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype), alpha=0.5)
    return made


def loop(made, x_BD, shift_BH):
    """The equations, one place after the other, by autograd."""
    a, out = made.bias + shift_BH, []
    for d in range(D):
        z = a if made.scale is None else made.scale[d] * a
        h = torch.sigmoid(z) if made.activation == "sigmoid" else z.clamp(min=0)
        out.append(h @ made.out_weight[d].T + made.out_bias.view(D, OUT)[d])
        a = a + x_BD[:, d, None] * made.weight[d]
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("chunk", [1, 2 * B * H, 4 * B * H, 2**22])
@pytest.mark.parametrize(("activation", "scaled"), [("sigmoid", False), ("relu", True)])
def test_values_and_gradients_are_those_of_the_loop(activation, scaled, chunk):
    made = layer(activation=activation, scaled=scaled, chunk=chunk)
    x_BD = torch.randn(B, D, dtype=torch.float64)
    shift_BH = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    g_BDO = torch.randn(B, D, OUT, dtype=torch.float64)
    got, want = made(x_BD, shift_BH=shift_BH), loop(made, x_BD, shift_BH)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    leaves = [*made.parameters(), shift_BH]
    for a, b in zip(torch.autograd.grad(got, leaves, g_BDO), torch.autograd.grad(want, leaves, g_BDO), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)
    free = made(x_BD)  # without a shift
    torch.testing.assert_close(free, loop(made, x_BD, torch.zeros(B, H, dtype=torch.float64)), atol=1e-12, rtol=0)


def test_bf16_weights_are_read_as_float32():
    made = layer(activation="sigmoid", scaled=False).bfloat16()
    x_BD = torch.randint(2, (B, D)).bfloat16()
    out = made(x_BD)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, made.float()(x_BD.float()), atol=1e-6, rtol=0)
    made.bfloat16()(x_BD).sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in made.parameters())


def test_hidden_units_exist_one_chunk_at_a_time():
    """What the backward pass keeps does not grow with B D H."""
    made = RunningHidden(512, 64, first_O=[0.0], activation="sigmoid", scaled=False, std=0.1, chunk=32 * 64 * 16)
    x_BD = torch.randint(2, (32, 512)).float()
    kept = []

    def pack(t):
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made(x_BD).sum().backward()
    assert max(kept) <= 2 * 512 * 64
    assert sum(kept) < 32 * 512 * 64 / 4
