"""The GPT model: GPT-2's own numbers, first values, dropout, memory, counts."""

import math
import os

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmtrain import models
from lmtrain.errors import ConfigError, InputError
from lmtrain.protocol import Cond, Spec

BASE = {"kind": "gpt", "layers": 2, "width": 16, "heads": 4}
SPEC = Spec(alphabet=11, context=8, bos=10)


def make(spec=SPEC, *, seed=0, push=0.0, **keys):
    torch.manual_seed(seed)
    model = models.build(models.parse({**BASE, **keys}), spec)
    if push:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape), alpha=push)
    return model


def rows(spec=SPEC, batch=3, *, T=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_BT = torch.randint(spec.alphabet, (batch, T or spec.context), generator=generator)
    return x_BT, Cond(torch.randint(spec.alphabet, (batch,), generator=generator))


# --- GPT-2


def copy_from_transformers(model, theirs):
    """Their Conv1D weights are [in, out], ours [out, in]."""
    t = theirs.transformer
    with torch.no_grad():
        model.embed.weight.copy_(t.wte.weight)
        model.position_embed.weight.copy_(t.wpe.weight)
        for ours, h in zip(model.blocks, t.h, strict=True):
            for norm, ln in ((ours.attention_norm, h.ln_1), (ours.mlp_norm, h.ln_2)):
                norm.weight.copy_(ln.weight)
                norm.bias.copy_(ln.bias)
            pairs = ((ours.attention.qkv, h.attn.c_attn), (ours.attention.out, h.attn.c_proj),
                     (ours.mlp.up, h.mlp.c_fc), (ours.mlp.down, h.mlp.c_proj))  # fmt: skip
            for linear, conv in pairs:
                linear.weight.copy_(conv.weight.T)
                linear.bias.copy_(conv.bias)
        model.final_norm.weight.copy_(t.ln_f.weight)
        model.final_norm.bias.copy_(t.ln_f.bias)


@pytest.fixture
def transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    return transformers


def gpt2_pair(transformers, *, layers, width, heads, vocab, context):
    torch.manual_seed(3)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocab, n_positions=context)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # biases and gains too
            p.add_(torch.randn(p.shape), alpha=0.05)
    ours = make(
        Spec(alphabet=vocab, context=context, bos=vocab - 1),
        preset="gpt2", context=None, layers=layers, width=width, heads=heads,
    ).eval()  # fmt: skip
    copy_from_transformers(ours, theirs)
    return ours, theirs


def test_preset_gpt2_is_transformers_gpt2(transformers):
    ours, theirs = gpt2_pair(transformers, layers=3, width=48, heads=6, vocab=101, context=32)
    ids = torch.randint(101, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(ids[:, :-1]).logits
        # Their position t reads ids[t] and predicts ids[t + 1]: our row starts from ids[0] and has symbols ids[1:].
        got = ours.predict(ids[:, 1:], cond=Cond(ids[:, 0]))
        scored = ours(ids[:, 1:], cond=Cond(ids[:, 0]))
    assert (got - want).abs().max() < 1e-5
    assert want.std() > 0.3
    nll = torch.nn.functional.cross_entropy(want.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(4, 32)
    assert (scored + nll).abs().max() < 1e-5
    assert sum(p.numel() for p in theirs.parameters()) == ours.parameter_counts()["total"]


def test_gradients_are_those_of_transformers_gpt2(transformers):
    ours, theirs = gpt2_pair(transformers, layers=2, width=32, heads=4, vocab=29, context=17)
    ids = torch.randint(29, (3, 17), generator=torch.Generator().manual_seed(0))
    theirs(ids, labels=ids).loss.backward()  # a mean over 3 * 16 predictions
    (-ours(ids[:, 1:], cond=Cond(ids[:, 0])).sum() / 48).backward()
    t = theirs.transformer
    pairs = [(ours.embed.weight, t.wte.weight), (ours.position_embed.weight, t.wpe.weight)]
    for a, b in zip(ours.blocks, t.h, strict=True):
        pairs += [(a.attention_norm.weight, b.ln_1.weight), (a.mlp.up.bias, b.mlp.c_fc.bias)]
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)
    for a, b in zip(ours.blocks, t.h, strict=True):
        for linear, conv in ((a.attention.qkv, b.attn.c_attn), (a.attention.out, b.attn.c_proj),
                             (a.mlp.up, b.mlp.c_fc), (a.mlp.down, b.mlp.c_proj)):  # fmt: skip
            torch.testing.assert_close(linear.weight.grad, conv.weight.grad.T, atol=1e-6, rtol=1e-4)


def test_preset_gpt2_has_the_published_size():
    config = models.parse({"kind": "gpt", "preset": "gpt2"})
    assert (config.layers, config.width, config.heads, config.context, config.dropout) == (12, 768, 12, 1024, 0.1)
    with torch.device("meta"):
        model = models.build(config, Spec(alphabet=50257, context=1024, bos=50256))
    assert model.parameter_counts()["total"] == 124_439_808
    for preset, total in (("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)):
        with torch.device("meta"):
            model = models.build(models.parse({"kind": "gpt", "preset": preset}), Spec(50257, 1024, 50256))
        assert model.parameter_counts()["total"] == total


def test_keys_beside_a_preset_go_first_and_the_resolved_config_reads_back():
    config = models.parse({"kind": "gpt", "preset": "gpt2", "dropout": 0.0, "layers": 2})
    assert (config.dropout, config.layers, config.width) == (0.0, 2, 768)
    assert models.parse(config.model_dump(mode="json")) == config


# --- first values


def test_first_values_follow_the_seed_and_nothing_else():
    a, b, c = make(seed=5).state_dict(), make(seed=5).state_dict(), make(seed=6).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])
    # Built as another dtype would be, the draws are the same ones.
    torch.set_default_dtype(torch.bfloat16)
    try:
        half = make(seed=5).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert half["embed.weight"].dtype == torch.bfloat16
    assert all(torch.equal(half[k], a[k].bfloat16()) for k in a)


def test_gpt2_initialisation():
    model = make(Spec(alphabet=500, context=200, bos=499), preset="gpt2", context=None, layers=8, width=128, heads=4)
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    for name, std in stds.items():
        want = 0.02 / math.sqrt(2 * 8) if name.endswith(("out.weight", "down.weight")) else 0.02
        assert std == pytest.approx(want, rel=0.03), name
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name


def test_zero_projections_begin_as_a_bigram_model():
    """Every block adds nothing at first, so a prediction depends on the last input alone."""
    model = make(zero_projections=True).eval()
    x_BT, cond = rows(batch=16)
    free = model.predict(x_BT, cond=cond)
    in_BT = torch.cat([cond.start_B[:, None], x_BT[:, :-1]], 1)
    for v in range(11):
        same = free[in_BT == v]
        assert (same - same[:1]).abs().max() < 1e-6
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith(("out.weight", "down.weight")))


# --- dropout, recomputation, precision


@pytest.mark.parametrize("key", ["dropout", "embed_dropout", "attention_dropout", "residual_dropout"])
def test_every_dropout_acts_in_training_only(key):
    model, quiet = make(push=0.3, **{key: 0.5}), make(push=0.3)
    x_BT, cond = rows()
    with torch.no_grad():
        want = quiet.eval()(x_BT, cond=cond)
        assert torch.equal(model.eval()(x_BT, cond=cond), want)
        assert not torch.equal(model.train()(x_BT, cond=cond), want)
        # The three are apart: the default of one does not switch on another.
        off = make(push=0.3, dropout=0.5, embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0).train()
        assert torch.equal(off(x_BT, cond=cond), want)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("part", [None, "attention", "mlp"])
def test_recomputed_activations_change_nothing(dropout, masked, part):
    """Losses and gradients bit for bit, dropout included; and less is kept."""
    x_BT, cond = rows(batch=4)
    if masked:
        cond = Cond(cond.start_B, torch.rand(4, 8, generator=torch.Generator().manual_seed(2)) < 0.3)
    results, kept = [], []
    for enabled in (False, True):
        model = make(push=0.3, dropout=dropout).train()
        model.checkpoint_activations(enabled, part=part)
        calls = {"attention": 0, "mlp": 0}
        for block in model.blocks:
            for name in calls:
                hook = lambda *_, name=name, calls=calls: calls.update({name: calls[name] + 1})  # noqa: E731
                getattr(block, name).register_forward_pre_hook(hook)
        sizes = []

        def note(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        torch.manual_seed(4)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = model(x_BT, cond=cond)
        kept.append(sum(sizes))
        out.sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
        twice = {name for name, count in calls.items() if count == 2 * len(model.blocks)}
        assert twice == (({part} if part else set(calls)) if enabled else set())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / (1.2 if part else 2)
    model.checkpoint_activations(False)
    torch.manual_seed(4)
    assert torch.equal(model(x_BT, cond=cond).detach(), results[0][0])


@pytest.mark.parametrize("keys", [{}, {"preset": "gpt2", "context": None, "dropout": 0.0}], ids=["small", "gpt2"])
def test_bf16_is_near_fp32_and_answers_in_float32(keys):
    keys = {**keys, "layers": 2, "width": 16, "heads": 4}
    model, half = make(push=0.1, **keys), make(push=0.1, **keys).bfloat16()
    x_BT, cond = rows(batch=8)
    want, got = model.eval()(x_BT, cond=cond), half.eval()(x_BT, cond=cond)
    assert got.dtype == torch.float32
    assert half.predict(x_BT, cond=cond).dtype == torch.float32
    assert 1e-6 < (got - want).abs().max() < 0.1
    got.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in half.parameters())
    stream = half.stream(8, cond=cond)
    for t in range(8):
        torch.testing.assert_close(stream.distribution().log_prob(x_BT[:, t]), got[:, t].detach(), atol=0.05, rtol=0)
        stream.push(x_BT[:, t])


# --- counts


@pytest.mark.parametrize(
    "keys",
    [
        {"layers": 3, "kv_heads": 2, "tied": False, "activation": "swiglu"},
        {"positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu"},
    ],
)
def test_flops_are_those_that_torch_counts(keys):
    """torch counts products and all T^2 scores of attention; we count the T (T + 1) / 2 that causality leaves."""
    T, B, spec = 32, 2, Spec(alphabet=37, context=32, bos=36)
    model = make(spec, **keys)
    x_BT, cond = rows(spec, B)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x_BT, cond=cond)
    whole, causal = T, (T + 1) / 2
    attention = 4 * model.config.layers * model.config.width
    forward = counter.get_total_flops() / (B * T) - attention * (whole - causal)
    assert model.flops_per_symbol(T) == pytest.approx(3 * forward, rel=1e-9)


def test_parameter_counts():
    model = make(positions="learned", tied=False)
    total = sum(p.numel() for p in model.parameters())
    tables = 11 * 16 + 8 * 16 + 11 * 16
    assert model.parameter_counts() == {"total": total, "without_embeddings": total - tables}
    reserved = make(Spec(alphabet=11, context=8, bos=11))
    assert reserved.embed.weight.shape == (12, 16)
    x_BT, _ = rows()
    assert reserved.predict(x_BT, cond=Cond(torch.full((3,), 11))).shape == (3, 8, 11)


# --- limits and messages


def test_rows_may_be_shorter_than_the_context_but_not_longer():
    for positions in ("learned", "rotary"):
        model = make(push=0.2, positions=positions).eval()
        x_BT, cond = rows()
        torch.testing.assert_close(model(x_BT[:, :5], cond=cond), model(x_BT, cond=cond)[:, :5], atol=1e-6, rtol=0)
        long_BT = torch.cat([x_BT, x_BT[:, :1]], dim=1)
        with pytest.raises(InputError, match="9 symbols are longer than the model's context of 8"):
            model(long_BT, cond=cond)


def test_a_larger_context_than_the_rows():
    model = make(context=20, positions="learned")
    assert model.context == 20
    assert model.position_embed.weight.shape == (20, 16)
    with pytest.raises(ConfigError, match=r"model.context = 4 is less than data.context = 8"):
        make(context=4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"heads": 3}, "heads = 3 does not divide width = 16; use 2"),
        ({"kv_heads": 3}, "kv_heads = 3 does not divide heads = 4"),
        ({"heads": 16}, "rotary positions need an even head size"),
        ({"layer": 3}, "unknown key 'layer'; did you mean 'layers'"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"activation": "gelu_tanh"}, "activation"),
        ({"preset": "gpt3"}, "preset"),
        ({"layers": 0}, "layers = 0"),
    ],
)
def test_bad_keys_give_one_line(keys, message):
    with pytest.raises(ConfigError, match=message) as raised:
        models.parse({**BASE, **keys})
    assert "\n" not in str(raised.value)


def test_kinds():
    assert {"gpt", "rnn"} <= set(models.kinds())
    with pytest.raises(ConfigError, match="did you mean 'gpt'"):
        models.parse({"kind": "gtp"})
    with pytest.raises(ConfigError, match=r"model\.kind is not given; known: .*gpt, .*rnn"):
        models.parse({})
    for kind in (3, "os", "__init__", "../gpt"):
        with pytest.raises(ConfigError):
            models.parse({"kind": kind})


def test_blind_spot_of_relative_positions():
    """Declared in models/gpt.py: n equal first inputs cannot be counted by rotary positions; learned ones can."""
    x_BT, cond = torch.full((1, 8), 4), Cond(torch.tensor([4]))
    rotary = make(push=0.3).eval().predict(x_BT, cond=cond)[0]
    assert (rotary - rotary[:1]).abs().max() < 1e-5
    learned = make(push=0.3, positions="learned").eval().predict(x_BT, cond=cond)[0]
    assert (learned[1:] - learned[:1]).abs().max() > 1e-2
    # From the first other symbol on, order and distance are seen.
    x_BT[0, 1] = 5
    seen = make(push=0.3).eval().predict(x_BT, cond=cond)[0]
    assert (seen[4:] - seen[3:4]).abs().max() > 1e-3


def test_document_mask_starts_learned_positions_again():
    """The same document at the row's start and in its middle, by learned positions, is the same."""
    model = make(push=0.3, positions="learned").eval()
    document = torch.tensor([3, 1, 4, 10])
    x_BT = torch.cat([document, document])[None]
    first_BT = torch.zeros(1, 8, dtype=torch.bool)
    first_BT[0, 0] = first_BT[0, 4] = True
    out = model(x_BT, cond=Cond(torch.tensor([10]), first_BT))[0]
    torch.testing.assert_close(out[:4], out[4:], atol=1e-6, rtol=0)


def test_the_order_of_the_past_counts():
    """A permutation of the past changes what comes next (attention without positions would not see it)."""
    for positions in ("learned", "rotary"):
        model = make(push=0.4, positions=positions, layers=1).eval()
        x_BT = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [2, 1, 3, 4, 5, 6, 7, 8]])
        a, b = model.predict(x_BT, cond=Cond(torch.tensor([0, 0])))[:, -1].detach().numpy()
        assert np.abs(a - b).max() > 1e-3
