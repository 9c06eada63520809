"""The Image Transformer: what a query block sees, full attention as a special case, its stream, sizes, messages."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmtrain import models, schema
from lmtrain.errors import ConfigError, InputError
from lmtrain.nn.stream import RecomputingStream
from lmtrain.protocol import Cond, Spec

BASE = {"kind": "image_transformer", "layers": 2, "width": 16, "heads": 2}
GRID = (4, 6, 3)
LINE = {"query_block": 10, "memory_block": 7}
PLANE = {"attention": "local_2d", "query_shape": (2, 3), "memory_reach": (1, 2)}
WAYS = pytest.mark.parametrize(
    "keys",
    [
        {"attention": "full"},
        LINE,
        {**LINE, "norm_first": True},
        PLANE,
        {**PLANE, "query_shape": (2, 6)},
        {**LINE, "head": "logistics", "components": 3},
    ],
    ids=["full", "line", "norm-first", "plane", "wide-plane", "logistics"],
)


def make(grid=GRID, *, V=5, seed=0, push=0.0, **keys):
    torch.manual_seed(seed)
    T = grid[0] * grid[1] * grid[2]
    model = models.build(models.parse({**BASE, **keys}), Spec(alphabet=V, context=T, bos=V, grid=grid))
    if push:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape), alpha=push)
    return model.eval()


def rows(grid=GRID, batch=3, *, V=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_BT = torch.randint(V, (batch, grid[0] * grid[1] * grid[2]), generator=generator)
    return x_BT, Cond(torch.full((batch,), V))


def predict(model, x_BT, cond):
    with torch.no_grad():
        return model.predict(x_BT, cond=cond)


def moved(model, x_BT, cond):
    """bool [T, T]: whether a change of symbol s (second) moves the prediction of symbol t (first) by a single bit."""
    before = predict(model, x_BT, cond)
    out = torch.zeros(x_BT.shape[1], x_BT.shape[1], dtype=torch.bool)
    for s in range(x_BT.shape[1]):
        other_BT = x_BT.clone()
        other_BT[:, s] = (other_BT[:, s] + 1) % model.alphabet
        out[:, s] = (predict(model, other_BT, cond) != before).flatten(2).any(2).any(0)
    return out


@WAYS
def test_no_symbol_sees_a_later_one(keys):
    model = make(push=0.3, **keys)
    order = list(model.order or range(72))
    seen_TT = moved(model, *rows())[order][:, order]  # in the order in which symbols are taken
    assert not seen_TT.triu().any()
    # The symbol just before is the input itself.
    assert seen_TT.diagonal(-1).all()


def test_what_a_query_block_sees_in_a_line():
    """One layer: the 7 inputs before the block; input t is symbol t - 1."""
    seen_TT = moved(make(layers=1, push=0.3, **LINE), *rows())
    for t in range(72):
        start = t // 10 * 10
        inputs = range(max(0, start - 7), t + 1)
        assert seen_TT[t].nonzero()[:, 0].tolist() == [i - 1 for i in inputs if i]


def test_what_a_query_block_sees_in_a_plane():
    """One layer, blocks of 2 x 2 pixels: one row above and one column to either side, as far as taken before."""
    grid = (4, 6, 1)
    model = make(grid, layers=1, push=0.3, attention="local_2d", query_shape=(2, 2), memory_reach=(1, 1))
    order = list(model.order)
    assert order[:8] == [0, 1, 6, 7, 2, 3, 8, 9]
    seen_TT = moved(model, *rows(grid))
    for u, p in enumerate(order):
        top, left = p // 6 // 2 * 2, p % 6 // 2 * 2
        inputs = [v for v in range(u + 1) if top - 1 <= order[v] // 6 and left - 1 <= order[v] % 6 <= left + 2]
        assert seen_TT[p].nonzero()[:, 0].tolist() == sorted(order[v - 1] for v in inputs if v)
    # The block in the lower middle sees above it to the right (what stands at 10 is input 5), not beside it.
    assert seen_TT[14, 5]
    assert not seen_TT[14, 16]


COVERING = [
    {"query_block": 72},
    {"query_block": 500},
    {"query_block": 10, "memory_block": 72},
    {"attention": "local_2d", "query_shape": (4, 6)},
    {"attention": "local_2d", "query_shape": (1, 6), "memory_reach": (4, 0)},
]


@pytest.mark.parametrize("keys", COVERING)
def test_full_attention_is_a_block_that_covers_the_image(keys):
    x_BT, cond = rows()
    full, local = make(push=0.3, attention="full"), make(push=0.3, **keys)
    torch.testing.assert_close(predict(local, x_BT, cond), predict(full, x_BT, cond), atol=1e-5, rtol=0)
    narrow = make(push=0.3, **LINE)
    assert (predict(narrow, x_BT, cond) - predict(full, x_BT, cond)).abs().max() > 0.1


@WAYS
def test_a_stream_answers_as_the_whole_image_does(keys):
    model = make(push=0.3, **keys)
    x_BT, cond = rows()
    params = predict(model, x_BT, cond)
    pmf_BTV = torch.stack([model.distribution(params[:, t]).log_pmf() for t in range(72)], dim=1)
    scored = model(x_BT, cond=cond)
    torch.testing.assert_close(pmf_BTV.gather(2, x_BT[..., None])[..., 0], scored, atol=1e-5, rtol=0)
    order = list(model.order or range(72))
    streams = [model.stream(3, cond=cond), RecomputingStream(model, 3, cond=cond, length=72)]
    for stream in streams:
        for t in order[:: 1 if stream is streams[0] else 9]:
            torch.testing.assert_close(stream.distribution().log_pmf(), pmf_BTV[:, t], atol=1e-5, rtol=1e-5)
            stream.push(x_BT[:, t])
            if stream is streams[1]:  # slow: every ninth answer
                for u in order[order.index(t) + 1 : order.index(t) + 9]:
                    stream.push(x_BT[:, u])
    for asked in (3, 10, 11, 47, 71):  # prompts that end inside blocks, at their ends and after several of them
        stream = model.stream(3, cond=cond)
        for t in order[:asked]:
            stream.push(x_BT[:, t])
        torch.testing.assert_close(stream.distribution().log_pmf(), pmf_BTV[:, order[asked]], atol=1e-5, rtol=1e-5)


def test_every_place_and_colour_has_a_vector_of_its_own():
    """Zero attention and network: the prediction is that of the input's vectors alone."""
    model = make(push=0.3, V=4)
    with torch.no_grad():
        for layer in model.layers:
            for linear in (layer.attention.out, layer.mlp.down):
                linear.weight.zero_()
                linear.bias.zero_()
    x_BT, cond = rows(V=4)
    in_BT = torch.cat([cond.start_B[:, None], x_BT[:, :-1]], 1)
    h = torch.zeros(3, 72, 16)
    for t in range(72):
        colour = (t - 1) % 3
        vector = model.embed.weight[in_BT[:, t] + 4 * colour] if t else model.embed.weight[12].expand(3, -1)
        h[:, t] = vector + model.row_embed.weight[t // 18] + model.column_embed.weight[t // 3 % 6]
        h[:, t] += model.channel_embed.weight[t % 3]
    for layer in model.layers:
        h = layer.mlp_norm(layer.attention_norm(h))
    torch.testing.assert_close(predict(model, x_BT, cond), h @ model.lm_head.weight.T, atol=1e-5, rtol=0)


# --- training


@WAYS
def test_recomputed_activations_change_nothing(keys):
    x_BT, cond = rows()
    results, kept = [], []
    for enabled in (False, True):
        model = make(push=0.3, dropout=0.3, **keys).train()
        model.checkpoint_activations(enabled)
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
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2


def test_dropout_acts_in_training_only():
    x_BT, cond = rows()
    quiet, model = make(push=0.3), make(push=0.3, dropout=0.5)
    with torch.no_grad():
        want = quiet(x_BT, cond=cond)
        assert torch.equal(model(x_BT, cond=cond), want)
        assert not torch.equal(model.train()(x_BT, cond=cond), want)


@WAYS
def test_bf16_is_near_fp32_and_answers_in_float32(keys):
    model, half = make(push=0.05, **keys), make(push=0.05, **keys).bfloat16()
    x_BT, cond = rows()
    want, got = model(x_BT, cond=cond), half(x_BT, cond=cond)
    assert got.dtype == torch.float32
    assert 1e-6 < (got - want).abs().max() < 0.2
    got.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in half.parameters())


def test_tables_are_no_part_of_a_checkpoint():
    model = make(**PLANE)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


# --- counts


@WAYS
def test_flops_are_those_that_torch_counts(keys):
    """torch counts every score of a block with its padded memory; we count what a query may see."""
    model = make(**keys)
    x_BT, cond = rows()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x_BT, cond=cond)
    blocks = model.blocks
    reach = blocks.size + max(len(memory) for memory in blocks.memory)
    scores = len(blocks.memory) * blocks.size * reach
    sees = {"full": 72 * 73 / 2}.get(keys.get("attention"), blocks.pairs())
    attention = 4 * 2 * 16
    forward = (counter.get_total_flops() / 3 - attention * (scores - sees)) / 72
    assert model.flops_per_symbol(72) == pytest.approx(3 * forward, rel=1e-9)


def test_parameter_counts():
    model = make(**LINE)
    total = sum(p.numel() for p in model.parameters())
    tables = (3 * 5 + 1) * 16 + 4 * 16 + 6 * 16 + 3 * 16 + 5 * 16
    assert model.parameter_counts() == {"total": total, "without_embeddings": total - tables}


# --- limits and messages


def test_what_it_cannot_read_is_refused():
    with pytest.raises(ConfigError, match="no grid"):
        models.build(models.parse(BASE), Spec(alphabet=5, context=8, bos=4))
    with pytest.raises(ConfigError, match="real numbers"):
        models.build(models.parse(BASE), Spec(alphabet=0, context=4, bos=0, grid=(2, 2, 1)))
    with pytest.raises(ConfigError, match=r"query_shape = \[3, 3\] does not divide images of 4 x 6 pixels"):
        make(attention="local_2d", query_shape=(3, 3))
    with pytest.raises(ConfigError, match="heads = 3 does not divide width = 16; use"):
        models.parse({**BASE, "heads": 3})
    with pytest.raises(ConfigError, match="query_shape"):
        models.parse({**BASE, "query_shape": (0, 3)})
    x_BT, cond = rows()
    with pytest.raises(InputError, match="71 symbols were given; images have 72"):
        make(**PLANE)(x_BT[:, :71], cond=cond)
    with pytest.raises(InputError, match="73 symbols"):
        make(**LINE)(torch.cat([x_BT, x_BT[:, :1]], 1), cond=cond)
    short = predict(make(push=0.3, **LINE), x_BT[:, :31], cond)
    torch.testing.assert_close(short, predict(make(push=0.3, **LINE), x_BT, cond)[:, :31], atol=1e-6, rtol=0)


def test_the_paper_config_has_the_papers_size():
    config = schema.load(Path(__file__).resolve().parents[2] / "configs" / "image_transformer-paper-cifar10.yaml")
    _, model_config = schema.need_train(config)
    with torch.device("meta"):
        model = models.build(model_config, Spec(alphabet=256, context=3072, bos=256, grid=(32, 32, 3), labels=10))
    D, hidden = 512, 2048
    layer = (4 * D * D + 4 * D) + (2 * D * hidden + hidden + D) + 2 * 2 * D
    tables = (3 * 256 + 1 + 32 + 32 + 3 + 256) * D
    assert model.parameter_counts() == {"total": 12 * layer + tables, "without_embeddings": 12 * layer}
    assert (model.blocks.size, model.blocks.room, len(model.blocks.memory)) == (256, 512, 12)
    assert model.order is None
