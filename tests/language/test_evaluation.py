import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from polopt.batch import Batch
from polopt.errors import ConfigError
from polopt.language.evaluation import check_model, decoder_and_head, evaluate_completions, micro_batches
from polopt.language.model import Lora, load_language_model
from polopt.language.packing import pack

transformers = pytest.importorskip("transformers")
VOCAB = 47
PROMPTS = (3, 5, 1, 4)
GROUPS = (0, 3, 0, 1, 2, 0, 1, 2, 0)
"""Not contiguous; one group of one row."""
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=1),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=64, initializer_range=0.3, eos_token_id=2,
        bos_token_id=1,
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=3),
    "phi": lambda: transformers.PhiConfig(**SIZES | {"num_attention_heads": 3}),  # has a bias in its head
    "olmo2": lambda: transformers.Olmo2Config(**SIZES, num_key_value_heads=2),  # norms after the gated layers
    "granite": lambda: transformers.GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=3.0),
}  # fmt: skip


def build(name="llama", dtype=torch.float64):
    torch.manual_seed(0)
    return with_exact_norms(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype).eval())


def with_exact_norms(model):
    """The model with norms, which transformers computes in float32, as exact as the rest."""
    for parent in list(model.modules()):
        for child, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=norm.weight.dtype)
                torch.nn.init.uniform_(exact.weight, 0.5, 1.5)
                setattr(parent, child, exact)
    return model


def make_batch(lengths=(6, 0, 1, 4, 2, 6, 3, 0, 5), groups=GROUPS, seed=0, width=6):
    generator = torch.Generator().manual_seed(seed)
    rows, group = len(groups), torch.tensor(groups)
    prompts = torch.randint(0, VOCAB, (len(PROMPTS), max(PROMPTS)), generator=generator)
    tokens = torch.randint(0, VOCAB, (rows, width), generator=generator)
    return Batch(
        mask=torch.arange(width) < torch.tensor(lengths)[:, None],
        old_logp=torch.zeros(rows, width),
        rewards=torch.zeros(rows, 1),
        group=group,
        prompt_id=group,
        payload=TensorDict(
            {"prompt": prompts[group], "prompt_length": torch.tensor(PROMPTS)[group], "tokens": tokens},
            [rows],
        ),
        batch_size=[rows],
    )


def whole_logits(model, batch):
    """Logits [T, V] at each row's completion, from a forward pass over prompt and completion alone."""
    for row in range(len(batch)):
        length = int(batch.payload["prompt_length"][row])
        end = int((batch.mask[row] * torch.arange(1, batch.mask.shape[1] + 1)).max())
        text = torch.cat([batch.payload["prompt"][row, :length], batch.payload["tokens"][row, :end]])
        logits = model(input_ids=text[None], use_cache=False).logits[0, length - 1 : length - 1 + end]
        yield torch.cat([logits, logits.new_zeros(batch.mask.shape[1] - end, logits.shape[-1])])


def naive(model, batch, temperature=1.0):
    """Log-probability and entropy [N, T], 0 outside the mask."""
    logprobs = torch.stack([(logits / temperature).log_softmax(-1) for logits in whole_logits(model, batch)])
    logp = logprobs.gather(-1, batch.payload["tokens"][..., None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logp.where(batch.mask, 0.0), entropy.where(batch.mask, 0.0)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def cotangents(batch, count=2):
    return torch.randn(
        count, *batch.mask.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_evaluation_and_all_gradients_are_those_of_a_forward_pass_over_each_row(name, temperature):
    model, batch = build(name), make_batch()
    weights = cotangents(batch)
    logp, entropy = naive(model, batch, temperature)
    expected = gradients(model, (logp * weights[0] + entropy * weights[1]).sum())
    evaluation = evaluate_completions(model, batch, frozenset({"entropy"}), temperature=temperature)
    assert evaluation.entropy is not None
    torch.testing.assert_close(evaluation.logp, logp, atol=1e-11, rtol=0)
    torch.testing.assert_close(evaluation.entropy, entropy, atol=1e-11, rtol=0)
    found = gradients(model, (evaluation.logp * weights[0] + evaluation.entropy * weights[1]).sum())
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("softcap", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_gemma_with_bounded_logits_and_sliding_windows(softcap):
    torch.manual_seed(0)
    bounds = {"final_logit_softcapping": None, "attn_logit_softcapping": None, softcap: 1.5}
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4,
        attn_implementation="eager", **bounds,
    )  # fmt: skip
    model, batch = transformers.Gemma2ForCausalLM(config).double().eval(), make_batch()
    weights = cotangents(batch)
    logp, entropy = naive(model, batch)
    expected = gradients(model, (logp * weights[0] + entropy * weights[1]).sum())
    evaluation = evaluate_completions(model, batch, frozenset({"entropy"}))
    found = gradients(model, (evaluation.logp * weights[0] + evaluation.entropy * weights[1]).sum())
    torch.testing.assert_close(evaluation.logp, logp, atol=1e-5, rtol=0)  # eager attention is float32
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, atol=1e-5, rtol=1e-4)


def test_tokens_that_the_policy_saw_but_did_not_choose_are_context():
    model, batch = build(), make_batch()
    batch.mask[0, 2:4] = False
    batch.mask[3, 0] = False
    batch.mask[8, 1] = False
    logp, _ = naive(model, batch)
    found = evaluate_completions(model, batch, frozenset()).logp
    torch.testing.assert_close(found, logp, atol=1e-11, rtol=0)
    assert (found[~batch.mask] == 0).all()


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_the_chunks_of_the_head_change_nothing(chunk):
    model, batch = build("phi"), make_batch()
    weights = cotangents(batch)

    def run(tokens):
        found = evaluate_completions(model, batch, frozenset({"entropy"}), head_chunk_tokens=tokens)
        return found, gradients(model, (found.logp * weights[0] + found.entropy * weights[1]).sum())

    (one, gradient), (other, expected) = run(chunk), run(20)
    torch.testing.assert_close(one.logp, other.logp, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.entropy, other.entropy, atol=1e-12, rtol=0)
    assert_same_gradients(gradient, expected)


def test_a_second_backward_pass_gives_the_same_gradients():
    model, batch = build(), make_batch()
    loss = (evaluate_completions(model, batch, frozenset()).logp * cotangents(batch)[0]).sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=0)


def test_each_prompt_is_computed_once_and_no_padding():
    model, batch = build(), make_batch()
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].numel())
    )
    evaluate_completions(model, batch, frozenset())
    completions = batch.lengths[batch.lengths > 0] - 1
    prompts = [PROMPTS[group] for group in set(batch.group[batch.lengths > 0].tolist())]
    assert seen == [int(completions.sum()) + sum(prompts)]


def test_garbage_outside_mask_and_prompts_is_never_read():
    model, batch = build(), make_batch()
    clean = evaluate_completions(model, batch, frozenset({"entropy"}))
    batch.payload["tokens"][~batch.mask] = -(10**9)
    batch.payload["prompt"][torch.arange(5) >= batch.payload["prompt_length"][:, None]] = 10**9
    dirty = evaluate_completions(model, batch, frozenset({"entropy"}))
    assert torch.equal(clean.logp, dirty.logp)
    assert torch.equal(clean.entropy, dirty.entropy)


@pytest.mark.parametrize("rows", [[1], [1, 7], [4], [2, 8], [8, 0, 5, 2]])
def test_any_rows_alone_are_evaluated_as_among_all(rows):
    model, batch = build(), make_batch()
    expected = evaluate_completions(model, batch, frozenset()).logp[rows]
    found = evaluate_completions(model, batch[rows], frozenset()).logp
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_rows_without_decisions_give_zeros_and_zero_gradients():
    model, batch = build(), make_batch(lengths=[0] * 9)
    evaluation = evaluate_completions(model, batch, frozenset({"entropy"}))
    assert torch.equal(evaluation.logp, torch.zeros(9, 6, dtype=torch.float64))
    found = gradients(model, evaluation.logp.sum() + evaluation.entropy.sum())
    assert all((gradient == 0).all() for gradient in found.values())
    assert evaluate_completions(model, batch[torch.zeros(0, dtype=torch.int64)], frozenset()).logp.shape == (
        0,
        6,
    )


def test_values_and_their_gradients():
    model, batch = build(), make_batch()
    critic = torch.nn.Sequential(torch.nn.Linear(24, 1, dtype=torch.float64), torch.nn.Flatten(0))
    both = torch.nn.ModuleList([model, critic])
    weights = cotangents(batch)[0]
    expected = torch.zeros_like(weights)
    rows = []
    for row in range(len(batch)):
        length, end = int(batch.payload["prompt_length"][row]), int(batch.lengths[row])
        text = torch.cat([batch.payload["prompt"][row, :length], batch.payload["tokens"][row, :end]])
        hidden = model.model(input_ids=text[None]).last_hidden_state[0, length - 1 : length - 1 + end]
        rows.append(torch.cat([critic(hidden), hidden.new_zeros(6 - end)]))
    expected = torch.stack(rows)
    found = evaluate_completions(model, batch, frozenset({"value"}), value_head=critic).value
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    assert_same_gradients(
        gradients(both, (found * weights).sum()), gradients(both, (expected * weights).sum())
    )


def test_squared_norm_of_the_score_is_that_of_the_gradient_of_logp_by_the_policys_logits():
    model, batch = build(), make_batch()
    found = evaluate_completions(model, batch, frozenset({"score_sqnorm"}), temperature=0.6).score_sqnorm
    for row, logits in enumerate(whole_logits(model, batch)):
        for column in batch.mask[row].nonzero()[:, 0].tolist():
            leaf = (logits[column] / 0.6).detach().requires_grad_()
            leaf.log_softmax(-1)[batch.payload["tokens"][row, column]].backward()
            assert float(found[row, column]) == pytest.approx(float(leaf.grad.square().sum()), abs=1e-12)
    assert not found.requires_grad


def test_tempered_logp_is_at_its_own_temperature():
    model, batch = build(), make_batch()
    found = evaluate_completions(model, batch, frozenset({"tempered_logp"}), temperature=0.6, tempered=2.0)
    torch.testing.assert_close(found.tempered_logp, naive(model, batch, 2.0)[0].detach(), atol=1e-11, rtol=0)
    assert not found.tempered_logp.requires_grad


def test_kept_logits_are_the_largest_and_products_of_features_and_rows_of_the_head():
    model, batch = build(), make_batch()
    requires = frozenset({"features", "kept_logits", "kept_rows"})
    found = evaluate_completions(model, batch, requires, temperature=0.6, kept=5)
    for row, logits in enumerate(whole_logits(model, batch)):
        expected = (logits[batch.mask[row]] / 0.6).topk(5)
        torch.testing.assert_close(
            found.kept_logits[row][batch.mask[row]], expected.values, atol=1e-11, rtol=0
        )
        assert torch.equal(found.kept_rows[row][batch.mask[row]], expected.indices)
    products = (model.lm_head.weight[found.kept_rows] @ found.features[..., None])[..., 0]
    torch.testing.assert_close(products[batch.mask], found.kept_logits[batch.mask], atol=1e-11, rtol=0)
    assert not any(t.requires_grad for t in (found.features, found.kept_logits))


@pytest.mark.parametrize("requires", ["tempered_logp", "kept_rows", "value"])
def test_a_field_whose_option_is_missing_is_named(requires):
    with pytest.raises(ConfigError, match=requires.split("_")[0]):
        evaluate_completions(build(), make_batch(), frozenset({requires}))


def test_an_empty_prompt_is_refused():
    batch = make_batch()
    batch.payload["prompt_length"][:] = 0
    with pytest.raises(ValueError, match="prompt_length"):
        evaluate_completions(build(), batch, frozenset())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, batch = build(dtype=torch.float32), make_batch()
    before = model.config._attn_implementation, [dict(module.__dict__) for module in model.modules()]
    if fails:
        batch.payload["tokens"][0, 0] = 10**9
    with pytest.raises(IndexError) if fails else nullcontext():
        evaluate_completions(model, batch, frozenset())
    after = [dict(module.__dict__) for module in model.modules()]
    assert model.config._attn_implementation == before[0]
    assert [list(a) for a in after] == [list(b) for b in before[1]]


def test_autocast_is_near_float32_and_reductions_stay_float32():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        CONFIGS["llama"]().from_dict(SIZES | {"initializer_range": 0.05})
    ).eval()
    batch = make_batch()
    exact = evaluate_completions(model, batch, frozenset({"entropy"}))
    expected = gradients(model, exact.logp.sum())
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate_completions(model, batch, frozenset({"entropy"}))
    assert found.logp.dtype == found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.logp, exact.logp, atol=0.02, rtol=0)
    near = gradients(model, found.logp.sum())
    for name, gradient in expected.items():
        assert near[name].dtype == torch.float32
        assert float((near[name] - gradient).norm()) <= 0.03 * float(gradient.norm()) + 1e-6, name


def test_fused_norms_are_those_of_the_model():
    torch.manual_seed(0)
    model, batch = transformers.LlamaForCausalLM(CONFIGS["llama"]()).eval(), make_batch()
    logp, _ = naive(model, batch)
    expected = gradients(model, logp.sum())
    found = evaluate_completions(model, batch, frozenset()).logp
    torch.testing.assert_close(found, logp, atol=1e-4, rtol=0)
    for name, gradient in gradients(model, found.sum()).items():
        assert float((gradient - expected[name]).norm()) <= 1e-4 * float(expected[name].norm()) + 1e-5, name


def test_low_rank_adapters_have_the_gradients_of_a_forward_pass_over_each_row():
    model = load_language_model("tiny:2x32:char", dtype=torch.float64, lora=Lora(rank=3)).model
    for norm in with_exact_norms(model).modules():
        if isinstance(norm, torch.nn.RMSNorm):
            norm.requires_grad_(False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch()
    weights = cotangents(batch)[0]
    expected = gradients(model, (naive(model, batch)[0] * weights).sum())
    found = gradients(model, (evaluate_completions(model, batch, frozenset()).logp * weights).sum())
    assert len(found) == 2 * 2 * 7
    assert_same_gradients(found, expected)


def test_gradient_checkpointing_is_refused():
    model = build()
    model.activation_checkpointing_enable()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        evaluate_completions(model, make_batch(), frozenset())


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_are_evaluated_rightly_pass_the_check(name):
    check_model(build(name))


def test_models_that_would_be_evaluated_wrongly_do_not_pass_the_check():
    torch.manual_seed(0)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=2, n_head=3, initializer_range=0.3)
    )
    with pytest.raises(ConfigError, match="Bloom"):
        check_model(bloom.eval())


def test_attention_sinks_are_refused():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    with pytest.raises(ConfigError, match="s_aux"):
        check_model(transformers.GptOssForCausalLM(config).eval())


def test_the_head_is_found_under_adapters():
    plain = load_language_model("tiny:1x32").model
    adapted = load_language_model("tiny:1x32", lora=Lora(rank=2)).model
    for model in (plain, adapted):
        decoder, head = decoder_and_head(model)
        assert head.weight.shape == (259, 32)
        assert type(decoder).__name__ == "LlamaModel"


def test_a_layer_holds_nothing_but_its_input_for_the_backward_pass():
    held = []
    for layers in (1, 4):
        model = load_language_model(f"tiny:{layers}x32").model
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            evaluate_completions(model, make_batch(), frozenset({"logp"}))
        held.append(sum(t.numel() for t in saved))
    assert held[1] - held[0] == 3 * len(pack(make_batch()).tokens) * 32


@st.composite
def rows_of_groups(draw):
    prompts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    groups = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=0, max_size=30))
    lengths = draw(st.lists(st.integers(0, 30), min_size=len(groups), max_size=len(groups)))
    return torch.tensor(lengths), torch.tensor([prompts[g] for g in groups]), torch.tensor(groups)


@given(rows=rows_of_groups(), budget=st.integers(1, 200))
@settings(max_examples=150)
def test_micro_batches_are_a_partition_within_the_budget(rows, budget):
    lengths, prompts, groups = rows
    pieces = micro_batches(lengths, prompts, groups, budget)
    assert sorted(int(i) for piece in pieces for i in piece) == list(range(len(lengths)))
    pieces_of = {}
    for number, piece in enumerate(pieces):
        shared = {int(groups[i]): int(prompts[i]) for i in piece}
        assert len(piece) == 1 or int(lengths[piece].sum()) + sum(shared.values()) <= budget
        for group in shared:
            pieces_of.setdefault(group, set()).add(number)
    for group, numbers in pieces_of.items():
        whole = lengths[groups == group].sum() + prompts[groups == group][0]
        assert whole > budget or len(numbers) <= 2


def test_a_group_is_split_where_a_piece_has_room_for_its_prompt_and_as_many_tokens_of_completions():
    groups, prompts = torch.tensor([0, 1, 1, 1]), torch.full((4,), 12)
    lengths = torch.tensor([30, 10, 11, 31])
    for budget, expected in ((65, [[0], [1, 2, 3]]), (66, [[0, 1], [2, 3]]), (75, [[0, 1, 2], [3]])):
        assert [piece.tolist() for piece in micro_batches(lengths, prompts, groups, budget)] == expected


def test_micro_batches_are_few_and_bring_like_lengths_together():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(32).repeat_interleave(8)
    prompts = torch.randint(20, 60, (32,), generator=generator)[groups]
    lengths = torch.randint(1, 33, (256,), generator=generator)
    pieces = micro_batches(lengths, prompts, groups, 1000)
    total = int(lengths.sum() + prompts[::8].sum())
    assert len(pieces) <= math.ceil(1.1 * total / 1000)
    spread = [float(prompts[piece].max() - prompts[piece].min()) for piece in pieces]
    assert sum(spread) / len(spread) < 20


def test_no_rows_make_no_micro_batches():
    none = torch.zeros(0, dtype=torch.int64)
    assert micro_batches(none, none, none, 100) == []
