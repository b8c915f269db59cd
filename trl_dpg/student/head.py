"""Linear heads of a student and their factors, from which the loss is computed without all logits in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


# Arguments of `from_pretrained` that say which files to read
_WHICH_FILES = ("revision", "subfolder", "cache_dir", "token", "trust_remote_code", "code_revision")


def head_names(model: str, model_init_kwargs: dict[str, Any] | None = None) -> list[str]:
    """Names of a model's head, e.g. `lm_head`, by its path or Hub id. No weights are loaded."""
    which = {key: value for key, value in (model_init_kwargs or {}).items() if key in _WHICH_FILES}
    config = AutoConfig.from_pretrained(model, **which)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=which.get("trust_remote_code"))
    head = empty.get_output_embeddings()
    return [name for name, module in empty.named_modules() if module is head]


@contextmanager
def standing_aside(head: nn.Module) -> Iterator[list[Tensor]]:
    """Context in which the head returns its input unchanged. The inputs are collected in the list that is yielded."""
    seen: list[Tensor] = []

    def forward(hidden_states):
        seen.append(hidden_states)
        return hidden_states

    own = {key: value for key, value in vars(head).items() if key == "forward"}
    head.forward = forward
    try:
        yield seen
    finally:
        del head.forward
        vars(head).update(own)


def _trained_copy(head: Any) -> Any:
    """The module that a head's `forward` uses: its trained copy if PEFT trains one (`modules_to_save`)."""
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    adapter = head.active_adapters[0]
    if head.disable_adapters or adapter not in head.modules_to_save:
        return head.original_module
    return head.modules_to_save[adapter]


def is_linear_head(head: Any) -> bool:
    """Whether a head computes Σ_j X_j W_jᵀ + b with the factors of `linear_factors`."""
    head = _trained_copy(head)
    if not isinstance(head, LoraLayer):
        return type(head) is nn.Linear
    plain = not (head.merged or head.lora_variant or any(head.lora_bias.values()))
    return plain and type(head.base_layer) is nn.Linear


def linear_factors(head: Any, hidden: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """X_j, W_j and b of a linear head."""
    head = _trained_copy(head)
    if not isinstance(head, LoraLayer):
        return [hidden], [head.weight], head.bias
    inputs, weights = [hidden], [head.base_layer.weight]
    for adapter in [] if head.disable_adapters else head.active_adapters:
        if adapter in head.lora_A:
            down = head.lora_A[adapter]
            inputs.append(down(hidden.to(down.weight.dtype)) * head.scaling[adapter])
            weights.append(head.lora_B[adapter].weight)
    return inputs, weights, head.base_layer.bias
