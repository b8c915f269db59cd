"""The student: a causal LM that is fine-tuned, read and put back, without its stored weights ever being written."""

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_bitsandbytes_available
from trl.models.utils import disable_gradient_checkpointing

from .alignment import ends_from_offsets, message_text, translate
from .cross_entropy import linear_cross_entropy


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig


Examples: TypeAlias = Dataset | Sequence[str] | Sequence[Mapping[str, Any]]


class TokenizedExample(NamedTuple):
    """
    Token ids of one sample, its labels (-100 where no loss is taken), as many, and whether it was cut off.

    `ends` `[L]`, if asked for, is where each token ends in the sample's text, or its completion's, see `alignment`.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    ends: np.ndarray | None = None

    @property
    def num_supervised(self) -> int:
        """Number of tokens a causal LM is trained to predict: labels past the first position."""
        return sum(label != -100 for label in self.labels[1:])


class Batch(NamedTuple):
    """
    Right-padded samples on the student's device.

    Attributes:
        input_ids (`torch.Tensor` of shape `[B, L]`): Token ids.
        attention_mask (`torch.Tensor` of shape `[B, L]` or `None`): `None` when nothing is padded.
        labels (`torch.Tensor` of shape `[n]`): Ids of the n supervised tokens, sample after sample.
        targets (`torch.Tensor` of shape `[n]`): Where they stand in the flattened `input_ids`.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    targets: Tensor


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
            _disable_dropout(model)
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
            _disable_dropout(model)

        self.model = model
        self.processing_class = processing_class
        self._check_model()
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

    def _check_model(self):
        active = _active_dropout(self.model)
        if active:
            name, value = next(iter(active.items()))
            raise ValueError(
                f"The student has active dropout ({name} = {value}, {len(active)} in all). The two sweeps would see "
                "different networks. Load the model with its dropout at 0 (and `lora_dropout=0.0`), or pass "
                "`disable_dropout=True`."
            )
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer) and any(module.use_dora.values()):
                raise ValueError(
                    f"The student's adapter at {name!r} is DoRA, whose norm PEFT detaches in the forward pass: its "
                    "second derivative, and so every score, would be wrong. Use plain LoRA (`use_dora=False`)."
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
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if _bnb_modules(self.model, "Linear8bitLt"):
            raise ValueError(
                "The student's base is quantised to 8 bits; only 4-bit bases are supported (`load_in_4bit`)."
            )
        if _bnb_modules(self.model, "Linear4bit") and not is_peft_model(self.model):
            raise ValueError(
                "The student's base is quantised but has no adapters, and quantised weights cannot be trained. Pass a "
                "`peft_config` (e.g. `LoraConfig(r=16, target_modules='all-linear')`)."
            )
        if not trainable:
            raise ValueError(
                "The student has no trainable parameters: none has `requires_grad=True`. Pass a `peft_config`, load "
                "the adapter with `is_trainable=True`, or set `requires_grad` on what the fine-tuning should train."
            )
        devices = {p.device for p in self.model.parameters()}
        if len(devices) > 1:
            raise ValueError(
                f"The student is spread over {sorted(map(str, devices))}. It must lie on one device: load it without "
                '`device_map="auto"`.'
            )

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
        base = ", 4-bit base" if _bnb_modules(self.model, "Linear4bit") else ""
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
        [`~trl_dpg.cross_entropy.linear_cross_entropy`]. Any other head, or one whose logits the model processes
        further (soft-capping), gives all of them at once.

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
        if self._head_comes_last is not False and head is not None and _is_linear_head(head):
            with _standing_aside(head) as seen:
                hidden = model(**arguments).logits
            if self._head_comes_last is None:  # the first time
                self._head_comes_last = len(seen) == 1 and hidden is seen[0]
        else:
            self._head_comes_last = False
        if self._head_comes_last:
            inputs, weights, bias = _factors(head, hidden.flatten(0, 1)[batch.targets - 1])
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

    @contextmanager
    def block_checkpointing(self, enable: bool, kernels: Callable[[], AbstractContextManager]) -> Iterator[None]:
        """
        Blocks keep their inputs only and are run again in the backward pass (Chen et al., arXiv 1604.06174).

        Args:
            enable (`bool`): Do so for every block; otherwise for those whose gradient checkpointing is on already.
            kernels (`Callable`): Makes the context that a block runs in, each time.
        """

        def run(function, *args):
            def within(*args):
                with kernels():
                    return function(*args)

            return checkpoint(within, *args, use_reentrant=False, preserve_rng_state=False)  # no dropout

        blocks = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        blocks = [block for block in blocks if enable or block.gradient_checkpointing]
        names = ("gradient_checkpointing", "_gradient_checkpointing_func")
        own = [{name: value for name, value in vars(block).items() if name in names} for block in blocks]
        for block in blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = run
        try:
            yield
        finally:
            for block, values in zip(blocks, own, strict=True):
                for name in names:
                    delattr(block, name)
                vars(block).update(values)

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
        base, saved = self.model, ".modules_to_save."
        if is_peft_model(self.model):
            base, saved = self.model.get_base_model(), f".modules_to_save.{self.model.active_adapter}."
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

        def merged(_):
            module, _, attribute = weights[name].rpartition(".")
            weight = getattr(base.get_submodule(module), attribute)
            if type(weight).__name__ == "Params4bit":
                weight = dequantize_bnb_weight(weight)
            layer = base.get_submodule(module.removesuffix(".base_layer"))
            if isinstance(layer, BaseTunerLayer):
                if not isinstance(layer, LoraLayer) or any(layer.lora_bias.values()):
                    raise ValueError(
                        f"{name!r} has an adapter that is not plain LoRA, so its merged weight is not known here."
                    )
                for adapter in layer.active_adapters if name.endswith(".weight") else ():
                    weight = weight + layer.get_delta_weight(adapter)
            return weight

        return self.run(parameters, merged)

    # -- 4-bit ------------------------------------------------------------------------------------------------------

    def verify_quantization(self) -> None:
        """
        Compare the gradient of every 4-bit layer with that of its dequantised weight; done once, unless one was
        repacked.

        Raises:
            `ValueError`:
                If they differ by more than rounding (relative L2 above 1e-3 for float32 compute, 2e-2 for half
                precision), as bitsandbytes' packed CPU inference kernel does.
        """
        layers = _bnb_modules(self.model, "Linear4bit")
        packed = any(vars(layer.weight.quant_state).get("packing_format_for_cpu", False) for layer in layers.values())
        if self._quantization_verified and not packed:
            return
        generator = torch.Generator().manual_seed(0)
        for name, layer in layers.items():
            shape = layer.weight.quant_state.shape
            dtype = layer.compute_dtype or torch.float32
            x = torch.randn(4, shape[1], generator=generator).to(self.device, dtype).requires_grad_()
            y_bar = torch.randn(4, shape[0], generator=generator).to(self.device, dtype)
            y = layer(x)
            error = torch.inf  # the inference kernel gives no gradient at all
            if y.requires_grad:
                (gradient,) = torch.autograd.grad(y, x, y_bar)
                expected = y_bar.float() @ dequantize_bnb_weight(layer.weight).float()
                error = ((gradient.float() - expected).norm() / expected.norm()).item()
            if error > (1e-3 if dtype == torch.float32 else 2e-2):
                raise ValueError(
                    f"The 4-bit layer {name!r} disagrees with its own dequantised weight (relative error of its "
                    f"gradient {error:.2g}). bitsandbytes repacks a layer for CPU inference when it runs in eval "
                    "mode, for good: load the student anew and do not run it in eval mode before training it."
                )
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
        if isinstance(examples, str):
            raise ValueError("The samples are one string; pass a list of them.")
        rows = [{"text": example} if isinstance(example, str) else example for example in examples]
        if self.processing_class is not None and all(set(row) == {"text"} for row in rows):
            tokenized = self._tokenize_texts([row["text"] for row in rows], add_eos, return_ends)
        else:
            tokenized = [self._tokenize_row(row, add_eos, return_ends) for row in rows]
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        largest = max((max(example.input_ids, default=0) for example in tokenized), default=0)
        if largest >= vocab_size:
            raise ValueError(
                f"Token id {largest} does not exist in the student, whose vocabulary has {vocab_size} entries. Pass "
                "the student's own tokenizer as `processing_class`; the samples' token ids must be the student's."
            )
        max_length = min(
            max_length, getattr(self.model.config.get_text_config(), "max_position_embeddings", max_length)
        )
        kept = slice(max_length) if truncation_side == "right" else slice(-max_length, None)
        return [
            TokenizedExample(
                example.input_ids[kept],
                example.labels[kept],
                truncated=len(example.input_ids) > max_length,
                ends=None if example.ends is None else example.ends[kept],
            )
            for example in tokenized
        ]

    def _tokenize_row(self, row: Mapping[str, Any], add_eos: bool, return_ends: bool) -> TokenizedExample:
        if "input_ids" in row:
            input_ids = list(row["input_ids"])
            labels = list(row["labels"]) if row.get("labels") is not None else input_ids
            if len(labels) != len(input_ids):
                raise ValueError(f"A sample has {len(input_ids)} `input_ids` but {len(labels)} `labels`.")
            return TokenizedExample(input_ids, labels)
        tokenizer = self.processing_class
        if tokenizer is None:
            raise ValueError(
                "The student has no tokenizer, so samples must be token ids (`input_ids`). Pass `processing_class`."
            )
        offsets = self._offsets(return_ends)

        def chat(messages):
            kwargs = {"tokenizer_kwargs": offsets} if offsets else {}
            return tokenizer.apply_chat_template(messages, return_dict=True, **kwargs)

        if "messages" in row:
            encoded = chat(row["messages"])
            return TokenizedExample(encoded["input_ids"], encoded["input_ids"], ends=self._ends(row, encoded))
        if "prompt" in row and "completion" in row:
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str):
                prompt_ids = tokenizer(prompt)["input_ids"]
                ended = self._ended(completion, add_eos) if completion else ""
                encoded = tokenizer(prompt + ended, **offsets)
            else:
                prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
                encoded = chat(prompt + completion)
                completion = "".join(message_text(message) for message in completion)
            if not completion:
                ends = np.zeros(len(prompt_ids)) if offsets else None
                return TokenizedExample(prompt_ids, [-100] * len(prompt_ids), ends=ends)
            input_ids = encoded["input_ids"]
            # Tokens may merge across the boundary: the completion starts where the two tokenisations part.
            pairs = zip(prompt_ids, input_ids, strict=False)
            start = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(prompt_ids), len(input_ids)))
            return TokenizedExample(input_ids, [-100] * start + input_ids[start:], ends=self._ends(row, encoded))
        if "text" in row:
            return self._tokenize_texts([row["text"]], add_eos, return_ends)[0]
        raise ValueError(
            f"A sample has the columns {sorted(row)}; expected `text`, `prompt` and `completion`, `messages`, or "
            "`input_ids`."
        )

    def _tokenize_texts(self, texts: Sequence[str], add_eos: bool, return_ends: bool) -> list[TokenizedExample]:
        """Plain texts, which fast tokenizers read much faster together."""
        offsets = self._offsets(return_ends)
        empty = TokenizedExample([], [], ends=np.zeros(0) if offsets else None)
        full = [text for text in texts if text]
        if not full:
            return [empty] * len(texts)
        encoded = self.processing_class([self._ended(text, add_eos) for text in full], **offsets)  # type: ignore
        ids = iter(encoded["input_ids"])
        ends: Iterator[np.ndarray | None] = repeat(None)
        if offsets:
            # Without the eos token's own characters
            ends = (
                np.minimum(ends_from_offsets(spans), len(text))
                for spans, text in zip(encoded["offset_mapping"], full, strict=True)
            )
        return [TokenizedExample(own := next(ids), own, ends=next(ends)) if text else empty for text in texts]

    def _ended(self, text: str, add_eos: bool) -> str:
        eos = self.processing_class.eos_token  # type: ignore[union-attr]
        return text + eos if add_eos and eos is not None and not text.endswith(eos) else text

    def _offsets(self, return_ends: bool) -> dict[str, bool]:
        """Arguments for a tokenizer's call; a slow one does not know the tokens' places."""
        return {"return_offsets_mapping": True} if return_ends and self.processing_class.is_fast else {}  # type: ignore

    def _ends(self, row: Mapping[str, Any], encoded: Mapping[str, Any]) -> np.ndarray | None:
        """Where the tokens of a row end in its text or completion; `None` if their offsets were not asked for."""
        if "offset_mapping" not in encoded:
            return None
        render = partial(self.processing_class.apply_chat_template, tokenize=False)  # type: ignore[union-attr]
        start = 0
        if "messages" in row:
            text, contents = render(row["messages"]), [message_text(message) for message in row["messages"]]
        else:
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str):
                text, contents, start = prompt + completion, [completion], len(prompt)
            else:
                text, contents = render(prompt + completion), [message_text(message) for message in completion]
                start = len(commonprefix([render(prompt, add_generation_prompt=True), text]))  # noqa: RUF071
        return translate(ends_from_offsets(encoded["offset_mapping"]), text, contents, start)

    def collate(self, examples: Sequence[TokenizedExample]) -> Batch:
        """Right-pad samples to the longest and put them on the student's device."""
        length = max(len(example.input_ids) for example in examples)

        def padded(rows, value):
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        input_ids = padded([example.input_ids for example in examples], self.pad_token_id)
        mask = padded([[1] * len(example.input_ids) for example in examples], 0)
        labels = padded([example.labels for example in examples], -100)
        labels[:, 0] = -100  # nothing precedes the first token
        targets = (labels.flatten() != -100).nonzero().squeeze(1)
        return Batch(
            input_ids.to(self.device),
            None if mask.all() else mask.to(self.device),
            labels.flatten()[targets].to(self.device),
            targets.to(self.device),
        )


class FinetunedStudent:
    """
    What a target metric receives: the student under its fine-tuned weights `θ_T`, differentiable in them.

    Calling it runs the model: `student(input_ids=..., attention_mask=..., labels=...)` returns the model's output.
    Valid while the metric runs.

    Attributes:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        theta (`torch.Tensor` of shape `[P]`):
            The fine-tuned trainable parameters, flat.
        parameters (`dict[str, torch.Tensor]`):
            The same by name: views of `theta`.
    """

    def __init__(self, student: Student, theta: Tensor, initial_theta: Tensor):
        self.student = student
        self.theta = theta
        self.parameters = student.unflatten(theta)
        self._initial_theta = initial_theta
        self.processing_class = student.processing_class

    @property
    def device(self) -> torch.device:
        return self.student.device

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """Run the model under `θ_T`, on its device; arguments and output are the model's own."""
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        kwargs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in kwargs.items()
        }
        return self.student.run(self.parameters, lambda model: model(**kwargs, use_cache=False))

    @torch.no_grad()
    def generate(self, prompt: str, max_new_tokens: int = 64) -> str:
        """What the student writes greedily after a prompt, which may be empty."""
        tokenizer: Any = self.processing_class
        ids = tokenizer(prompt)["input_ids"] or [
            tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ]
        inputs = torch.tensor([ids], device=self.device)
        # In train mode, layers with gradient checkpointing are given no past
        with self.student.train_mode(), disable_gradient_checkpointing(self.student.model):
            output = self.student.run(
                self.parameters,
                lambda model: model.generate(  # type: ignore[operator]
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self.student.pad_token_id,
                ),
            )
        return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)

    def weight(self, name: str) -> Tensor:
        """The weight `name` (base and adapters merged) after fine-tuning, see [`Student.effective_weight`]."""
        return self.student.effective_weight(self.student.unflatten(self.theta, cast=False), name)

    def initial_weight(self, name: str) -> Tensor:
        """The effective weight `name` before fine-tuning, detached."""
        with torch.no_grad():
            return self.student.effective_weight(self.student.unflatten(self._initial_theta, cast=False), name)

    def evaluate(self, metric: "Callable[[FinetunedStudent], Tensor]") -> tuple[Tensor, Tensor | None]:
        """
        Φ and, where gradients are enabled and there is one, ∇Φ in `theta`, of shape `[P]`.

        The weights are in place for the backward pass as well: gradient checkpointing runs the model in it again.
        """

        def value_and_gradient(_):
            value = metric(self)
            if not isinstance(value, Tensor) or not value.requires_grad or value.numel() != 1:
                return value, None
            return value.detach(), torch.autograd.grad(value, self.theta, allow_unused=True)[0]

        return self.student.run(self.parameters, value_and_gradient)

    def accumulate(self, function: Callable[[Any], Tensor], batches: Iterable[Any]) -> Tensor:
        """
        `Σ_b function(b)` over batches, differentiable (once) in `theta`, in the memory of one batch.

        Each batch's gradient is taken at once and its graph freed, so that a benchmark of any size fits.

        Args:
            function (`Callable`):
                Maps a batch to a scalar tensor that depends on this student.
            batches (`Iterable`):
                Its arguments.
        """
        value, gradient = self.theta.new_zeros(()), None
        for batch in batches:
            part = function(batch)
            if part.requires_grad:
                (part_gradient,) = torch.autograd.grad(part, self.theta)
                gradient = part_gradient if gradient is None else gradient + part_gradient
            value = value + part.detach()
        return value if gradient is None else _WithGradient.apply(self.theta, value, gradient)


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient in `theta` was computed already."""

    @staticmethod
    def forward(ctx, theta, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, value_bar):
        (gradient,) = ctx.saved_tensors
        return value_bar.to(gradient.dtype) * gradient, None, None


def _bnb_modules(model: nn.Module, class_name: str) -> dict[str, Any]:
    """The bitsandbytes modules of a class (`"Linear4bit"`, `"Linear8bitLt"`) by name."""
    if not is_bitsandbytes_available():
        return {}
    import bitsandbytes as bnb

    kind = {"Linear4bit": bnb.nn.Linear4bit, "Linear8bitLt": bnb.nn.Linear8bitLt}[class_name]
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@contextmanager
def _standing_aside(head: nn.Module) -> Iterator[list[Tensor]]:
    """The head hands its input on as it is; the inputs are collected in a list."""
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
    """The module behind a head that PEFT trains a copy of (`modules_to_save`), as its `forward` chooses it."""
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    adapter = head.active_adapters[0]
    if head.disable_adapters or adapter not in head.modules_to_save:
        return head.original_module
    return head.modules_to_save[adapter]


def _is_linear_head(head: Any) -> bool:
    """Whether it computes Σ_j X_j W_jᵀ + b with the factors of `_factors`."""
    head = _trained_copy(head)
    if not isinstance(head, LoraLayer):
        return type(head) is nn.Linear
    plain = not (head.merged or head.lora_variant or any(head.lora_bias.values()))
    return plain and type(head.base_layer) is nn.Linear


def _factors(head: Any, hidden: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
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


def _is_reentrant(module: nn.Module) -> bool:
    return vars(module)["_gradient_checkpointing_func"].keywords.get("use_reentrant", False)


def _dropout_attributes(module: nn.Module) -> list[str]:
    """Names of a module's attributes that hold a dropout probability (`attention_dropout`, an `nn.Dropout`'s `p`)."""
    if isinstance(module, nn.Dropout):
        return ["p"]
    return [key for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]


def _active_dropout(model: nn.Module) -> dict[str, float]:
    return {
        f"{name}.{key}".lstrip("."): vars(module)[key]
        for name, module in model.named_modules()
        for key in _dropout_attributes(module)
        if vars(module)[key] > 0
    }


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for key in _dropout_attributes(module):
            setattr(module, key, 0.0)
