"""The entropy coder: exact both ways, within a word and a bit of the tables' own length, at any alphabet."""

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.errors import InputError
from lmtrain.inference.rans import TOTAL, Decoder, Encoder, frequencies, intervals, symbols_at


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)


def coded(tables, x_TB):
    """(words, states, bits by the tables)."""
    encoder, out, bits = Encoder(x_TB.shape[1]), [], 0.0
    for f_BV, x_B in reversed(list(zip(tables, x_TB, strict=True))):
        frequency_B, before_B = intervals(f_BV, x_B)
        bits -= np.log2(frequency_B.astype(np.float64) / TOTAL).sum()
        out.append(encoder.push(frequency_B, before_B))
    return np.concatenate(out[::-1]), encoder.state_B, bits


def decoded(tables, words, state_B):
    decoder, at, out = Decoder(state_B), 0, []
    for f_BV in tables:
        x_B, frequency_B, before_B = symbols_at(f_BV, decoder.peek())
        at = decoder.pop(frequency_B, before_B, words, at)
        out.append(x_B)
    assert at == len(words)
    assert (decoder.state_B == 1 << 47).all()  # where every lane began
    return np.stack(out)


@pytest.mark.parametrize(
    ("V", "T", "B", "scale"), [(1, 5, 1, 1), (2, 3000, 3, 0.1), (2, 3000, 2, 14), (256, 400, 7, 3), (32_000, 40, 3, 4)]
)
def test_what_went_in_comes_out_and_no_longer_than_the_tables_say(V, T, B, scale):
    draw = np.random.default_rng(V + B)
    logp_TBV = log_softmax(draw.normal(size=(T, B, V)) * scale)
    gumbel = draw.gumbel(size=logp_TBV.shape)
    x_TB = (logp_TBV + gumbel).argmax(-1)
    x_TB[T // 2] = logp_TBV[T // 2].argmin(-1)  # the least likely ones too: two words at once
    tables = [frequencies(row) for row in logp_TBV]
    words, state_B, bits = coded(tables, x_TB)
    assert np.array_equal(decoded(tables, words, state_B), x_TB)
    assert bits - 1e-6 <= 16 * len(words) + 64 * B <= bits + 65 * B + 2e-5 * T * B


@pytest.mark.parametrize(("V", "T", "scale"), [(2, 5000, 0.1), (2, 5000, 6), (256, 2000, 3), (20_000, 60, 4)])
def test_constriction_codes_the_same_symbols_into_as_many_bits(V, T, scale):
    """Another's numeral system with tables of its own (2^24, words of 32 bits)."""
    draw = np.random.default_rng(V)
    logp_TV = log_softmax(draw.normal(size=(T, V)) * scale)
    x_T = (logp_TV + draw.gumbel(size=logp_TV.shape)).argmax(-1)
    words, _, _ = coded([frequencies(row[None]) for row in logp_TV], x_T[:, None])
    models = [constriction.stream.model.Categorical(np.exp(row), perfect=False) for row in logp_TV]
    other = constriction.stream.stack.AnsCoder()
    for x, model in zip(x_T[::-1].tolist(), models[::-1], strict=True):
        other.encode_reverse(np.array([x], np.int32), model)
    theirs, ours = other.num_bits(), 16 * len(words) + 64
    assert [other.decode(model) for model in models] == x_T.tolist()
    assert ours <= theirs + 64, "the larger tables are no longer, but for the state"
    assert ours >= theirs * (1 - 2e-3) - 64, "nor can they be much shorter"


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 30.0]))
def test_any_symbols_under_any_tables(V, B, seed, scale):
    draw = np.random.default_rng(seed)
    tables = [frequencies(log_softmax(draw.normal(size=(B, V)) * scale)) for _ in range(30)]
    x_TB = draw.integers(V, size=(30, B))
    words, state_B, _ = coded(tables, x_TB)
    assert np.array_equal(decoded(tables, words, state_B), x_TB)


@pytest.mark.parametrize("V", [2, 256, 50_000])
def test_tables_cost_next_to_nothing(V):
    draw = np.random.default_rng(V)
    logp_BV = log_softmax(draw.normal(size=(4, V)) * 3)
    p_BV = np.exp(logp_BV.astype(np.float64))
    p_BV /= p_BV.sum(1, keepdims=True)
    f_BV = frequencies(logp_BV)
    assert (f_BV.sum(1) == TOTAL).all()
    assert f_BV.min() >= 1
    extra = (p_BV * (np.log2(p_BV) - np.log2(f_BV.astype(np.float64) / TOTAL))).sum(1)
    entropy = -(p_BV * np.log2(p_BV)).sum(1)
    assert (extra / entropy < 1e-4).all()
    certain = frequencies(np.array([[0.0] + [-np.inf] * (V - 1)], np.float32))
    assert -np.log2(float(certain[0, 0]) / TOTAL) < 1e-4


def test_words_that_run_out_are_told():
    tables = [frequencies(np.log(np.full((1, 4), 0.25, np.float32)))] * 60
    words, state_B, _ = coded(tables, np.zeros((60, 1), np.int64))
    with pytest.raises(IndexError, match="ran out"):
        decoded(tables, words[:-1], state_B)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_probabilities_that_are_not_numbers_are_refused(wrong):
    with pytest.raises(InputError, match="not finite"):
        frequencies(np.array([[0.0, wrong]], np.float32))
