import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polopt.language.head import HeadOptions, evaluate_head


def make(states=11, width=4, vocabulary=9, decisions=20, bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = draw(states, width), draw(vocabulary, width)
    state = torch.randint(0, states, (decisions,), generator=generator).sort().values
    action = torch.randint(0, vocabulary, (decisions,), generator=generator)
    return hidden, weight, draw(vocabulary) if bias else None, state, action


def expected(hidden, weight, bias, state, action, options):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if options.softcap:
        logits = options.softcap * (logits / options.softcap).tanh()
    logprobs = (logits * options.scale).log_softmax(-1)
    return logprobs[state, action], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_autograd(chunk, softcap, bias):
    options = HeadOptions(scale=1.7, softcap=softcap, chunk=chunk, entropy=True)
    hidden, weight, offset, state, action = make(bias=bias)
    leaves = [t.requires_grad_() for t in (hidden, weight, offset) if t is not None]
    found = evaluate_head(hidden, weight, offset, state, action, options)
    logp, entropy = expected(hidden, weight, offset, state, action, options)
    torch.testing.assert_close(found.logp, logp, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-12, rtol=0)
    g, h = torch.randn(len(logp), dtype=torch.float64), torch.randn(len(entropy), dtype=torch.float64)
    one = torch.autograd.grad((found.logp * g).sum() + (found.entropy * h).sum(), leaves)
    other = torch.autograd.grad((logp * g).sum() + (entropy * h).sum(), leaves)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_gradients_are_those_of_finite_differences():
    hidden, weight, bias, state, action = make(states=5, vocabulary=6, decisions=7)
    options = HeadOptions(scale=0.8, softcap=2.0, chunk=2, entropy=True)

    def function(hidden, weight, bias):
        found = evaluate_head(hidden, weight, bias, state, action, options)
        return found.logp, found.entropy

    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("of", ["logp", "entropy"])
def test_one_output_alone_has_its_gradient(of):
    hidden, weight, bias, state, action = make()
    hidden.requires_grad_()
    options = HeadOptions(chunk=3, entropy=True)
    found = getattr(evaluate_head(hidden, weight, bias, state, action, options), of).sum()
    logp, entropy = expected(hidden, weight, bias, state, action, options)
    one = torch.autograd.grad(found, hidden)
    other = torch.autograd.grad((logp if of == "logp" else entropy).sum(), hidden)
    torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_huge_logits_stay_finite():
    hidden, weight, bias, state, action = make()
    hidden.mul_(1e4).requires_grad_()
    found = evaluate_head(hidden, weight, bias, state, action, HeadOptions(entropy=True, score_sqnorm=True))
    (found.logp.sum() + found.entropy.sum()).backward()
    assert all(t.isfinite().all() for t in (found.logp, found.entropy, found.square, hidden.grad))
    assert (found.entropy >= 0).all()


class Largest(TorchDispatchMode):
    """The most elements that any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_more_logits_are_held_than_a_chunk_of_them():
    hidden, weight, bias, state, action = make(states=60, vocabulary=50, decisions=80)
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
    with Largest() as largest:
        evaluate_head(
            hidden, weight, bias, state, action, HeadOptions(chunk=10, entropy=True)
        ).logp.sum().backward()
    assert largest.elements == 10 * 50


def test_products_are_bfloat16_under_autocast_and_the_rest_is_float32():
    hidden, weight, bias, state, action = (t.float() if t.is_floating_point() else t for t in make())
    exact = evaluate_head(hidden, weight, bias, state, action, HeadOptions())
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate_head(hidden, weight.requires_grad_(), bias, state, action, HeadOptions())
    assert found.logp.dtype == torch.float32
    torch.testing.assert_close(found.logp, exact.logp, atol=0.1, rtol=0)
    found.logp.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_no_states_give_empty_results():
    hidden, weight, bias, _, _ = make()
    hidden, none = hidden[:0].requires_grad_(), torch.zeros(0, dtype=torch.int64)
    found = evaluate_head(hidden, weight, bias, none, none, HeadOptions(entropy=True, kept=3))
    assert found.logp.shape == (0,) and found.kept_logits.shape == (0, 3)
    found.logp.sum().backward()
