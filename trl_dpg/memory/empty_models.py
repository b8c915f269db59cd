"""Models of which only the shapes exist, made from their configuration: nothing is loaded and nothing is computed."""

import copy
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from ..student.checks import bnb_modules
from ..student.head import _WHICH_FILES


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PretrainedConfig

BLOCK_4BIT, BLOCK_NESTED = 64, 256
"""Weights that share a constant in bitsandbytes' 4-bit format, and constants that share one if they are quantised."""


def empty_model(
    model: "str | PretrainedConfig",
    dtype: torch.dtype | str = torch.float32,
    peft_config: "PeftConfig | None" = None,
    quantization_config: "BitsAndBytesConfig | None" = None,
    **kwargs: Any,
) -> nn.Module:
    """
    A model under accelerate's `init_empty_weights`, with adapters and 4-bit layers if asked for.

    Its matrices are then replaced by fake tensors of the CPU: every operation on them gives tensors of the right shape
    without data. Vectors (norms, biases) and buffers are small and real.

    Args:
        model (`str` or [`~transformers.PretrainedConfig`]): Path or Hub id, or the configuration itself.
        dtype (`torch.dtype` or `str`): Type of the weights; `"auto"`: that of the configuration.
        peft_config ([`~peft.PeftConfig`], *optional*): Adapters. Without them, all weights are trained.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): The 4-bit format of the base.
        kwargs: Those of `from_pretrained` that say which files to read, and `attn_implementation`.

    Raises:
        `OSError` or `ValueError`: If the configuration cannot be read.
    """
    which = {name: value for name, value in kwargs.items() if name in _WHICH_FILES}
    config = AutoConfig.from_pretrained(model, **which) if isinstance(model, str) else copy.deepcopy(model)
    if dtype in ("auto", None):
        dtype = config.dtype or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    options = {name: kwargs[name] for name in ("attn_implementation", "trust_remote_code") if kwargs.get(name)}
    with init_empty_weights():
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    made.tie_weights()  # the context breaks ties
    if quantization_config is not None:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(quantization_config), pre_quantized=False)
        quantizer.preprocess_model(model=made, dtype=dtype, device_map={"": "cpu"})
        made.requires_grad_(False)
    if peft_config is not None:
        with init_empty_weights(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the ties, which are unharmed
            made = get_peft_model(made, copy.deepcopy(peft_config))
    _make_fake(made, FakeTensorMode(allow_non_fake_inputs=True))
    return made


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the meta tensors of a model: matrices by fake tensors, vectors and buffers by real ones."""

    def filled(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2:
            return torch.ones_like(tensor, device="cpu")
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    made: dict[Tensor, nn.Parameter] = {}
    quantized = {layer.weight: layer for layer in bnb_modules(model, "Linear4bit").values()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                if parameter in quantized:
                    made[parameter] = _packed(quantized[parameter], mode)
                else:
                    made[parameter] = nn.Parameter(filled(parameter), requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = filled(buffer)


def _packed(layer: Any, mode: FakeTensorMode) -> nn.Parameter:
    """The 4-bit weight of a layer: two numbers a byte, and a constant for each block."""
    from bitsandbytes.functional import QuantState

    shape, nested = (layer.out_features, layer.in_features), layer.weight.compress_statistics
    number = shape[0] * shape[1]
    blocks = -(-number // BLOCK_4BIT)

    def state(size, dtype, code, blocksize, **kwargs):
        absmax = torch.empty(size, dtype=dtype)
        return QuantState(absmax=absmax, code=torch.empty(code), blocksize=blocksize, dtype=torch.float32, **kwargs)

    with mode:
        known: dict[str, Any] = dict(shape=torch.Size(shape), quant_type=layer.weight.quant_type)
        if nested:
            inner = state(-(-blocks // BLOCK_NESTED), torch.float32, 256, BLOCK_NESTED)
            outer = state(blocks, torch.uint8, 16, BLOCK_4BIT, offset=torch.empty(()), state2=inner, **known)
        else:
            outer = state(blocks, torch.float32, 16, BLOCK_4BIT, **known)
        packed = nn.Parameter(torch.empty((number + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = outer  # type: ignore[attr-defined]
    return packed


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of a model: parameters, buffers and the constants of 4-bit weights."""
    yield from model.parameters()
    yield from model.buffers()
    for layer in bnb_modules(model, "Linear4bit").values():
        state = layer.weight.quant_state
        for own in (state, state.state2) if state.nested else (state,):
            yield from (x for x in (own.absmax, own.code) if isinstance(x, Tensor))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors, each storage once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in held_tensors(model)}
    return sum(storages.values())
