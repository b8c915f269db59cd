"""A weight of the base model with its adapters merged."""

import difflib
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor


def effective_weight(model: Any, name: str) -> Tensor:
    """A weight with its adapters merged, from the model's present parameters, see [`Student.effective_weight`]."""
    base, saved = model, ".modules_to_save."
    if isinstance(model, PeftModel):
        base, saved = model.get_base_model(), f".modules_to_save.{model.active_adapter}."
    weights = {
        weight.replace(".base_layer.", ".").replace(saved, "."): weight
        for weight, _ in base.named_parameters(remove_duplicate=False)
        if ".lora_" not in weight
        and ".original_module." not in weight
        and (".modules_to_save." not in weight or saved in weight)
    }
    if name not in weights:
        near = difflib.get_close_matches(name, weights, n=4, cutoff=0.3)
        raise ValueError(f"The student has no weight {name!r}. Near names: {', '.join(near) or 'none'}.")

    module, _, attribute = weights[name].rpartition(".")
    weight = getattr(base.get_submodule(module), attribute)
    if type(weight).__name__ == "Params4bit":
        weight = dequantize_bnb_weight(weight)
    layer = base.get_submodule(module.removesuffix(".base_layer"))
    if isinstance(layer, BaseTunerLayer):
        if not isinstance(layer, LoraLayer) or any(layer.lora_bias.values()):
            raise ValueError(
                f"{name!r} has an adapter that is not plain LoRA, so its merged weight cannot be computed."
            )
        for adapter in layer.active_adapters if name.endswith(".weight") else ():
            weight = weight + layer.get_delta_weight(adapter)
    return weight
