import pytest
import torch

from polopt.language.rms_norm import fused_norms, rms_norm

transformers = pytest.importorskip("transformers")


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: rms_norm(h, w, 1e-3), (hidden, weight))
    torch.testing.assert_close(
        rms_norm(hidden, weight, 1e-3), torch.nn.functional.rms_norm(hidden, (5,), weight, 1e-3)
    )


def test_the_result_is_what_a_linear_layer_reads_under_autocast():
    hidden, weight = torch.randn(4, 8), torch.rand(8)
    exact = rms_norm(hidden, weight, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        found = rms_norm(hidden, weight, 1e-6)
    assert torch.equal(found, exact.to(torch.bfloat16))


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, False)])
def test_norms_are_fused_inside_the_context_alone(dtype, fused):
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    norm = transformers.LlamaForCausalLM(config).to(dtype).model.norm
    hidden = torch.randn(3, 8, dtype=dtype, requires_grad=True)
    before = norm(hidden)
    with fused_norms(norm):
        inside = norm(hidden)
    assert ("RmsNorm" in type(inside.grad_fn).__name__) is fused
    assert "RmsNorm" not in type(norm(hidden).grad_fn).__name__
    torch.testing.assert_close(inside, before)


def test_norms_of_another_form_are_left_alone():
    config = transformers.Gemma2Config(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=4,
    )
    norm = transformers.Gemma2ForCausalLM(config).model.norm
    hidden = torch.randn(3, 8)
    before = norm(hidden)
    with fused_norms(norm):
        assert torch.equal(norm(hidden), before)
