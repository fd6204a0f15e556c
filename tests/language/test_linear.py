import pytest
import torch

from polopt.language.linear import gated_linears, lean_linears, linear

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


def gate(x, gate, up, down):
    plain = torch.nn.functional.linear
    return plain(torch.nn.functional.silu(plain(x, gate)) * plain(x, up), down)


def weights(*shapes, **options):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True, **options) for shape in shapes]


GATED = (2, 3, 4), (6, 4), (6, 4), (5, 6)


def test_without_autocast_outputs_are_the_plain_ones():
    x, weight, bias = weights((2, 3, 4), (5, 4), (5,))
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    inputs = weights(*GATED)
    assert torch.equal(gated_linears(*inputs), gate(*inputs))


def test_gated_derivatives_of_both_orders_are_those_of_finite_differences():
    inputs = weights(*GATED, dtype=torch.float64)
    assert torch.autograd.gradcheck(gated_linears, inputs)
    assert torch.autograd.gradgradcheck(gated_linears, inputs)


def test_gated_layers_give_what_is_frozen_no_gradient():
    x, *frozen = weights(*GATED)
    for weight in frozen:
        weight.requires_grad_(False)
    gated_linears(x, *frozen).sum().backward()
    assert x.grad is not None and all(weight.grad is None for weight in frozen)


def test_gated_layers_keep_their_input_and_weights_alone():
    inputs, saved = weights(*GATED), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t):
        gated_linears(*inputs)
    assert saved == [t.shape for t in inputs]


@pytest.mark.parametrize("gated", [False, True])
def test_second_derivatives_are_those_of_autograd(gated):
    plain, lean, shapes = (
        (gate, gated_linears, GATED) if gated else (torch.nn.functional.linear, linear, ((3, 4), (5, 4)))
    )

    def curvature(fused):
        inputs = weights(*shapes)
        with BFLOAT16:
            out = (
                (lean if fused else plain)(*inputs, *([None] if fused and not gated else []))
                .float()
                .square()
                .sum()
            )
        first = torch.autograd.grad(out, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for found, expected in zip(curvature(True), curvature(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
