"""From a task's prompt to the model's tokens."""

from typing import Any

from polopt.errors import ConfigError

Message = dict[str, str]


def encode_prompt(tokenizer: Any, prompt: str | list[Message], use_template: bool = True) -> list[int]:
    """Token ids of a prompt: plain text as it is, chat messages through the tokenizer's template.

    Raises:
        ConfigError: chat messages for a tokenizer without a template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt, add_special_tokens=True)["input_ids"]) or [tokenizer.bos_token_id]
    if not use_template:
        return encode_prompt(tokenizer, "\n".join(message["content"] for message in prompt))
    if tokenizer.chat_template is None:
        raise ConfigError("language.chat_template = True: this model has no chat template; set it to false")
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])
