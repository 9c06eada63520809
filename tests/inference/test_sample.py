"""Samples: their frequencies against probabilities worked out by hand, and what a seed promises."""

from __future__ import annotations

import math
from collections import Counter
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from lmtrain import models
from lmtrain.config import build
from lmtrain.errors import ConfigError, DivergenceError, InputError
from lmtrain.inference.reopen import Plan, log_probs
from lmtrain.inference.sample import SampleConfig, TextStream, bend, noise, quantile, sample
from lmtrain.protocol import Cond, Model, Spec
from tests.inference.hand_models import Bigram, Bytes, Fading

END = 3


def config(**settings: Any) -> SampleConfig:
    return build(SampleConfig, settings, where="sample")


def gpt(alphabet: int = 4, context: int = 6) -> Model:
    torch.manual_seed(0)
    settings = {"kind": "gpt", "layers": 1, "width": 8, "heads": 2}
    model = models.build(models.parse(settings), Spec(alphabet=alphabet, context=context, bos=END))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.6 * torch.randn(p.shape))
    return model


def rnn(alphabet: int = 4) -> Model:
    torch.manual_seed(0)
    model = models.build(models.parse({"kind": "rnn", "width": 8}), Spec(alphabet=alphabet, context=6, bos=END))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.6 * torch.randn(p.shape))
    return model


def bent_by_hand(p: list[float], settings: dict[str, Any]) -> list[float]:
    """Temperature, then top-k, then top-p, with Python lists."""
    temperature = settings.get("temperature", 1.0)
    if temperature == 0:
        return [float(v == p.index(max(p))) for v in range(len(p))]
    p = [x ** (1 / temperature) for x in p]
    order = sorted(range(len(p)), key=lambda v: -p[v])[: settings.get("top_k") or len(p)]
    total = sum(p[v] for v in order)
    kept, reached = [], 0.0
    for v in order:
        kept.append(v)
        reached += p[v] / total
        if reached >= (settings.get("top_p") or 2):
            break
    total = sum(p[v] for v in kept)
    return [p[v] / total if v in kept else 0.0 for v in range(len(p))]


def outcomes(model: Model, settings: dict[str, Any], *, length: int) -> dict[tuple[int, ...], float]:
    """Every sample of at most `length` symbols and its probability, from `forward` and the hand-made bending."""
    found: dict[tuple[int, ...], float] = {}
    open_texts: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for _ in range(length):
        longer = []
        for text, p_text in open_texts:
            x_VT = torch.tensor([[*text, v] for v in range(4)])
            with torch.no_grad():
                p_V = model(x_VT, cond=Cond(torch.full((4,), END)))[:, -1].double().exp().tolist()
            for v, p in enumerate(bent_by_hand(p_V, settings)):
                if p == 0:
                    continue
                if v == END:
                    found[(*text, v)] = p_text * p
                else:
                    longer.append(((*text, v), p_text * p))
        open_texts = longer
    return found | dict(open_texts)


def p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Chi-square, cells under 5 expected pooled, the tail by Wilson & Hilferty (1931); 0 if the impossible came."""
    n = counts.total()
    if set(counts) - set(expected):
        return 0.0
    cells = [(n * p, counts[text]) for text, p in expected.items()]
    big = [cell for cell in cells if cell[0] >= 5]
    small = [cell for cell in cells if cell[0] < 5]
    if small:
        big.append((sum(e for e, _ in small), sum(c for _, c in small)))
    freedom = len(big) - 1
    if freedom == 0:
        return 1.0
    chi2 = sum((c - e) ** 2 / e for e, c in big)
    scale = 2 / (9 * freedom)
    return 1 - NormalDist().cdf(((chi2 / freedom) ** (1 / 3) - (1 - scale)) / math.sqrt(scale))


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 0},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"temperature": 1.5, "top_k": 3, "top_p": 0.8},
]


def draw(model: Model, settings: dict[str, Any], *, n: int = 2500, length: int = 3) -> Counter[tuple[int, ...]]:
    drawn = sample(
        model, config=config(n=n, batch=n, max_symbols=length, seed=11, **settings), start=END, end=END, alphabet=4
    )
    return Counter((*one.symbols.tolist(), END) if one.ended else tuple(one.symbols.tolist()) for one in drawn)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        *((lambda: Bigram(4, seed=3), settings) for settings in SETTINGS),
        *((gpt, settings) for settings in SETTINGS[:3] + SETTINGS[-1:]),
        *((rnn, settings) for settings in (SETTINGS[0], SETTINGS[-1])),
        *((lambda: Fading(4, seed=4, bos=END), settings) for settings in (SETTINGS[0], SETTINGS[-1])),
    ],
)
def test_frequencies_are_probabilities(make: Any, settings: dict[str, Any]) -> None:
    model = make()
    expected = outcomes(model, settings, length=3)
    assert math.fsum(expected.values()) == pytest.approx(1)
    assert p_value(draw(model, settings), expected) > 1e-4


def test_the_chi_square_notices_a_wrong_sampler() -> None:
    model = gpt()
    expected = outcomes(model, {}, length=3)
    for wrong in ({"temperature": 0.8}, {"temperature": 1.25}, {"top_k": 3}, {"top_p": 0.95}):
        assert p_value(draw(model, wrong, n=4000), expected) < 1e-4
    assert p_value(draw(model, {}), outcomes(model, {"temperature": 1.25}, length=3)) < 1e-4


def test_bending_a_known_distribution() -> None:
    logp_BV = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.4, 0.05]], dtype=torch.float64))
    cases: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [0.1, 0.4, 0.05, 0.4, 0.05]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),  # equally likely: the smaller number
        ({"top_k": 3}, [1 / 9, 4 / 9, 0, 4 / 9, 0]),
        ({"top_k": 4}, [0.1 / 0.95, 0.4 / 0.95, 0.05 / 0.95, 0.4 / 0.95, 0]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 0.5, 0, 0.5, 0]),
        ({"top_k": 2, "top_p": 0.49}, [0, 1, 0, 0, 0]),  # after top-k the likeliest has a half
        ({"temperature": 0.5, "top_k": 3}, [1 / 33, 16 / 33, 0, 16 / 33, 0]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-6}, [0, 0.5, 0, 0.5, 0]),
        ({"temperature": 1e9}, [0.2] * 5),
    ]
    for settings, want in cases:
        np.testing.assert_allclose(bend(logp_BV, config(**settings)).exp().numpy()[0], want, atol=1e-6)


def test_a_quantile_is_never_an_impossible_symbol() -> None:
    logp_BV = torch.log(torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]], dtype=torch.float64)).expand(5, -1)
    noise_B = np.array([0.0, 0.2999, 0.3001, 0.5, 1 - 2.0**-53])
    assert quantile(logp_BV, noise_B).tolist() == [1, 1, 3, 3, 3]
    tiny_BV = torch.full((1, 3), -1000.0).scatter_(1, torch.tensor([[1]]), 0.0)
    assert quantile(tiny_BV, np.array([0.0])).tolist() == [1]


# -- what a seed promises --------------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    model = gpt(alphabet=30, context=6)
    prompt = np.array([1, 2])

    def symbols(**settings: Any) -> list[list[int]]:
        torch.manual_seed(settings.get("batch", 0))  # torch's own generator has no say
        drawn = sample(model, config=config(max_symbols=12, **settings), start=END, end=END, prompt_N=prompt)
        assert [one.index for one in drawn] == list(range(settings["n"]))
        return [one.symbols.tolist() for one in drawn]

    twelve = symbols(n=12, seed=5)
    assert len({tuple(one) for one in twelve}) == 12
    for n, batch in ((1, 1), (5, 2), (12, 5), (12, 32)):
        assert symbols(n=n, seed=5, batch=batch) == twelve[:n]
    assert all(a != b for a, b in zip(symbols(n=12, seed=6), twelve, strict=True))
    assert symbols(n=4, seed=5, temperature=0.8) != twelve[:4]


def test_noise_by_its_place() -> None:
    """numpy's own uniform numbers of a Philox stream, wherever one starts to read it."""
    generator = np.random.Generator(np.random.Philox(key=np.array([9, 4], dtype=np.uint64)))
    want = generator.random(3000)
    np.testing.assert_array_equal(noise(9, sample=4, start=0, count=3000), want)
    for start in (4, 1024, 2048):
        np.testing.assert_array_equal(noise(9, sample=4, start=start, count=500), want[start : start + 500])
    others = [noise(seed, sample=i, start=0, count=1000) for seed in (9, 10) for i in range(3)]
    correlation = np.corrcoef(others) - np.eye(6)
    assert np.abs(correlation).max() < 0.15
    assert want.min() >= 0
    assert want.max() < 1
    assert np.abs(np.histogram(want, bins=10, range=(0, 1))[0] - 300).max() < 75


def test_samples_longer_than_a_block_of_noise() -> None:
    """Over 1,024 symbols, symbol by symbol as the noise says."""
    model = Bigram(4, seed=0)
    with torch.no_grad():
        model.logp_VV[:, END] = -30.0
        model.logp_VV.copy_(torch.log_softmax(model.logp_VV, dim=-1))
    one = sample(model, config=config(max_symbols=2500, seed=1), start=END, end=END)[0]
    assert len(one.symbols) == 2500
    last = END
    p_VV = model.logp_VV.detach().double().exp()
    for symbol, u in zip(one.symbols.tolist(), noise(1, sample=0, start=0, count=2500), strict=True):
        reached = p_VV[last].cumsum(0)
        assert (reached[symbol - 1] if symbol else 0) <= u < reached[symbol]
        last = symbol


# -- log-probabilities, prompts, ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 3}], ids=str)
@pytest.mark.parametrize("make", [lambda: gpt(context=40), rnn])
def test_log_prob_is_that_of_forward(make: Any, settings: dict[str, Any]) -> None:
    """Under the model as it is, whatever bent the draw; the end symbol counts, the prompt does not."""
    model = make()
    prompt = np.array([0, 2, 2, 1])
    drawn = sample(
        model, config=config(n=24, max_symbols=4, seed=2, **settings), start=END, end=END, prompt_N=prompt, alphabet=4
    )
    assert {one.ended for one in drawn} == {True, False}
    for one in drawn:
        text = [*prompt.tolist(), *one.symbols.tolist(), *([END] if one.ended else [])]
        with torch.no_grad():
            logp_BT = model(torch.tensor([text]), cond=Cond(torch.tensor([END])))
        assert one.log_prob == pytest.approx(logp_BT[0, 4:].double().sum().item(), abs=1e-4)
        assert one.scored == len(text) - 4


@pytest.mark.parametrize("prompt", [0, 3, 5, 6, 7, 50])
@pytest.mark.parametrize("stride", [None, 1, 6])
def test_beyond_the_context(prompt: int, stride: int | None) -> None:
    """Prompts and samples of any length; each symbol's probability is that of a stream opened anew as the plan says."""
    model = gpt(context=6)
    prompt_N = np.random.default_rng(prompt).integers(0, 3, prompt)
    drawn = sample(
        model, config=config(n=3, max_symbols=25, stride=stride, seed=4), start=END, end=None, prompt_N=prompt_N
    )
    x_BT = torch.tensor([[*prompt_N.tolist(), *one.symbols.tolist()] for one in drawn])
    want = log_probs(model, x_BT, start_B=torch.full((3,), END), plan=Plan(6, 3 if stride is None else stride))
    for b, one in enumerate(drawn):
        assert len(one.symbols) == 25
        assert one.log_prob == pytest.approx(want[b, prompt:].double().sum().item(), abs=1e-4)


def test_the_end_symbol_ends() -> None:
    model = Bigram(4, seed=5)
    heard: dict[int, list[int]] = {i: [] for i in range(40)}
    drawn = sample(
        model,
        config=config(n=40, max_symbols=6, batch=16),
        start=END,
        end=END,
        on_symbols=lambda i, symbols: heard[i].extend(symbols),
    )
    assert {one.ended for one in drawn} == {True, False}
    for one in drawn:
        assert END not in one.symbols
        assert len(one.symbols) == 6 or one.ended
        assert heard[one.index] == one.symbols.tolist()
    endless = sample(model, config=config(n=40, max_symbols=6), start=END, end=None)
    assert any(END in one.symbols for one in endless)
    assert all(len(one.symbols) == 6 and not one.ended for one in endless)


def test_greedy_is_the_likeliest_chain() -> None:
    model = Bigram(9, seed=6)
    one, two = sample(model, config=config(n=2, temperature=0, max_symbols=10), start=END, end=None)
    want, last = [], END
    for _ in range(10):
        last = int(model.logp_VV[last].argmax())
        want.append(last)
    assert one.symbols.tolist() == two.symbols.tolist() == want


def test_the_model_comes_back_as_it_was() -> None:
    model = gpt()
    model.train()
    sample(model, config=config(), start=END, end=END)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


# -- text ------------------------------------------------------------------------------------------------------------


def test_text_comes_character_by_character() -> None:
    text = "aé€𝄞z"
    stream = TextStream(Bytes().decode)
    out = [stream.push([byte]) for byte in text.encode()]
    assert out == ["a", "", "é", "", "", "€", "", "", "", "𝄞", "z"]
    assert stream.finish() == ""
    cut = TextStream(Bytes().decode)
    assert cut.push(list("é".encode()[:1])) == ""
    assert cut.finish() == "\ufffd"


def test_streamed_text_is_the_whole_text() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        raw = b"".join(rng.choice([b"a", b"\xe2", b"\x82\xac", b"\xff", "é".encode(), b"\xf0\x9d"], 12).tolist())
        stream = TextStream(Bytes().decode)
        out = "".join([stream.push([byte]) for byte in raw] + [stream.finish()])
        assert out == raw.decode("utf-8", "replace")


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, r"top_p = 0\.0"),
        ({"top_p": 1.01}, "top_p = 1.01"),
        ({"n": 0}, "n = 0"),
        ({"max_symbols": 0}, "max_symbols = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"temprature": 1}, "did you mean 'temperature'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


def test_prompts_that_are_refused() -> None:
    model = gpt()
    for prompt, words in (
        (np.array([1, 4]), "symbol 4, the alphabet is 0 to 3"),
        (np.array([-1]), "symbol -1"),
        (np.array([1, END, 2]), r"the end symbol \(3\)"),
        (np.array([[1]]), "2 dimensions"),
        (np.array([0.5]), "float64"),
    ):
        with pytest.raises(InputError, match=words):
            sample(model, config=config(), start=END, end=END, prompt_N=prompt, alphabet=4)


def test_strides_and_contexts_that_are_refused() -> None:
    with pytest.raises(ConfigError, match="stride 7 does not fit the context 6"):
        sample(gpt(context=6), config=config(stride=7), start=END, end=END)
    with pytest.raises(ConfigError, match="a context of 7 symbols is more than the 6"):
        sample(gpt(context=6), config=config(), start=END, end=END, context=7)
    with pytest.raises(ConfigError, match="RNN carries its state on"):
        sample(rnn(), config=config(stride=2), start=END, end=END)
    assert sample(rnn(), config=config(stride=2), start=END, end=END, context=4)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0}], ids=str
)
def test_a_diverged_model_is_an_error(settings: dict[str, Any]) -> None:
    model = Bigram(4, seed=7)
    with torch.no_grad():
        model.logp_VV.fill_(torch.nan)
    with pytest.raises(DivergenceError, match="not finite"):
        sample(model, config=config(**settings), start=END, end=END)
