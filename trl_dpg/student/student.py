"""The student: a causal LM that is fine-tuned, read and put back, without its stored weights ever being written."""

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
from transformers.integrations import is_deepspeed_zero3_enabled

from ..kernels.cross_entropy import linear_cross_entropy
from .checks import bnb_modules, check_4bit_gradients, check_model, is_packed_for_cpu, switch_off_dropout
from .effective_weight import effective_weight
from .head import is_linear_head, linear_factors, standing_aside
from .tokenization import Batch, Examples, SampleReader, TokenizedExample, collate


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig


class _Scope(nn.Module):
    """Lets `torch.func.functional_call` hold other weights in place for the length of any function."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function):
        return function(self.model)


@dataclass
class _Layout:
    """Where each trainable parameter lies in the flat vector."""

    names: list[str]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]


class Student:
    """
    The model that is fine-tuned on the generated data (the paper's "target model"; Thrush et al., arXiv 2604.08423).

    Trained in full, by LoRA, or by LoRA over a 4-bit base. Its weights are the fixed start of every fine-tuning: they
    are only ever read, so they are bit for bit the same afterwards, also when something raises.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student at its start. A path or Hub id is loaded in float32 (see `model_init_kwargs`) with its dropout
            switched off. A loaded model is used as it is, on the device where it lies.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's own tokenizer. Loaded from the model's path when `None`; a model without a path may go
            without one if every sample is given as token ids.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains adapters only. Without it, what has `requires_grad` is trained.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantises the base to 4 bits while it is loaded from a path or Hub id.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`] for a path or Hub id.
        disable_dropout (`bool`, *optional*, defaults to `False`):
            Sets every dropout probability of a given model to zero, instead of refusing it.

    Raises:
        `ValueError`:
            If nothing is trainable, dropout is active, the tokenizer has neither a pad nor an eos token, the base is
            quantised without adapters or to 8 bits, an adapter is DoRA or merged, gradient checkpointing is
            reentrant, or the model lies on several devices.
    """

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: "PeftConfig | None" = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        model_init_kwargs: dict[str, Any] | None = None,
        disable_dropout: bool = False,
    ):
        if isinstance(model, str):
            if is_deepspeed_zero3_enabled():
                raise ValueError(
                    f"DeepSpeed ZeRO-3 would shard the student while it is loaded from {model!r}. Use ZeRO-2, or "
                    "load the student before the training arguments are made and pass the model."
                )
            device = PartialState().device
            init_kwargs = {"dtype": torch.float32, "device_map": {"": device}, **(model_init_kwargs or {})}
            if quantization_config is not None:
                init_kwargs["quantization_config"] = quantization_config
            model = AutoModelForCausalLM.from_pretrained(model, **init_kwargs)
            switch_off_dropout(model)
        elif quantization_config is not None or model_init_kwargs is not None:
            raise ValueError(
                f"`quantization_config` and `model_init_kwargs` apply while a model is loaded, but the student is an "
                f"already loaded {type(model).__name__}. Pass its path or Hub id instead."
            )
        if processing_class is None and model.config._name_or_path:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        if peft_config is not None:
            if is_peft_model(model):
                raise ValueError(
                    "The student is a `PeftModel` already and `peft_config` asks for another adapter. Pass one or "
                    "the other."
                )
            # A copy: PEFT writes the resolved target modules into it
            model = get_peft_model(model, copy.deepcopy(peft_config))
        if disable_dropout:
            switch_off_dropout(model)

        self.model = model
        self.processing_class = processing_class
        check_model(model)
        self.pad_token_id = self._resolve_pad_token_id()
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._layout = _Layout(
            names=list(trainable),
            shapes=[p.shape for p in trainable.values()],
            dtypes=[p.dtype for p in trainable.values()],
        )
        self._scope = _Scope(model)
        self._quantization_verified = False
        self._head_comes_last: bool | None = None  # not yet known

    def _resolve_pad_token_id(self) -> int:
        if self.processing_class is None:
            return 0
        if self.processing_class.pad_token_id is not None:
            return self.processing_class.pad_token_id
        if self.processing_class.eos_token_id is not None:
            return self.processing_class.eos_token_id
        raise ValueError(
            f"The student's tokenizer ({type(self.processing_class).__name__}) has neither a pad nor an eos token. "
            "Set `processing_class.pad_token` (any token will do, it is masked)."
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Student":
        """Move the model, values unchanged."""
        self.model.to(device)
        return self

    def describe(self) -> str:
        """One line for a model card: name, size, what is trained, how it is stored."""
        trainable = sum(shape.numel() for shape in self._layout.shapes)
        name = self.model.config._name_or_path or type(self.model).__name__
        base = ", 4-bit base" if bnb_modules(self.model, "Linear4bit") else ""
        adapters = " (adapters)" if is_peft_model(self.model) else ""
        return f"`{name}`, {trainable:,} trainable parameters{adapters}{base}"

    # -- weights ----------------------------------------------------------------------------------------------------

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """float32, or float64 if the trainable parameters are; half-precision ones are trained as float32 copies."""
        return torch.float64 if torch.float64 in self._layout.dtypes else torch.float32

    @property
    def trains_half_precision(self) -> bool:
        """Whether a trainable parameter is stored in 16 bits."""
        return any(dtype.itemsize < 4 for dtype in self._layout.dtypes)

    def initial_theta(self) -> Tensor:
        """The trainable parameters at their start as one flat vector `[P]` in `accumulator_dtype`, detached."""
        parameters = [p.detach().flatten() for p in self.model.parameters() if p.requires_grad]
        return torch.cat([p.to(self.accumulator_dtype) for p in parameters])

    def unflatten(self, theta: Tensor, cast: bool = True) -> dict[str, Tensor]:
        """Views of a flat vector `[P]` by name, in the parameters' shapes and (with `cast`) dtypes; differentiable."""
        parts = theta.split([shape.numel() for shape in self._layout.shapes])
        parts = [part.view(shape) for part, shape in zip(parts, self._layout.shapes, strict=True)]
        return self.cast(parts) if cast else dict(zip(self._layout.names, parts, strict=True))

    def cast(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """One tensor for each trainable parameter, by name and in the parameter's dtype; differentiable."""
        layout = zip(self._layout.names, parts, self._layout.dtypes, strict=True)
        return {name: part.to(dtype) for name, part, dtype in layout}

    def run(self, parameters: dict[str, Tensor], function: Callable[[nn.Module], Any]) -> Any:
        """Call `function(model)` while `parameters` (see `unflatten`) stand in for the stored ones."""
        parameters = {f"model.{name}": value for name, value in parameters.items()}
        return torch.func.functional_call(self._scope, parameters, (function,))

    def loss(
        self,
        model: Any,
        batch: Batch,
        loss_weights: Tensor,
        through_theta: bool = True,
        skip_values: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """
        Weighted cross-entropy of a batch's supervised tokens, in nats.

        Logits of a plain linear head, with LoRA or without, are computed a chunk of tokens at a time, see
        [`~trl_dpg.kernels.cross_entropy.linear_cross_entropy`]. Any other head, or one whose logits the model
        processes further (soft-capping), gives all of them at once.

        Args:
            model (`torch.nn.Module`): What [`Student.run`] hands out.
            batch (`Batch`): The samples, with n supervised tokens.
            loss_weights (`torch.Tensor` of shape `[n]`): Weight of each token's loss, in `accumulator_dtype`.
            through_theta (`bool`): See `linear_cross_entropy`.
            skip_values (`bool`): See `linear_cross_entropy`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Their weighted sum, and each token's loss, `[n]`, detached.
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
            return linear_cross_entropy(inputs, weights, bias, batch.labels, loss_weights, through_theta, skip_values)
        logits = model(**arguments).logits.flatten(0, 1)[batch.targets - 1]
        losses = F.cross_entropy(logits.to(loss_weights.dtype), batch.labels, reduction="none")
        return torch.dot(loss_weights, losses), losses.detach()

    @contextmanager
    def train_mode(self) -> Iterator[None]:
        """
        Every module in train mode, and back to its own mode afterwards.

        There is no dropout to switch on. bitsandbytes needs it: in eval mode its CPU path packs 4-bit weights for an
        inference kernel whose gradients are wrong.
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
            `ValueError`: If the model has no such weight (the message lists near names), or its adapter is not plain
            LoRA.
        """
        return self.run(parameters, lambda model: effective_weight(model, name))

    # -- 4-bit ------------------------------------------------------------------------------------------------------

    def verify_quantization(self) -> None:
        """
        Check the gradients of all 4-bit layers, see [`check_4bit_gradients`]; done once, unless one was repacked.

        Raises:
            `ValueError`: If one disagrees with its dequantised weight.
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
                Longer samples are cut off, and so are those longer than the model's positions.
            add_eos (`bool`, *optional*, defaults to `True`):
                Ends texts and completions with the eos token, as SFT does. Chat templates bring their own.
            return_ends (`bool`, *optional*, defaults to `False`):
                Also return where each token ends in the text or completion (of messages: in their joined contents).
                `None` for samples that are token ids, and with a slow tokenizer, which does not know.
            truncation_side (`str`, *optional*, defaults to `"right"`):
                Where they are cut off: at the end, or with `"left"` at the beginning.
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
