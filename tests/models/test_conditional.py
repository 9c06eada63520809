"""Class conditioning: labels matter, to every symbol and in streams; without labels one line says what to do."""

import pytest
import torch

from lmtrain import models
from lmtrain.errors import ConfigError, InputError
from lmtrain.protocol import Carries, Cond, Spec

MODELS = {
    "gpt-learned": {"kind": "gpt", "layers": 2, "width": 16, "heads": 2, "positions": "learned"},
    "gpt-rotary": {"kind": "gpt", "layers": 2, "width": 16, "heads": 2},
    "lstm": {"kind": "rnn", "layers": 2, "width": 16, "embed_width": 12},
    "gru": {"kind": "rnn", "cell": "gru", "layers": 1, "width": 16, "tied": False},
    "image_transformer": {
        "kind": "image_transformer", "layers": 2, "width": 16, "heads": 2, "query_block": 5, "memory_block": 4
    },
    "row_lstm": {"kind": "pixelrnn", "variant": "row_lstm", "layers": 2, "hidden": 4, "head_width": 24},
    "diagonal_bilstm": {"kind": "pixelrnn", "layers": 2, "hidden": 4, "head_width": 24},
}  # fmt: skip
SPEC = Spec(alphabet=5, context=12, bos=5, grid=(3, 4, 1), labels=3)
every = pytest.mark.parametrize("name", MODELS)


def make(name, spec=SPEC, **keys):
    torch.manual_seed(0)
    model = models.build(models.parse({**MODELS[name], "conditional": True, **keys}), spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.3)
    return model.eval()


def rows(batch=6):
    x_BT = torch.randint(5, (batch, 12), generator=torch.Generator().manual_seed(1))
    return x_BT, Cond(torch.full((batch,), 5), label_B=torch.arange(batch) % 3)


@every
def test_a_label_moves_every_prediction_of_its_own_row_alone(name):
    model = make(name)
    x_BT, cond = rows()
    before = model.predict(x_BT, cond=cond)
    other_B = cond.label_B.clone()
    other_B[2] = 0  # was 2
    after = model.predict(x_BT, cond=Cond(cond.start_B, label_B=other_B))
    changed_BT = (after != before).any(2)
    assert changed_BT[2].all()
    assert not changed_BT[[0, 1, 3, 4, 5]].any()


@every
def test_streams_are_given_the_label(name):
    model = make(name)
    x_BT, cond = rows()
    pmf_BTV = torch.log_softmax(model.predict(x_BT, cond=cond), dim=-1)
    stream = model.stream(6, cond=cond)
    for t in range(12):
        torch.testing.assert_close(stream.distribution().log_pmf(), pmf_BTV[:, t], atol=1e-5, rtol=0)
        stream.push(x_BT[:, t])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_carried_rows_keep_their_label(name):
    model = make(name)
    x_BT, cond = rows()
    assert isinstance(model, Carries)
    state, got = None, []
    for piece in x_BT.split(5, dim=1):
        logp, state = model.carry(piece, cond=cond, state=state)
        got.append(logp)
    torch.testing.assert_close(torch.cat(got, 1), model(x_BT, cond=cond), atol=1e-5, rtol=0)


@every
def test_one_class_learns_its_own_symbol(name):
    """Rows that differ by their label alone can be told apart by it from the first symbol on."""
    model = make(name).train()
    x_BT = torch.tensor([[0], [2], [4]]).expand(3, 12).contiguous()
    cond = Cond(torch.full((3,), 5), label_B=torch.arange(3))
    adam = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(40):
        adam.zero_grad()
        loss = -model(x_BT, cond=cond).mean()
        loss.backward()
        adam.step()
    first = model.eval()(x_BT, cond=cond)[:, 0]
    assert first.min() > -0.3
    swapped = model(x_BT, cond=Cond(cond.start_B, label_B=torch.tensor([1, 2, 0])))[:, 0]
    assert swapped.max() < -2.0


@every
def test_without_labels_one_line_says_so(name):
    with pytest.raises(ConfigError, match=r"model.conditional = true, but .* no labels; set it to false") as caught:
        make(name, Spec(alphabet=5, context=12, bos=5, grid=(3, 4, 1)))
    assert "\n" not in str(caught.value)
    x_BT, cond = rows()
    with pytest.raises(InputError, match="without labels"):
        make(name)(x_BT, cond=Cond(cond.start_B))
    plain = make(name, conditional=False)
    assert torch.equal(plain(x_BT, cond=cond), plain(x_BT, cond=Cond(cond.start_B)))


@every
def test_class_vectors_are_counted_as_embeddings(name):
    with_classes, without = make(name).parameter_counts(), make(name, conditional=False).parameter_counts()
    assert with_classes["total"] - without["total"] in {3 * 16, 3 * 12, 3 * 8}
    assert with_classes["without_embeddings"] == without["without_embeddings"]


@pytest.mark.parametrize("kind", ["gpt", "rnn"])
def test_models_of_symbols_refuse_reals(kind):
    with pytest.raises(ConfigError, match="real numbers; take rnade"):
        models.build(models.parse({"kind": kind}), Spec(alphabet=0, context=4, bos=0))
