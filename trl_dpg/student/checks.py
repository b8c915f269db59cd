"""Checks of a student: no dropout, one device, trainable parameters, and 4-bit layers with correct gradients."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers.utils import is_bitsandbytes_available


def check_model(model: nn.Module) -> None:
    """
    Refuse a student that would have wrong scores, or that cannot be trained.

    Raises:
        `ValueError`: For the reasons that [`Student`] lists.
    """
    _check_is_whole(model)
    active = active_dropout(model)
    if active:
        name, value = next(iter(active.items()))
        raise ValueError(
            f"The student has active dropout ({name} = {value}, {len(active)} in all). The two sweeps would see "
            "different networks. Load the model with its dropout at 0 (and `lora_dropout=0.0`), or pass "
            "`disable_dropout=True`."
        )
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and any(module.use_dora.values()):
            raise ValueError(
                f"The student's adapter at {name!r} is DoRA. PEFT detaches its norm in the forward pass, so its "
                "second derivative and every score would be wrong. Use plain LoRA (`use_dora=False`)."
            )
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"The student's adapter at {name!r} is merged into its base. Unmerge it before training it."
            )
        if vars(module).get("gradient_checkpointing") and _is_reentrant(module):
            raise ValueError(
                "The student uses reentrant gradient checkpointing, which has no second derivative. Enable it "
                "with `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise ValueError(
                f"The student's modules {names[module]!r} and {name!r} are one and the same, and it is trained. Its "
                "weights could not be put back afterwards. Give each its own module."
            )
        names[module] = name
    trainable = [p for p in model.parameters() if p.requires_grad]
    if bnb_modules(model, "Linear8bitLt"):
        raise ValueError("The student's base is quantised to 8 bits; only 4-bit bases are supported (`load_in_4bit`).")
    if bnb_modules(model, "Linear4bit") and not is_peft_model(model):
        raise ValueError(
            "The student's base is quantised but has no adapters, and quantised weights cannot be trained. Pass a "
            "`peft_config` (e.g. `LoraConfig(r=16, target_modules='all-linear')`)."
        )
    if not trainable:
        raise ValueError(
            "The student has no trainable parameters: none has `requires_grad=True`. Pass a `peft_config`, load "
            "the adapter with `is_trainable=True`, or set `requires_grad` on what the fine-tuning should train."
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"The student is spread over {sorted(map(str, devices))}. It must be on one device: load it without "
            '`device_map="auto"`.'
        )


def _check_is_whole(model: nn.Module) -> None:
    sharded = next((name for name, parameter in model.named_parameters() if parameter.numel() == 0), None)
    if sharded is not None:
        raise ValueError(
            f"The student's parameter {sharded!r} is empty: DeepSpeed ZeRO-3 has sharded the model while it was "
            "loaded. Pass its path or Hub id, from which the student is loaded whole, or load it before you create "
            "the training arguments."
        )


def check_4bit_gradients(layers: dict[str, Any], device: torch.device) -> None:
    """
    Compare the gradient of every 4-bit layer with that of its dequantised weight.

    Raises:
        `ValueError`:
            If they differ by more than rounding (relative L2 above 1e-3 for float32 compute, 2e-2 for half
            precision), as bitsandbytes' packed CPU inference kernel does.
    """
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        shape = layer.weight.quant_state.shape
        dtype = layer.compute_dtype or torch.float32
        x = torch.randn(4, shape[1], generator=generator).to(device, dtype).requires_grad_()
        y_bar = torch.randn(4, shape[0], generator=generator).to(device, dtype)
        y = layer(x)
        # The inference kernel has no gradient, or its output does not require one
        gradient = torch.autograd.grad(y, x, y_bar, allow_unused=True)[0] if y.requires_grad else None
        error = torch.inf
        if gradient is not None:
            expected = y_bar.float() @ dequantize_bnb_weight(layer.weight).float()
            error = ((gradient.float() - expected).norm() / expected.norm()).item()
        if error > (1e-3 if dtype == torch.float32 else 2e-2):
            raise ValueError(
                f"The 4-bit layer {name!r} disagrees with its own dequantised weight (relative error of its "
                f"gradient {error:.2g}). bitsandbytes repacks a layer for CPU inference when it runs in eval "
                "mode, and this cannot be undone. Load the student again, and do not run it in eval mode before."
            )


def is_packed_for_cpu(layer: Any) -> bool:
    """Whether bitsandbytes has repacked a 4-bit layer for inference."""
    return vars(layer.weight.quant_state).get("packing_format_for_cpu", False)


def bnb_modules(model: nn.Module, class_name: str) -> dict[str, Any]:
    """The bitsandbytes modules of a class (`"Linear4bit"`, `"Linear8bitLt"`) by name."""
    if not is_bitsandbytes_available():
        return {}
    import bitsandbytes as bnb

    kind = {"Linear4bit": bnb.nn.Linear4bit, "Linear8bitLt": bnb.nn.Linear8bitLt}[class_name]
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _is_reentrant(module: nn.Module) -> bool:
    return vars(module)["_gradient_checkpointing_func"].keywords.get("use_reentrant", False)


def _dropout_attributes(module: nn.Module) -> list[str]:
    """Names of a module's attributes that are dropout probabilities (`attention_dropout`, or `p` of `nn.Dropout`)."""
    if isinstance(module, nn.Dropout):
        return ["p"]
    return [key for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]


def active_dropout(model: nn.Module) -> dict[str, float]:
    return {
        f"{name}.{key}".lstrip("."): vars(module)[key]
        for name, module in model.named_modules()
        for key in _dropout_attributes(module)
        if vars(module)[key] > 0
    }


def switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for key in _dropout_attributes(module):
            setattr(module, key, 0.0)
