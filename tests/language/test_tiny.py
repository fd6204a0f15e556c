import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.errors import ConfigError
from polopt.language.tiny import build_tiny, build_tokenizer, warm_up

transformers = pytest.importorskip("transformers")
BYTE, CHAR = build_tokenizer("byte"), build_tokenizer("char")


@given(text=st.text(max_size=40))
@settings(max_examples=100)
def test_any_text_survives_the_byte_tokenizer_one_token_a_byte(text):
    text = text.replace("<pad>", "").replace("<bos>", "").replace("<eos>", "")
    tokens = BYTE(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert BYTE.decode(tokens) == text


@given(text=st.text(alphabet=string.ascii_letters + string.digits + " \n\t+-*/=?.,:<>", max_size=40))
def test_printable_text_survives_the_character_tokenizer_one_token_a_character(text):
    text = text.replace("<pad>", "").replace("<bos>", "").replace("<eos>", "")
    tokens = CHAR(text)["input_ids"]
    assert len(tokens) == len(text)
    assert CHAR.decode(tokens) == text


def test_characters_it_does_not_know_are_dropped():
    assert CHAR.decode(CHAR("1é2\r\n")["input_ids"]) == "12\n"


@pytest.mark.parametrize("tokenizer", [BYTE, CHAR])
def test_special_tokens_are_three_and_are_skipped_when_asked(tokenizer):
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert special == [0, 1, 2]
    assert tokenizer.decode([*tokenizer("a b")["input_ids"], 2, 0], skip_special_tokens=True) == "a b"


@pytest.mark.parametrize("spec", ["tiny:1x32", "tiny:2x64:char"])
def test_a_saved_model_comes_back(spec, tmp_path):
    model, tokenizer = build_tiny(spec)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer("12+34= 46\n", return_tensors="pt")["input_ids"]
    assert torch.equal(reader("12+34= 46\n", return_tensors="pt")["input_ids"], tokens)
    assert reader.decode(tokens[0]) == "12+34= 46\n"
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert reader.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id


def test_weights_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    one, other, third = (build_tiny("tiny:1x32", seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], third[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("spec", "heads"), [("tiny:1x16", 1), ("tiny:2x32", 1), ("tiny:1x96", 3)])
def test_heads_are_of_one_width_and_the_head_is_tied(spec, heads):
    model, _ = build_tiny(spec)
    assert model.config.num_attention_heads == heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training


@pytest.mark.parametrize(
    "spec", ["tiny:2", "tiny:0x32", "tiny:2x0", "tiny:2x33", "tiny:2x48", "tiny:2x32:word", "tiny:2x32 "]
)
def test_another_spec_is_named_with_what_is_allowed(spec):
    with pytest.raises(ConfigError, match="LAYERSxWIDTH"):
        build_tiny(spec)


def copies(count=10**9):
    for number in range(count):
        letter = "abcdefgh"[number % 8]
        yield f"{letter}>", letter * 2


def greedy(model, tokenizer, prompt, length):
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(length):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(tokens[0])[len(prompt) :]


def test_a_warm_up_teaches_completion_and_end():
    model, tokenizer = build_tiny("tiny:2x32:char")
    loss = warm_up(model, tokenizer, copies(), 150, 16, 1e-2, torch.Generator().manual_seed(0))
    assert 0 <= loss < 0.1
    assert [greedy(model, tokenizer, f"{letter}>", 3) for letter in "adh"] == [
        "aa<eos>",
        "dd<eos>",
        "hh<eos>",
    ]
    assert all(p.grad is None for p in model.parameters())


def test_a_warm_up_is_reproducible_and_few_examples_suffice():
    def run(seed):
        model, tokenizer = build_tiny("tiny:1x32:char")
        generator = torch.Generator().manual_seed(seed)
        return warm_up(model, tokenizer, list(copies(5)), 6, 4, 1e-2, generator), model.state_dict()

    (one, weights), (other, same), (third, _) = run(0), run(0), run(1)
    assert one == other != third
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_the_first_loss_of_a_warm_up_is_the_cross_entropy_of_the_completion_alone():
    model, tokenizer = build_tiny("tiny:1x32:char")
    whole = tokenizer("ab>cd", return_tensors="pt")["input_ids"]
    whole = torch.cat([whole, torch.tensor([[tokenizer.eos_token_id]])], 1)
    logprobs = model(whole).logits.log_softmax(-1)[0, 2:-1]
    expected = -float(logprobs.gather(-1, whole[0, 3:, None]).detach().mean())
    loss = warm_up(model, tokenizer, [("ab>", "cd")], 1, 1, 1e-3, torch.Generator())
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_warm_up_without_examples_is_refused():
    model, tokenizer = build_tiny("tiny:1x32")
    with pytest.raises(ConfigError, match="examples"):
        warm_up(model, tokenizer, [], 1, 1, 1e-3, torch.Generator())
