"""The student: a causal LM that is fine-tuned and evaluated. Its stored weights are never written."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import is_peft_model
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..kernels.cross_entropy import linear_cross_entropy
from .checks import bnb_modules, check_4bit_gradients, check_model, is_packed_for_cpu, switch_off_dropout
from .effective_weight import effective_weight
from .head import is_linear_head, linear_factors, standing_aside
from .loading import load_pretrained, loading_whole
from .tokenization import Batch, Examples, SampleReader, TokenizedExample, collate, pad_token_id


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig


@dataclass
class _Layout:
    """
    Names, shapes and dtypes of the trainable parameters, in their order in the flat vector, and where they are: the
    modules that hold a parameter, each with its own name for it. A tied parameter has several.
    """

    names: list[str]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    places: list[list[tuple[nn.Module, str]]]


def _layout(model: nn.Module) -> _Layout:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {parameter: [] for parameter in trainable.values()}
    for module in model.modules():
        for own_name, parameter in module._parameters.items():
            if parameter in places:
                places[parameter].append((module, own_name))
    return _Layout(
        names=list(trainable),
        shapes=[p.shape for p in trainable.values()],
        dtypes=[p.dtype for p in trainable.values()],
        places=list(places.values()),
    )


class Student:
    """
    The model that is fine-tuned on the generated data (the paper's "target model"; Thrush et al., arXiv 2604.08423).

    All parameters are trained, or LoRA adapters, or LoRA adapters on a 4-bit base. Every fine-tuning starts from the
    stored weights. They are only read, so they are bit for bit the same afterwards, also after an error.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student before fine-tuning. A path or Hub id is loaded in float32 (see `model_init_kwargs`), and its
            dropout is switched off. A loaded model is used as it is, on its device.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer. Loaded from the model's path when `None`. A model without a path needs no
            tokenizer if all samples are token ids.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adds adapters and trains only these. Without it, the parameters with `requires_grad` are trained.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantises the base to 4 bits while it is loaded from a path or Hub id.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`] for a path or Hub id.
        disable_dropout (`bool`, *optional*, defaults to `False`):
            Whether to set every dropout probability of a loaded model to zero. Otherwise, active dropout is an error.
        device (`str` or `torch.device`, *optional*):
            Where a path or Hub id is loaded. The process's own device when `None`.

    Raises:
        `ValueError`:
            If nothing is trainable, dropout is active, the tokenizer has neither a pad nor an eos token, the base is
            quantised without adapters or to 8 bits, an adapter is DoRA or merged, gradient checkpointing is
            reentrant, or the model is sharded or lies on several devices.
    """

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: "PeftConfig | None" = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        model_init_kwargs: dict[str, Any] | None = None,
        disable_dropout: bool = False,
        device: torch.device | str | None = None,
    ):
        if isinstance(model, str):
            device = PartialState().device if device is None else torch.device(device)
            init_kwargs = {"dtype": torch.float32, "device_map": {"": device}, **(model_init_kwargs or {})}
            if quantization_config is not None:
                init_kwargs["quantization_config"] = quantization_config
            with loading_whole():
                model = load_pretrained(AutoModelForCausalLM, model, "the student", **init_kwargs)
            switch_off_dropout(model)
        elif quantization_config is not None or model_init_kwargs is not None or device is not None:
            raise ValueError(
                "`quantization_config`, `model_init_kwargs` and `device` apply while a model is loaded, but the "
                f"student is an already loaded {type(model).__name__}. Pass its path or Hub id instead."
            )
        if processing_class is None and model.config._name_or_path:
            processing_class = load_pretrained(AutoTokenizer, model.config._name_or_path, "the student's tokenizer")
        if peft_config is not None:
            if is_peft_model(model):
                raise ValueError(
                    "The student is a `PeftModel` already, and `peft_config` would add another adapter. Pass a model "
                    "without adapters, or no `peft_config`."
                )
            # A copy, because PEFT writes the resolved target modules into the config
            with loading_whole():
                model = get_peft_model(model, copy.deepcopy(peft_config))
        if disable_dropout:
            switch_off_dropout(model)

        self.model = model
        self.processing_class = processing_class
        self.pad_token_id = pad_token_id(processing_class)
        self._look_at_model()

    def _look_at_model(self) -> None:
        check_model(self.model)
        self._layout = _layout(self.model)
        self._quantization_verified = False
        self._head_comes_last: bool | None = None  # not yet known
        self.tells_samples_apart: bool | None = None  # in a backward pass; not yet known
        self.micro_batch_size: int | None = None  # that fitted into memory, after larger ones did not

    def look_again(self) -> None:
        """Find the trainable parameters anew, if modules of the model were replaced since. Every sweep begins so."""
        if _layout(self.model) != self._layout:
            self._look_at_model()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Student":
        """Move the model to a device."""
        self.model.to(device)
        return self

    def describe(self) -> str:
        """One line for a model card: name, number of trainable parameters, and if it has adapters or a 4-bit base."""
        name = self.model.config._name_or_path or type(self.model).__name__
        base = ", 4-bit base" if self.has_4bit_base else ""
        adapters = " (adapters)" if is_peft_model(self.model) else ""
        return f"`{name}`, {self.num_trainable:,} trainable parameters{adapters}{base}"

    @property
    def has_4bit_base(self) -> bool:
        """Whether linear layers of the model are quantised to 4 bits."""
        return bool(bnb_modules(self.model, "Linear4bit"))

    # -- weights ----------------------------------------------------------------------------------------------------

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """float64 if a trainable parameter is, else float32. Parameters in 16 bits are trained as float32 copies."""
        return torch.float64 if torch.float64 in self._layout.dtypes else torch.float32

    @property
    def num_trainable(self) -> int:
        """P, the number of trainable parameters."""
        return sum(shape.numel() for shape in self._layout.shapes)

    @property
    def trains_half_precision(self) -> bool:
        """Whether a trainable parameter is stored in 16 bits."""
        return any(dtype.itemsize < 4 for dtype in self._layout.dtypes)

    def initial_theta(self) -> Tensor:
        """The stored trainable parameters as one flat vector `[P]` in `accumulator_dtype`, detached."""
        self.look_again()
        parameters = [p.detach().flatten() for p in self.model.parameters() if p.requires_grad]
        return torch.cat([p.to(self.accumulator_dtype) for p in parameters])

    def unflatten(self, theta: Tensor, cast: bool = True) -> dict[str, Tensor]:
        """
        Parts of a flat vector `[P]` by name, in the parameters' shapes and, with `cast`, dtypes; differentiable.

        Of rows `[M, P]`, parts of all rows: `[M, *shape]`.
        """
        parts = theta.split([shape.numel() for shape in self._layout.shapes], dim=-1)
        parts = [part.view(*theta.shape[:-1], *shape) for part, shape in zip(parts, self._layout.shapes, strict=True)]
        return self.cast(parts) if cast else dict(zip(self._layout.names, parts, strict=True))

    def cast(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Cast one tensor for each trainable parameter to the parameter's dtype, by name; differentiable."""
        layout = zip(self._layout.names, parts, self._layout.dtypes, strict=True)
        return {name: part.to(dtype) for name, part, dtype in layout}

    def run(self, parameters: dict[str, Tensor], function: Callable[[nn.Module], Any]) -> Any:
        """
        Call `function(model)` while `parameters` (see `unflatten`) replace the stored ones.

        `torch.func.functional_call` does the same, but looks for tied weights in each call.
        """
        stored = [(module, name, module._parameters[name]) for own in self._layout.places for module, name in own]
        try:
            for full_name, own in zip(self._layout.names, self._layout.places, strict=True):
                for module, name in own:
                    module._parameters[name] = parameters[full_name]  # type: ignore[assignment]
            return function(self.model)
        finally:
            for module, name, parameter in stored:
                module._parameters[name] = parameter

    def loss(
        self,
        model: Any,
        batch: Batch,
        loss_weights: Tensor,
        through_theta: bool = True,
        skip_values: bool = False,
        head_loss: Callable[..., tuple[Tensor, Tensor]] = linear_cross_entropy,
    ) -> tuple[Tensor, Tensor]:
        """
        Weighted cross-entropy of a batch's supervised tokens, in nats.

        The logits of a linear head, with or without LoRA, are computed for one chunk of tokens at a time, see
        [`~trl_dpg.kernels.cross_entropy.linear_cross_entropy`]. For any other head, and if the model changes the
        logits afterwards (soft-capping), all logits are computed at once.

        Args:
            model (`torch.nn.Module`): The model that [`Student.run`] passes to its function.
            batch (`Batch`): The samples, with n supervised tokens.
            loss_weights (`torch.Tensor` of shape `[n]`): Weight of each token's loss, in `accumulator_dtype`.
            through_theta (`bool`): See `linear_cross_entropy`.
            skip_values (`bool`): See `linear_cross_entropy`.
            head_loss (`Callable`): Takes the place of `linear_cross_entropy`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The weighted sum of the losses, and the losses `[n]`, detached.
        """
        arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        head = model.get_output_embeddings()
        if self._head_comes_last is not False and head is not None and is_linear_head(head):
            with standing_aside(head) as seen:
                hidden = model(**arguments).logits
            if self._head_comes_last is None:  # the first time
                self._head_comes_last = len(seen) == 1 and hidden is seen[0]
        else:
            self._head_comes_last = False
        if self._head_comes_last:
            inputs, weights, bias = linear_factors(head, hidden.flatten(0, 1)[batch.targets - 1])
            return head_loss(inputs, weights, bias, batch.labels, loss_weights, through_theta, skip_values)
        logits = model(**arguments).logits.flatten(0, 1)[batch.targets - 1]
        losses = F.cross_entropy(logits.to(loss_weights.dtype), batch.labels, reduction="none")
        return torch.dot(loss_weights, losses), losses.detach()

    @contextmanager
    def train_mode(self) -> Iterator[None]:
        """
        Context with every module in train mode. Afterwards, each module is in its earlier mode again.

        bitsandbytes needs train mode: in eval mode, it packs 4-bit weights on a CPU for an inference kernel, whose
        gradients are wrong. Train mode changes nothing else, because the student has no dropout.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.train()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def effective_weight(self, parameters: dict[str, Tensor], name: str) -> Tensor:
        """
        A weight of the base model with its adapters merged, differentiable in `parameters`.

        Args:
            parameters (`dict[str, torch.Tensor]`):
                Trainable parameters, see `unflatten`.
            name (`str`):
                The weight's name in the base model, e.g. `"lm_head.weight"`.

        Raises:
            `ValueError`: If the model has no such weight (the message lists similar names), or its adapter is not
            plain LoRA.
        """
        return self.run(parameters, lambda model: effective_weight(model, name))

    # -- 4-bit ------------------------------------------------------------------------------------------------------

    def verify_quantization(self) -> None:
        """
        Check the gradients of all 4-bit layers, see [`check_4bit_gradients`].

        This is done once, and again if bitsandbytes has repacked a layer.

        Raises:
            `ValueError`: If a layer disagrees with its dequantised weight.
        """
        layers = bnb_modules(self.model, "Linear4bit")
        if not self._quantization_verified or any(map(is_packed_for_cpu, layers.values())):
            check_4bit_gradients(layers, self.device)
            self._quantization_verified = True

    # -- text -------------------------------------------------------------------------------------------------------

    def tokenize(
        self,
        examples: Examples,
        max_length: int,
        add_eos: bool = True,
        return_ends: bool = False,
        truncation_side: str = "right",
    ) -> list[TokenizedExample]:
        """
        Token ids and labels of samples, as [`~trl.SFTTrainer`] would train on them.

        Args:
            examples (`list[str]`, `list[dict]` or [`~datasets.Dataset`]):
                Strings, or rows with `"text"` (loss on all of it), `"prompt"` and `"completion"` (loss on the
                completion), `"messages"` (through the chat template), or `"input_ids"` with optional `"labels"`.
                Prompts and completions may be conversational. Empty texts and completions give samples without
                supervised tokens.
            max_length (`int`):
                Longest sample, in tokens. Samples that are longer than this or than the model's positions are cut off.
            add_eos (`bool`, *optional*, defaults to `True`):
                Whether to end texts and completions with the eos token, as SFT does. Not used with chat templates.
            return_ends (`bool`, *optional*, defaults to `False`):
                Also return the end of each token in the text or completion. For messages, the text is their joined
                contents. The ends are `None` for samples that are token ids, and with a slow tokenizer.
            truncation_side (`str`, *optional*, defaults to `"right"`):
                `"right"` cuts off the end of long samples, `"left"` the beginning.
        """
        reader = SampleReader(
            self.processing_class,
            vocab_size=self.model.get_input_embeddings().weight.shape[0],
            max_positions=getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
        )
        return reader.read(examples, max_length, add_eos, return_ends, truncation_side)

    def collate(self, examples: Sequence[TokenizedExample]) -> Batch:
        """Right-pad samples to the longest and put them on the student's device."""
        return collate(examples, self.pad_token_id, self.device)
