import pytest
import torch

from polopt.language.linear import gated_linear, lean_linears, linear

transformers = pytest.importorskip("transformers")
BFLOAT16 = torch.autocast("cpu", torch.bfloat16)


def llama(**changes):
    config = transformers.LlamaConfig(
        vocab_size=9,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        **changes,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).model


def gradients(model, hidden):
    with BFLOAT16:
        out = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    out.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"out": out.detach()}


@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True, "attention_bias": True}, {"hidden_act": "gelu"}])
def test_outputs_and_gradients_are_those_of_autocast(changes):
    model, hidden = llama(**changes), torch.randn(2, 5, 64)
    expected = gradients(model, hidden)
    with lean_linears(model):
        found = gradients(model, hidden)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0.02 * float(tensor.abs().max()))


def test_no_copy_of_a_weight_is_kept_for_the_backward_pass():
    model, hidden = llama(), torch.randn(1, 3, 64)
    saved = []
    weights = {p.shape for p in model.parameters() if p.dim() == 2}

    def pack(tensor):
        saved.append(tensor)
        return tensor

    def copies():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), BFLOAT16:
            model(inputs_embeds=hidden, use_cache=False)
        return [t for t in saved if t.dtype == torch.bfloat16 and ({t.shape, t.shape[::-1]} & weights)]

    assert copies()
    with lean_linears(model):
        assert not copies()


def test_without_autocast_nothing_changes():
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    expected = torch.nn.functional.linear(torch.nn.functional.silu(x) * x, weight)
    assert torch.equal(gated_linear(x, x, weight), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_second_derivatives_are_those_of_autograd(gated):
    def product(x, weight, fused):
        if not gated:
            return (linear if fused else torch.nn.functional.linear)(x, weight, None)
        plain = torch.nn.functional.linear(torch.nn.functional.silu(x) * x, weight)
        return gated_linear(x, x, weight) if fused else plain

    def curvature(fused):
        torch.manual_seed(0)
        x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        with BFLOAT16:
            out = product(x, weight, fused).float().square().sum()
        first = torch.autograd.grad(out, [x, weight], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, weight])

    for found, expected in zip(curvature(True), curvature(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
