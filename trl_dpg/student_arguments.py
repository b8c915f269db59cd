"""`StudentArguments`: the student and its fine-tuning, in one flat dataclass that all commands share."""

import json
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from peft import LoraConfig
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, set_seed

from .metagradients import InnerLoopConfig
from .replay import Replay, check_ratio, load_rows
from .several_students import check_aggregation, student_names
from .student import Student
from .student.head import head_names
from .student.placement import Placement


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    NumberOrAuto = float | str
else:

    def NumberOrAuto(text):  # a type for the parser
        """The number that a text stands for. Other texts are checked by [`InnerLoopConfig`]."""
        try:
            return float(text)
        except ValueError:
            return text


@dataclass
class StudentArguments:
    r"""
    Arguments for the student and its fine-tuning, flat for [`~trl.TrlParser`]. All commands share them.

    Parameters:
        > Parameters that control the student

        student_model_name_or_path (`str`, *optional*):
            Path or Hub id of the student, used when the `student` argument of the [`DPGTrainer`] is `None`.
        student_models (`list[str]`, *optional*):
            Paths or Hub ids of several students, in the place of `student_model_name_or_path`. All have the same
            settings, and each reads texts by its own tokenizer.
        student_aggregation (`str`, *optional*, defaults to `"mean"`):
            The score of a sample by several students, each one's scores divided by their standard deviation: their
            `"mean"`, or the lowest (`"worst"`).
        student_model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`] for the student.
        student_device (`str`, *optional*, defaults to `"auto"`):
            Where the student is fine-tuned: on the process's own device (`"auto"`), on `"cpu"`, or on a device such as
            `"cuda:1"`.
        student_load_in_4bit (`bool`, *optional*, defaults to `False`):
            Load the student's base in 4 bits (bitsandbytes). Needs `student_use_peft`.
        student_bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`):
            4-bit format of the student's base: `"nf4"` or `"fp4"`.
        student_bnb_4bit_compute_dtype (`str`, *optional*, defaults to `"float32"`):
            Type in which the 4-bit layers compute. `"bfloat16"` is faster on GPUs, but its scores are less accurate.
        student_use_bnb_nested_quant (`bool`, *optional*, defaults to `False`):
            Quantise the quantisation constants, too.
        student_bnb_4bit_skip_modules (`list[str]`, *optional*):
            Modules of the base that are not quantised, e.g. `["v_proj", "down_proj"]`. The head never is.
        student_use_peft (`bool`, *optional*, defaults to `False`):
            Train LoRA adapters instead of all parameters.
        student_lora_r (`int`, *optional*, defaults to `16`):
            Rank of LoRA.
        student_lora_alpha (`int`, *optional*, defaults to `32`):
            Alpha of LoRA.
        student_lora_target_modules (`list[str]`, *optional*):
            Modules that get adapters. All linear layers when `None`.

        > Parameters that control the inner loop (the student's fine-tuning), see [`InnerLoopConfig`]

        student_optimizer (`str`, *optional*, defaults to `"adamw"`):
            `"adamw"` or `"sgd"`.
        student_learning_rate (`float` or `str`, *optional*, defaults to `1e-4`):
            Peak learning rate. `"auto"`: chosen on the first batch, see [`~trl_dpg.tuning.tune`].
        student_adam_beta1 (`float`, *optional*, defaults to `0.9`):
            AdamW's decay rate of the first moment.
        student_adam_beta2 (`float`, *optional*, defaults to `0.95`):
            AdamW's decay rate of the second moment.
        student_adam_epsilon (`float`, *optional*, defaults to `1e-8`):
            AdamW's epsilon outside the square root.
        student_eps_root (`float` or `str`, *optional*, defaults to `1e-9`):
            AdamW's epsilon inside the square root. It makes training smooth in the data weights. `"auto"`: chosen on
            the first batch.
        student_weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay.
        student_momentum (`float`, *optional*, defaults to `0.0`):
            SGD's momentum.
        student_max_grad_norm (`float`, *optional*):
            Largest norm of a step's gradient. Larger gradients are clipped.
        student_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning-rate schedule, a name of [`~transformers.SchedulerType`].
        student_warmup_steps (`int`, *optional*, defaults to `0`):
            Steps of warm-up.
        student_batch_size (`int`, *optional*, defaults to `8`):
            Samples per optimizer step of the student. It must divide the number of samples on which a student is
            fine-tuned: `generation_batch_size`, divided by `num_generations` if `cross_group_batching` is `False`.
            Replayed rows come in addition.
        student_micro_batch_size (`int`, *optional*):
            Samples per forward pass of the student. A smaller value saves memory.
        student_memory_budget (`str`, *optional*, defaults to `"auto"`):
            Bytes for graphs that are kept from the forward sweep, or `"auto"`. With `"0"`, all graphs are computed
            again.
        student_gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether the student's blocks keep only their inputs and run again in each backward pass. This saves memory
            in the forward sweep.
        student_checkpoint_interval (`str`, *optional*, defaults to `"auto"`):
            Steps between the student's states that are kept, or `"auto"`. `"1"` keeps every state.
        student_offload_trajectory (`bool`, *optional*, defaults to `False`):
            Whether to keep these states in pinned host memory.
        student_hvp (`str`, *optional*, defaults to `"double_backward"`):
            Method for Hessian-vector products: `"double_backward"`, or `"finite_difference"` for kernels that are not
            twice differentiable.
        student_num_epochs (`int`, *optional*, defaults to `1`):
            Passes over the dataset.
        student_shuffle (`bool`, *optional*, defaults to `False`):
            Whether to shuffle the samples before every epoch.
        student_max_length (`int`, *optional*, defaults to `1024`):
            Longest sample, in tokens. Longer samples are cut off.
        student_loss_normalization (`str`, *optional*, defaults to `"example_tokens"`):
            Normalisation of the loss: `"example_tokens"`, `"max_length"` or `"batch_tokens"`.
        replay_dataset (`str`, *optional*):
            Rows that are mixed into the student's data and never scored: a Hub id, or a file (json, jsonl, parquet,
            csv, txt). See [`~trl_dpg.replay.Replay`].
        replay_split (`str`, *optional*, defaults to `"train"`):
            Their split.
        replay_ratio (`float`, *optional*, defaults to `0.25`):
            Replayed rows for each sample. Each batch has `replay_ratio` times `student_batch_size` of them, rounded.

        attribution (`str`, *optional*, defaults to `"metagradient"`):
            `"metagradient"`; `"first_order"`, an approximation that costs less with several steps; or `"dataset"` for
            the paper's naive baseline.
        per_token (`bool`, *optional*, defaults to `False`):
            Also score each of the generator's tokens. The scores are in `trainer.dpg_reward.last_token_scores`, and in
            the column `dpg_token_scores` of the table of completions.
        seed (`int`, *optional*, defaults to `42`):
            Seed of all random choices.
    """

    _argument_group_name: ClassVar[str] = "student and its fine-tuning"

    student_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Path or Hub id of the student, the model that is fine-tuned on the completions."},
    )
    student_models: list[str] | None = field(
        default=None, metadata={"help": "Paths or Hub ids of several students, in the place of the one."}
    )
    student_aggregation: str = field(
        default="mean",
        metadata={"help": "A sample's score by several students on unit scale: their 'mean', or the lowest, 'worst'."},
    )
    student_model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for the student."}
    )
    student_device: str = field(
        default="auto",
        metadata={"help": "Where the student is fine-tuned: 'auto' (the process's device), 'cpu', or e.g. 'cuda:1'."},
    )
    student_load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the student's base in 4 bits (bitsandbytes). Needs `student_use_peft`."}
    )
    student_bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "4-bit format of the student's base: 'nf4' or 'fp4'."}
    )
    student_bnb_4bit_compute_dtype: str = field(
        default="float32", metadata={"help": "Type in which the student's 4-bit layers compute."}
    )
    student_use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the student's quantisation constants, too."}
    )
    student_bnb_4bit_skip_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules of the student that are not quantised, e.g. v_proj down_proj."}
    )
    student_use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters of the student instead of all its parameters."}
    )
    student_lora_r: int = field(default=16, metadata={"help": "LoRA rank of the student."})
    student_lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha of the student."})
    student_lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules of the student that get adapters; all linear layers by default."}
    )
    student_optimizer: str = field(default="adamw", metadata={"help": "The student's optimizer: 'adamw' or 'sgd'."})
    student_learning_rate: NumberOrAuto = field(
        default=1e-4, metadata={"help": "The student's peak learning rate; 'auto': the first batch chooses it."}
    )
    student_adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's decay rate of the first moment."})
    student_adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's decay rate of the second moment."})
    student_adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon outside the square root."})
    student_eps_root: NumberOrAuto = field(
        default=1e-9,
        metadata={
            "help": "AdamW's epsilon inside the square root; makes training smooth in the data weights. 'auto': the "
            "first batch chooses it."
        },
    )
    student_weight_decay: float = field(default=0.0, metadata={"help": "The student's weight decay."})
    student_momentum: float = field(default=0.0, metadata={"help": "Momentum of the student's SGD."})
    student_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Largest norm of the student's gradients. Larger gradients are clipped."}
    )
    student_lr_scheduler_type: str = field(
        default="constant", metadata={"help": "The student's learning-rate schedule, as named in transformers."}
    )
    student_warmup_steps: int = field(default=0, metadata={"help": "Warm-up steps of the student's schedule."})
    student_batch_size: int = field(default=8, metadata={"help": "Samples per optimizer step of the student."})
    student_micro_batch_size: int | None = field(
        default=None, metadata={"help": "Samples per forward pass of the student; fewer save memory."}
    )
    student_memory_budget: str = field(
        default="auto", metadata={"help": "Bytes for graphs that the student's forward sweep keeps, or 'auto'."}
    )
    student_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Run the student's blocks again in each backward pass, to save memory."}
    )
    student_checkpoint_interval: str = field(
        default="auto", metadata={"help": "Steps between the student's states that are kept, or 'auto'."}
    )
    student_offload_trajectory: bool = field(
        default=False, metadata={"help": "Keep the student's states in pinned host memory."}
    )
    student_hvp: str = field(
        default="double_backward",
        metadata={"help": "'double_backward', or 'finite_difference' for kernels that are not twice differentiable."},
    )
    student_num_epochs: int = field(default=1, metadata={"help": "The student's passes over the dataset."})
    student_shuffle: bool = field(
        default=False, metadata={"help": "Shuffle the samples before every epoch of the student."}
    )
    student_max_length: int = field(
        default=1024, metadata={"help": "Longest sample, in the student's tokens. Longer samples are cut off."}
    )
    student_loss_normalization: str = field(
        default="example_tokens",
        metadata={"help": "The student's loss: 'example_tokens', 'max_length' or 'batch_tokens'."},
    )
    replay_dataset: str | None = field(
        default=None, metadata={"help": "Rows mixed into the student's data and never scored: a file or Hub id."}
    )
    replay_split: str = field(default="train", metadata={"help": "Split of the replayed rows."})
    replay_ratio: float = field(default=0.25, metadata={"help": "Replayed rows for each sample, e.g. 0.25: 2 to 8."})
    attribution: str = field(
        default="metagradient",
        metadata={"help": "'metagradient', 'first_order' (cheaper, not exact), or 'dataset' (all get the metric)."},
    )
    per_token: bool = field(default=False, metadata={"help": "Also score each of the generator's tokens."})
    seed: int = field(default=42, metadata={"help": "Seed of all random choices."})

    def __post_init__(self):
        if isinstance(self.student_model_init_kwargs, str):
            try:
                self.student_model_init_kwargs = json.loads(self.student_model_init_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"student_model_init_kwargs must be JSON, got {self.student_model_init_kwargs!r} ({error})."
                ) from error
        try:
            self.inner_loop_config()
        except ValueError as error:
            raise ValueError(f"The student's fine-tuning (arguments `student_...`): {error}") from error
        Placement(self.student_device)  # raises if it is no device
        check_aggregation(self.student_aggregation)
        check_ratio(self.replay_ratio)
        if self.student_models is not None and not self.student_models:
            raise ValueError("student_models is empty. Give paths or Hub ids of students, or leave it out.")
        if self.replay_dataset is not None:
            Replay([""], self.replay_ratio).widened(self.inner_loop_config())  # raises if no row comes to a batch
        if self.student_lora_r < 1:
            raise ValueError(f"student_lora_r must be at least 1, got {self.student_lora_r}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")
        if self.student_load_in_4bit and not self.student_use_peft:
            raise ValueError(
                "student_load_in_4bit needs student_use_peft, because quantised weights cannot be trained."
            )

    def inner_loop_config(self) -> InnerLoopConfig:
        """The student's fine-tuning as [`InnerLoopConfig`]."""
        return InnerLoopConfig(
            optimizer=self.student_optimizer,
            learning_rate=self.student_learning_rate,
            betas=(self.student_adam_beta1, self.student_adam_beta2),
            eps=self.student_adam_epsilon,
            eps_root=self.student_eps_root,
            weight_decay=self.student_weight_decay,
            momentum=self.student_momentum,
            batch_size=self.student_batch_size,
            num_epochs=self.student_num_epochs,
            shuffle=self.student_shuffle,
            seed=self.seed,
            micro_batch_size=self.student_micro_batch_size,
            max_length=self.student_max_length,
            loss_normalization=self.student_loss_normalization,
            attribution=self.attribution,
            per_token=self.per_token,
            max_grad_norm=self.student_max_grad_norm,
            lr_scheduler_type=self.student_lr_scheduler_type,
            warmup_steps=self.student_warmup_steps,
            gradient_checkpointing=self.student_gradient_checkpointing,
            memory_budget=_number_or_word(self.student_memory_budget),
            checkpoint_interval=_number_or_word(self.student_checkpoint_interval),
            offload_trajectory=self.student_offload_trajectory,
            hvp=self.student_hvp,
        )

    def each_student(self) -> "dict[str, Self]":
        """These arguments for each student alone, by the student's name. Those of one student have no other name."""
        paths: list[str | None] = list(self.student_models or [])
        paths = paths or [self.student_model_name_or_path]
        alone = [copy(self) for _ in paths]
        for own, path in zip(alone, paths, strict=True):
            own.student_model_name_or_path, own.student_models = path, None
        return dict(zip(student_names([path or "" for path in paths]), alone, strict=True))

    def replay(self) -> Replay | None:
        """The replayed rows, or `None` if there are none."""
        if self.replay_dataset is None:
            return None
        return Replay(load_rows(self.replay_dataset, self.replay_split), self.replay_ratio, self.seed)

    def set_numbers(self, config: InnerLoopConfig) -> None:
        """Replace what is `"auto"` by the numbers of a configuration."""
        for name in self.inner_loop_config().auto:
            setattr(self, f"student_{name}", getattr(config, name))

    def student_peft_config(self) -> LoraConfig | None:
        """The configuration of the student's adapters, or `None` if all parameters are trained."""
        if not self.student_use_peft:
            return None
        return LoraConfig(
            r=self.student_lora_r,
            lora_alpha=self.student_lora_alpha,
            target_modules=self.student_lora_target_modules or "all-linear",
            task_type="CAUSAL_LM",
        )

    def student_quantization_config(self, model: object = None) -> BitsAndBytesConfig | None:
        """The configuration of a student's 4-bit quantisation, or `None`. `model` is as in `load_student`."""
        if not self.student_load_in_4bit:
            return None
        skipped, model = self.student_bnb_4bit_skip_modules, model or self.student_model_name_or_path
        if skipped is not None and isinstance(model, str):
            # With a list, transformers quantises all else, also the head
            skipped = [*skipped, *head_names(model, self.student_model_init_kwargs)]  # type: ignore[arg-type]
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skipped,
            bnb_4bit_quant_type=self.student_bnb_4bit_quant_type,
            bnb_4bit_compute_dtype=self.student_bnb_4bit_compute_dtype,
            bnb_4bit_use_double_quant=self.student_use_bnb_nested_quant,
        )

    def load_student(
        self,
        model: "str | PreTrainedModel | PeftModel | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: "PeftConfig | None" = None,
        quantization_config: BitsAndBytesConfig | None = None,
    ) -> Student:
        """Load the student. Arguments that are given override the fields of this configuration."""
        set_seed(self.seed)  # the initial adapters are random
        model = model or self.student_model_name_or_path
        return Student(
            model,  # type: ignore[arg-type]
            processing_class=processing_class,
            peft_config=peft_config or self.student_peft_config(),
            quantization_config=quantization_config or self.student_quantization_config(model),
            model_init_kwargs=self.student_model_init_kwargs,  # type: ignore[arg-type]  # a dict once parsed
            device=Placement(self.student_device).where() if isinstance(model, str) else None,
        )


def _number_or_word(value: int | str) -> int | str:
    return int(value) if str(value).isdecimal() else value
