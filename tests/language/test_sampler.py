import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polopt.errors import ConfigError
from polopt.language.completions import SamplingConfig
from polopt.language.prefix_cache import PrefixCache
from polopt.language.replica import PackedLinear
from polopt.language.sampler import CompletionSampler

transformers = pytest.importorskip("transformers")

VOCABULARY = 300
EOS = 299
PROMPTS = [[5, 17, 203], [44], [9, 8, 7, 6, 5, 4, 3], [5, 17, 203, 9], [120, 121]]
COUNTS = [3, 1, 5, 2, 1]


def configuration(name):
    common = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None}
    sizes = {"hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
    grouped = common | sizes | {"num_key_value_heads": 2, "head_dim": 16}
    window = {"sliding_window": 5}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    return {
        "llama": lambda: transformers.LlamaConfig(**grouped, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**grouped),
        "mistral": lambda: transformers.MistralConfig(**grouped, **window),
        "gemma2": lambda: transformers.Gemma2Config(
            **grouped, **window, **layers, attn_logit_softcapping=0.5
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **grouped, **window, **layers, tie_word_embeddings=False
        ),
        "gpt2": lambda: transformers.GPT2Config(**common, n_embd=48, n_layer=2, n_head=3, n_positions=64),
    }[name]()


MODELS = ["llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt2"]


def tiny(name="llama", dtype=torch.float64):
    """A random model whose predictions are far from uniform and depend on the context."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration(name), dtype=dtype)
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = 0.6 if "embed" in label or "wte" in label else 1.5
                parameter.normal_(0, scale / math.sqrt(parameter.shape[-1]))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and a few longer tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges = [("Ċ", "Ċ"), ("e", "n"), ("en", "d"), ("Ċ", "e"), ("x", "Ċ")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    while len(vocabulary) < EOS:
        vocabulary[f"<unused{len(vocabulary)}>"] = len(vocabulary)
    vocabulary["<eos>"] = EOS
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


@pytest.fixture(scope="module")
def llama():
    return tiny()


def uniform(counts, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sum(counts), length, generator=generator, dtype=torch.float64)


def rows_of(prompts, counts):
    return [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]


def teacher_forced(model, prompts, counts, completions, temperature=1.0):
    """Log-probabilities [t, V] of each row's tokens by one plain forward pass per row."""
    found = []
    for prompt, tokens, mask in zip(
        rows_of(prompts, counts), completions.tokens, completions.mask, strict=True
    ):
        sequence = torch.tensor([prompt + tokens[mask].tolist()])
        with torch.no_grad():
            logits = model(sequence).logits[0]
        found.append((logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1))
    return found


def assert_same(first, second, atol=1e-9):
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.mask, second.mask) and torch.equal(first.finished, second.finished)
    for name in ("logp", "sampler_logp", "entropy"):
        assert torch.allclose(getattr(first, name), getattr(second, name), rtol=0, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_generate(name, tokenizer):
    model = tiny(name, torch.float32)
    completions = CompletionSampler(model, tokenizer).sample(
        PROMPTS, [1] * 5, SamplingConfig(12, temperature=0), uniform([1] * 5, 12)
    )
    for prompt, tokens, mask in zip(PROMPTS, completions.tokens, completions.mask, strict=True):
        plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert tokens[mask].tolist() == plain[0, len(prompt) :].tolist()
    assert len({tuple(row.tolist()) for row in completions.tokens}) > 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_recorded_numbers_are_those_of_teacher_forcing(name, dtype, atol, tokenizer):
    model = tiny(name, dtype)
    completions = CompletionSampler(model, tokenizer).sample(
        PROMPTS, COUNTS, SamplingConfig(20, temperature=0.7), uniform(COUNTS, 20)
    )
    assert completions.logp.dtype == dtype
    assert completions.sampler_logp is completions.logp
    if name == "gemma2":
        atol = 1e-5  # its own attention computes in float32 whatever the model's precision
    for i, logp in enumerate(teacher_forced(model, PROMPTS, COUNTS, completions, 0.7)):
        mask = completions.mask[i]
        chosen = logp.gather(1, completions.tokens[i, mask][:, None])[:, 0]
        assert torch.allclose(completions.logp[i, mask], chosen, rtol=0, atol=atol)
        assert torch.allclose(completions.entropy[i, mask], -(logp.exp() * logp).sum(-1), rtol=0, atol=atol)
    assert completions.entropy[completions.mask].mean() > 1


def test_truncated_sampling_records_both_distributions(llama, tokenizer):
    config = SamplingConfig(10, temperature=0.7, top_k=20, top_p=0.8)
    completions = CompletionSampler(llama, tokenizer).sample(PROMPTS, COUNTS, config, uniform(COUNTS, 10))
    for i, logp in enumerate(teacher_forced(llama, PROMPTS, COUNTS, completions, 0.7)):
        mask = completions.mask[i]
        tokens = completions.tokens[i, mask][:, None]
        top, index = logp.topk(20)
        top = top.log_softmax(-1)
        dropped = (top.exp().cumsum(-1) - top.exp()) >= 0.8
        top = top.masked_fill(dropped, -math.inf).log_softmax(-1)
        drawn = torch.full_like(logp, -math.inf).scatter(1, index, top).gather(1, tokens)[:, 0]
        assert torch.allclose(completions.sampler_logp[i, mask], drawn, rtol=0, atol=1e-10)
        assert torch.allclose(completions.logp[i, mask], logp.gather(1, tokens)[:, 0], rtol=0, atol=1e-10)
    assert (completions.sampler_logp >= completions.logp).all()
    assert (completions.sampler_logp > completions.logp + 1e-3).any()


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    max_rows=st.integers(1, 14),
    order=st.permutations(range(5)),
    counts=st.lists(st.integers(0, 6), min_size=5, max_size=5),
)
def test_chunks_and_the_order_of_prompts_change_nothing(llama, tokenizer, seed, max_rows, order, counts):
    config = SamplingConfig(9, stop=("e", "\n"))
    numbers = uniform(counts, 9, seed)
    whole = CompletionSampler(llama, tokenizer, max_rows=1000).sample(PROMPTS, counts, config, numbers)
    pieces = CompletionSampler(llama, tokenizer, max_rows=max_rows).sample(PROMPTS, counts, config, numbers)
    assert_same(whole, pieces)
    rows = torch.cat([torch.arange(sum(counts)).split(counts)[i] for i in order])
    shuffled = CompletionSampler(llama, tokenizer).sample(
        [PROMPTS[i] for i in order], [counts[i] for i in order], config, numbers[rows]
    )
    assert torch.equal(shuffled.tokens, whole.tokens[rows]) and torch.equal(shuffled.mask, whole.mask[rows])
    assert torch.allclose(shuffled.logp, whole.logp[rows], rtol=0, atol=1e-9)


def test_prompts_read_in_several_passes_are_the_same(llama, tokenizer, monkeypatch):
    config, numbers = SamplingConfig(6), uniform(COUNTS, 6)
    whole = CompletionSampler(llama, tokenizer).sample(PROMPTS, COUNTS, config, numbers)
    monkeypatch.setattr("polopt.language.sampler.PREFILL_TOKENS", 5)
    assert_same(whole, CompletionSampler(llama, tokenizer).sample(PROMPTS, COUNTS, config, numbers))


def test_uneven_groups_and_equal_prompts_sample_as_alone(llama, tokenizer):
    prompts, counts = [[1, 2, 3], [4], [1, 2, 3], [5, 6]], [40, 0, 3, 1]
    config, numbers = SamplingConfig(40, stop=("a",)), uniform(counts, 40)
    sampler = CompletionSampler(llama, tokenizer)
    together = sampler.sample(prompts, counts, config, numbers)
    assert together.tokens.shape == (44, 40)
    for i, prompt in list(enumerate(rows_of(prompts, counts)))[::6]:
        alone = sampler.sample([prompt], [1], config, numbers[i : i + 1])
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert torch.allclose(alone.logp[0], together.logp[i], rtol=0, atol=1e-9)
        assert alone.finished[0] == together.finished[i]


def test_each_prompt_is_read_once_and_finished_rows_cost_nothing(llama, tokenizer, monkeypatch):
    sizes = []
    forward = CompletionSampler._logits

    def counted(self, tokens, *arguments):
        sizes.append(len(tokens))
        return forward(self, tokens, *arguments)

    monkeypatch.setattr(CompletionSampler, "_logits", counted)
    prompts, counts = [*PROMPTS, PROMPTS[0]], [*COUNTS, 4]
    completions = CompletionSampler(llama, tokenizer).sample(
        prompts, counts, SamplingConfig(15, stop=("e", "\n", "a", "b", "c")), uniform(counts, 15)
    )
    lengths = completions.mask.sum(1)
    assert sizes[0] == sum(map(len, PROMPTS))
    assert sizes[1:] == [n for step in range(1, 15) if (n := int((lengths > step).sum()))]
    assert len(set(sizes[1:])) > 2


def test_a_completion_ends_with_the_token_that_ends_it(llama, tokenizer):
    counts = [40] * 5
    free = CompletionSampler(llama, tokenizer).sample(
        PROMPTS, counts, SamplingConfig(30), uniform(counts, 30)
    )
    ended = free.tokens == EOS
    assert torch.equal(free.finished, ended.any(1)) and free.finished.any() and not free.finished.all()
    for tokens, mask in zip(free.tokens, free.mask, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and (tokens[length:] == 0).all()
        assert EOS not in tokens[: length - 1] and (length == 30 or tokens[length - 1] == EOS)
    assert (free.logp[~free.mask] == 0).all() and (free.entropy[~free.mask] == 0).all()


@pytest.mark.parametrize("stop", [("\n",), ("end", "\n\n"), ("é",), ("xx", "<eos>"), ("\ne",)])
def test_stop_strings_end_a_completion_where_its_text_first_has_one(stop, tokenizer):
    """Against decoding the whole completion after every token."""

    model = tiny()
    with torch.no_grad():
        likely = sorted(
            {t for s in (*stop, "en", "x\n", "\n", "é") for t in tokenizer(s)["input_ids"]} | {EOS - 5}
        )
        model.model.embed_tokens.weight.mul_(0.02)
        model.lm_head = nn.Linear(96, VOCABULARY, dtype=torch.float64)
        model.lm_head.weight.mul_(0.1)
        model.lm_head.bias.fill_(-30.0)
        model.lm_head.bias[likely] = 0.0
    counts = [60]
    numbers = uniform(counts, 16)
    sampler = CompletionSampler(model, tokenizer)
    free = sampler.sample([[1, 2]], counts, SamplingConfig(16), numbers)
    stopped = sampler.sample([[1, 2]], counts, SamplingConfig(16, stop=stop), numbers)
    ends = []
    for tokens, full, mask, finished in zip(
        stopped.tokens, free.tokens, stopped.mask, stopped.finished, strict=True
    ):
        texts = [tokenizer.decode(full[: n + 1].tolist()) for n in range(16)]
        first = next((n + 1 for n, text in enumerate(texts) if any(s in text for s in stop)), None)
        assert int(mask.sum()) == (first or 16) and bool(finished) == (first is not None)
        assert torch.equal(tokens[mask], full[: int(mask.sum())])
        ends.append(first)
    assert len(set(ends)) > 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_copy_follows_the_model_only_when_refreshed(dtype, tokenizer):
    model = tiny(dtype=torch.float32)
    sampler = CompletionSampler(model, tokenizer, dtype)
    config, numbers = SamplingConfig(8), uniform(COUNTS, 8)
    before = sampler.sample(PROMPTS, COUNTS, config, numbers)
    assert before.logp.dtype == dtype
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert_same(sampler.sample(PROMPTS, COUNTS, config, numbers), before)
    sampler.refresh()
    after = sampler.sample(PROMPTS, COUNTS, config, numbers)
    assert not torch.equal(after.tokens, before.tokens)
    own = CompletionSampler(model.to(dtype), tokenizer).sample(PROMPTS, COUNTS, config, numbers)
    assert_same(after, own, 1e-5)


def test_a_released_copy_holds_nothing_and_samples_the_same_once_refreshed(tokenizer):
    sampler = CompletionSampler(tiny(dtype=torch.float32), tokenizer, torch.bfloat16)
    config, numbers = SamplingConfig(8), uniform(COUNTS, 8)
    before = sampler.sample(PROMPTS, COUNTS, config, numbers)
    sampler.release()
    assert not sum(p.untyped_storage().nbytes() for p in sampler.model.parameters() if not p.is_meta)
    assert all(m._packed is None for m in sampler.model.modules() if isinstance(m, PackedLinear))
    sampler.refresh()
    assert_same(sampler.sample(PROMPTS, COUNTS, config, numbers), before)


def test_a_copy_follows_a_model_that_was_sharded_later(tokenizer):
    from torch import distributed
    from torch.distributed.tensor import DTensor

    from polopt.engine.sharding import shard_module

    model, twin = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    sampler = CompletionSampler(model, tokenizer, torch.float32)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        shard_module(nn.ModuleDict({"policy": model}), 1)
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
                assert isinstance(parameter, DTensor)
                parameter.mul_(0.9)
                other.mul_(0.9)
        sampler.refresh()
    finally:
        distributed.destroy_process_group()
    config, numbers = SamplingConfig(8), uniform(COUNTS, 8)
    expected = CompletionSampler(twin, tokenizer).sample(PROMPTS, COUNTS, config, numbers)
    assert_same(sampler.sample(PROMPTS, COUNTS, config, numbers), expected, 1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.3)])
def test_a_packed_copy_samples_what_the_model_would(dtype, atol, tokenizer):
    model = tiny(dtype=torch.float32)
    sampler = CompletionSampler(model, tokenizer, dtype)
    completions = sampler.sample(PROMPTS, COUNTS, SamplingConfig(10), uniform(COUNTS, 10))
    assert completions.logp.dtype == torch.float32
    errors = []
    for i, logp in enumerate(teacher_forced(model, PROMPTS, COUNTS, completions)):
        chosen = logp.gather(1, completions.tokens[i, completions.mask[i]][:, None])[:, 0]
        errors += (completions.logp[i, completions.mask[i]] - chosen).abs().tolist()
    assert sum(errors) / len(errors) < atol


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT asks transformers for it
def test_adapters_are_part_of_the_policy(tokenizer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    config, numbers = SamplingConfig(10), uniform(COUNTS, 10)
    own = CompletionSampler(model, tokenizer).sample(PROMPTS, COUNTS, config, numbers)
    for i, logp in enumerate(teacher_forced(model, PROMPTS, COUNTS, own)):
        chosen = logp.gather(1, own.tokens[i, own.mask[i]][:, None])[:, 0]
        assert torch.allclose(own.logp[i, own.mask[i]], chosen, rtol=0, atol=1e-10)
    assert_same(
        own, CompletionSampler(model, tokenizer, torch.float64).sample(PROMPTS, COUNTS, config, numbers)
    )
    with model.disable_adapter():
        bare = CompletionSampler(model, tokenizer).sample(PROMPTS, COUNTS, config, numbers)
    assert not torch.equal(bare.tokens, own.tokens)


def test_sampling_leaves_the_model_as_it_was(tokenizer):
    model = tiny()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    config = model.config.to_dict()
    sampler = CompletionSampler(model, tokenizer)
    completions = sampler.sample(PROMPTS, COUNTS, SamplingConfig(4), uniform(COUNTS, 4))
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config and model.config._attn_implementation == "sdpa"
    assert not completions.logp.requires_grad and all(p.grad is None for p in model.parameters())
    loss = (model(completions.tokens).logits.sum() * completions.logp.sum()).requires_grad_()
    loss.backward()  # what was sampled may be used in training
    with pytest.raises(RuntimeError, match="interrupted"):
        _interrupt(sampler)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"


def _interrupt(sampler):
    def hook(*_):
        raise RuntimeError("interrupted")

    handle = sampler.model.model.layers[1].register_forward_hook(hook)
    try:
        sampler.sample(PROMPTS, COUNTS, SamplingConfig(4), uniform(COUNTS, 4))
    finally:
        handle.remove()


def test_dropout_is_off_while_sampling(tokenizer):
    torch.manual_seed(0)
    config = configuration("gpt2")
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()
    sampler = CompletionSampler(model, tokenizer)
    first, second = (sampler.sample(PROMPTS, COUNTS, SamplingConfig(4), uniform(COUNTS, 4)) for _ in range(2))
    assert_same(first, second)


def test_nothing_to_sample_gives_nothing(llama, tokenizer):
    sampler = CompletionSampler(llama, tokenizer)
    for prompts, counts in ([], []), ([[1, 2]], [0]):
        empty = sampler.sample(prompts, counts, SamplingConfig(4), torch.zeros(0, 4))
        assert empty.tokens.shape == (0, 4) and empty.finished.shape == (0,)


def test_rows_beyond_the_first_memory_of_a_row_are_right(llama, tokenizer):
    """Memory for the rows' own keys grows twice, and rows leave in between."""
    counts, numbers = [12], uniform([12], 90)
    completions = CompletionSampler(llama, tokenizer).sample([[3, 4]], counts, SamplingConfig(90), numbers)
    assert completions.mask.sum(1).max() > 40 and completions.mask.sum(1).min() < 40
    for i, logp in enumerate(teacher_forced(llama, [[3, 4]], counts, completions)):
        chosen = logp.gather(1, completions.tokens[i, completions.mask[i]][:, None])[:, 0]
        assert torch.allclose(completions.logp[i, completions.mask[i]], chosen, rtol=0, atol=1e-10)


def test_a_large_group_is_stored_more_than_once_and_dead_prompts_are_dropped():
    cache = PrefixCache([2, 3, 4], torch.device("cpu"))
    cache.begin_rows(torch.tensor([1] * 10 + [0, 2]))
    assert cache.lengths.tolist() == [2, 3, 3, 3, 4]
    assert torch.bincount(cache._owner).tolist() == [1, 4, 4, 2, 1]
    order = cache.keep_rows(torch.arange(12) < 3)
    assert order.tolist() == [0, 1, 2] and cache.lengths.tolist() == [3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("stop", ("",)),
        ("stop", "stop"),
    ],
)
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        SamplingConfig(**({"max_new_tokens": 4} | {field: value}))


@pytest.mark.parametrize(
    ("prompts", "counts", "shape", "message"),
    [
        ([[1]], [1, 2], (3, 4), "counts"),
        ([[1]], [-1], (0, 4), "counts"),
        ([[1]], [2], (2, 3), r"uniforms.*\(2, 4\)"),
        ([[1], []], [1, 1], (2, 4), r"prompts\[1\]"),
        ([[1] * 2045], [1], (1, 4), "2048 positions"),
    ],
)
def test_a_bad_call_is_named(prompts, counts, shape, message, llama, tokenizer):
    with pytest.raises(ConfigError, match=message):
        CompletionSampler(llama, tokenizer).sample(prompts, counts, SamplingConfig(4), torch.zeros(shape))


def test_models_that_cannot_share_prompts_are_refused(tokenizer):
    sizes = {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 2, "num_hidden_layers": 2}
    for config in (transformers.BloomConfig(**sizes), transformers.MambaConfig(**sizes)):
        model = transformers.AutoModelForCausalLM.from_config(config)
        with pytest.raises(ConfigError, match=type(model).__name__):
            CompletionSampler(model, tokenizer)
    model = tiny()
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ConfigError, match="1 of 2 layers"):
        CompletionSampler(model, tokenizer).sample([[1]], [1], SamplingConfig(2), torch.zeros(1, 2))
