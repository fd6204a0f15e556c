import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.errors import PoloptError
from polopt.language.drawing import BLOCK, CHUNK, draw_tokens, invert_cdf

SIZES = st.sampled_from([1, 2, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1000])


def random_logits(rows, size, seed, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, size, generator=generator, dtype=torch.float64)).to(dtype)


def naive_token(logp, uniform):
    """First token whose cumulative probability is above the uniform, of those with a probability."""
    cumulative = logp.exp().cumsum(-1)
    above = (cumulative > uniform * cumulative[-1]) & (logp > -math.inf)
    return int(above.nonzero()[0])


def naive_truncation(logp, top_k, top_p):
    """Log-probabilities renormalised over what top-k and then top-p keep."""
    if top_k > 0:
        logp = logp.masked_fill(logp < logp.topk(min(top_k, len(logp))).values[-1], -math.inf).log_softmax(-1)
    if top_p < 1:
        ordered = logp.sort(descending=True).values
        count = int((ordered.exp().cumsum(-1) < top_p).sum())
        logp = logp.masked_fill(logp < ordered[min(count, len(logp) - 1)], -math.inf)
    return logp.log_softmax(-1)


@settings(max_examples=60)
@given(size=SIZES, seed=st.integers(0, 10**6), temperature=st.sampled_from([0.3, 1.0, 2.0]))
def test_draws_are_the_inverse_of_the_cumulative_distribution(size, seed, temperature):
    logits = random_logits(6, size, seed)
    uniforms = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draw = draw_tokens(logits, uniforms, temperature=temperature)
    logp = (logits / temperature).log_softmax(-1)
    assert draw.tokens.tolist() == [naive_token(row, float(u)) for row, u in zip(logp, uniforms, strict=True)]
    assert torch.allclose(draw.logp, logp.gather(1, draw.tokens[:, None])[:, 0], rtol=0, atol=1e-12)
    assert torch.allclose(draw.entropy, -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-12)
    assert draw.sampler_logp is draw.logp


@settings(max_examples=60)
@given(
    size=SIZES,
    seed=st.integers(0, 10**6),
    top_k=st.sampled_from([0, 1, 7, 200]),
    top_p=st.sampled_from([1e-3, 0.5, 0.9, 0.999, 1.0]),
    scale=st.sampled_from([0.1, 3.0]),
)
def test_truncated_draws_follow_the_renormalised_rest(size, seed, top_k, top_p, scale):
    logits = random_logits(6, size, seed, scale)
    uniforms = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draw = draw_tokens(logits, uniforms, temperature=0.7, top_k=top_k, top_p=top_p)
    full = (logits / 0.7).log_softmax(-1)
    kept = torch.stack([naive_truncation(row, top_k, top_p) for row in full])
    assert draw.tokens.tolist() == [naive_token(row, float(u)) for row, u in zip(kept, uniforms, strict=True)]
    at = draw.tokens[:, None]
    assert torch.allclose(draw.logp, full.gather(1, at)[:, 0], rtol=0, atol=1e-12)
    assert torch.allclose(draw.sampler_logp, kept.gather(1, at)[:, 0], rtol=0, atol=1e-12)
    assert torch.allclose(draw.entropy, -(full.exp() * full).sum(-1), rtol=0, atol=1e-12)


def test_a_nucleus_wider_than_the_first_look_is_found():
    logits = random_logits(3, 20_000, 0, scale=0.5)
    draw = draw_tokens(logits, torch.tensor([0.1, 0.5, 0.9]), top_p=0.95)
    kept = torch.stack([naive_truncation(row, 0, 0.95) for row in logits.log_softmax(-1)])
    assert (kept > -math.inf).sum() > 3 * 10_000
    assert torch.allclose(draw.sampler_logp, kept.gather(1, draw.tokens[:, None])[:, 0], rtol=0, atol=1e-10)


def test_tokens_tied_with_the_last_one_kept_are_kept():
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0]])
    drawn = [draw_tokens(logits, torch.tensor([u]), top_k=2).tokens.item() for u in (0.0, 0.5, 0.99)]
    assert drawn == [1, 2, 3]
    drawn = [draw_tokens(logits, torch.tensor([u]), top_p=0.2).tokens.item() for u in (0.0, 0.5, 0.99)]
    assert drawn == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_match_probabilities(dtype):
    draws = 40_000
    logits = random_logits(1, 37, 1, scale=1.5, dtype=dtype)
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = draw_tokens(logits.expand(draws, -1), uniforms).tokens
    expected = draws * logits[0].double().softmax(-1)
    chi2 = ((torch.bincount(tokens, minlength=37) - expected) ** 2 / expected).sum()
    assert chi2 < 36 + 6 * math.sqrt(2 * 36)  # mean 36, standard deviation sqrt(72)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logits_are_taken_as_the_numbers_they_are(dtype):
    logits = random_logits(40, 5000, 3, dtype=dtype)
    draw = draw_tokens(logits, torch.rand(40, dtype=torch.float64), temperature=0.8)
    exact = (logits.double() / 0.8).log_softmax(-1)
    assert draw.logp.dtype == torch.float32
    assert torch.allclose(draw.logp.double(), exact.gather(1, draw.tokens[:, None])[:, 0], rtol=0, atol=1e-5)
    assert torch.allclose(draw.entropy.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_of_probability_zero_are_never_drawn(uniform, dtype):
    logits = random_logits(4, 3 * BLOCK + 5, 4, dtype=dtype)
    possible = torch.zeros(logits.shape[1], dtype=torch.bool)
    possible[[5, BLOCK, BLOCK + 7, 2 * BLOCK + 3]] = True
    logits = logits.masked_fill(~possible, -math.inf)
    draw = draw_tokens(logits, torch.full((4,), uniform, dtype=torch.float64))
    assert possible[draw.tokens].all()
    assert draw.logp.isfinite().all() and draw.entropy.isfinite().all()
    exact = logits[:, possible].double().log_softmax(-1)
    assert torch.allclose(draw.entropy.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-5)
    if uniform in (0.0, 1.0):
        edge = possible.nonzero()[0 if uniform == 0 else -1].item()
        assert draw.tokens.tolist() == [edge] * 4


def test_extreme_logits_give_a_certain_token():
    logits = torch.tensor([[-1e30, 0.0, -1e4], [1e30, -1e30, 0.0]])
    draw = draw_tokens(logits, torch.tensor([0.999, 0.5]), temperature=0.01)
    assert draw.tokens.tolist() == [1, 0]
    assert draw.logp.tolist() == [0.0, 0.0] and draw.entropy.tolist() == [0.0, 0.0]


@settings(max_examples=60)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-38, 1e-3, 1.0, 1e6]), min_size=1, max_size=3 * BLOCK),
    uniform=st.floats(0, 1),
)
def test_an_index_with_weight_is_found_whatever_the_rounding(weights, uniform):
    row = torch.tensor([weights], dtype=torch.float32)
    if row.sum() == 0:
        return
    index = invert_cdf(row, torch.tensor([uniform], dtype=torch.float64)).item()
    assert row[0, index] > 0
    before, total = row[0, :index].double().sum(), row.double().sum()
    slack = 1e-6 * total
    assert before - slack <= uniform * total <= before + row[0, index] + slack


def test_temperature_zero_takes_the_first_of_the_likeliest():
    logits = random_logits(50, 1000, 5).round()
    draw = draw_tokens(logits, torch.rand(50), temperature=0.0, top_k=3, top_p=0.5)
    first = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert draw.tokens.tolist() == first
    assert (draw.logp == 0).all() and (draw.entropy == 0).all() and (draw.sampler_logp == 0).all()


def test_a_row_draws_the_same_in_any_company():
    logits = random_logits(2 * CHUNK // 5000 + 3, 5000, 6, dtype=torch.float32)
    uniforms = torch.rand(len(logits), generator=torch.Generator().manual_seed(7))
    together = draw_tokens(logits, uniforms, top_p=0.9)
    alone = [
        draw_tokens(logits[i : i + 1], uniforms[i : i + 1], top_p=0.9) for i in range(0, len(logits), 17)
    ]
    assert together.tokens[::17].tolist() == [draw.tokens.item() for draw in alone]
    assert torch.allclose(together.logp[::17], torch.cat([draw.logp for draw in alone]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad, temperature):
    logits = torch.zeros(2, 10)
    logits[1, 3] = bad
    with pytest.raises(PoloptError, match="diverged"):
        draw_tokens(logits, torch.rand(2), temperature=temperature)


def test_logits_are_left_as_they_were():
    logits = random_logits(3, 200, 8)
    copy = logits.clone()
    draw_tokens(logits, torch.rand(3), temperature=0.5, top_k=4, top_p=0.6)
    assert torch.equal(logits, copy)
