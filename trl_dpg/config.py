"""`DPGConfig`: the arguments of GRPO and those of the student, in one flat dataclass."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers.utils import logging
from trl import GRPOConfig

from .redaction import redacted
from .sampling import check_sampling, warn_of_truncation
from .score_client import MAX_WAIT
from .student.placement import Placement
from .student_arguments import StudentArguments as StudentArguments
from .student_text import StudentText


logger = logging.get_logger(__name__)


@dataclass
class DPGConfig(StudentArguments, GRPOConfig):
    r"""
    Configuration class for the [`DPGTrainer`].

    This class includes only the parameters that are specific to Dataset Policy Gradients: those of
    [`StudentArguments`] and the ones below. The parameters of [`~trl.GRPOConfig`] configure the generator. All fields
    are flat, so that [`~trl.TrlParser`] can read them from YAML and the command line.

    Parameters:
        > Parameters that control the reward

        cross_group_batching (`bool`, *optional*, defaults to `True`):
            Whether to fine-tune one student on all completions of a generation batch. If `False`, `num_generations`
            students are fine-tuned, each on one completion of every prompt.
        train_on (`str`, *optional*, defaults to `"completion"`):
            What the student is fine-tuned on: `"completion"` or `"prompt_completion"`, see [`DPGReward`].
        student_text (`str`, *optional*, defaults to `"answer"`):
            What the student reads of a completion of a thinking generator: `"answer"` (what stands outside the
            reasoning), `"reasoning"` or `"all"`. A completion without reasoning is all answer.
        unfinished_thoughts (`str`, *optional*, defaults to `"empty"`):
            What the student reads of a completion whose reasoning has no end: nothing (`"empty"`), or the whole
            completion (`"as_is"`).
        verify_steps (`int`, *optional*, defaults to `0`):
            Reward steps between two verifications. The first reward step is always verified; `0`: none is. A
            verification fine-tunes the student 12 more times with changed data weights. It logs how well the scores
            predict the metric's change, as `dpg/verify/pearson` and `dpg/verify/spearman`.
        metric_samples (`int`, *optional*):
            Texts of the metric that are drawn at random for each reward step. All of them when `None`, and always in
            evaluation.

        > Parameters that control where the student is

        student_server (`str`, *optional*):
            Address of a `trl-dpg serve`, e.g. `"http://127.0.0.1:8000"`. Student, metric and inner loop are then those
            of the server, and the [`DPGTrainer`] takes no `student` and no `target_metric`. The token is in the
            environment variable `TRL_DPG_SERVER_TOKEN`.
        student_server_max_wait (`float`, *optional*, defaults to `3600.0`):
            Seconds to wait for a server that does not answer.
        student_offload (`bool`, *optional*, defaults to `False`):
            Whether the student's weights are in host memory between reward steps, so that generation and update have
            the GPU for themselves.

        > Parameters that control a restart

        accept_changed_setup (`bool`, *optional*, defaults to `False`):
            Whether to go on, with a warning, from a checkpoint that is not whole or that belongs to another set-up
            (other student, metric, inner loop, data or number of processes). By default both are refused, see
            [`RestartCallback`].

        > Parameters that control the logging

        num_logged_samples (`int`, *optional*, defaults to `8`):
            Number of samples to log with their scores: half of them with the highest scores, half with the lowest.
            `0`: none. See [`DPGLoggingCallback`].
        save_rollouts (`bool`, *optional*, defaults to `False`):
            Whether to keep every rollout (prompts, completions, scores, step) in `<output_dir>/rollouts`, see
            [`~trl_dpg.rollouts.RolloutWriter`].
    """

    _argument_group_name: ClassVar[str] = "generator (GRPO), student and reward"

    cross_group_batching: bool = field(
        default=True,
        metadata={
            "help": "One student on all completions. If false, `num_generations` students on one of each prompt."
        },
    )
    train_on: str = field(
        default="completion",
        metadata={"help": "What the student is trained on: 'completion' or 'prompt_completion'."},
    )
    student_text: str = field(
        default="answer",
        metadata={"help": "What the student reads of a thinking generator's text: 'answer', 'reasoning' or 'all'."},
    )
    unfinished_thoughts: str = field(
        default="empty",
        metadata={"help": "What it reads of a text whose reasoning has no end: 'empty' (nothing) or 'as_is'."},
    )
    verify_steps: int = field(
        default=0,
        metadata={"help": "Reward steps between two checks of how well scores predict the metric's change; 0: none."},
    )
    metric_samples: int | None = field(
        default=None, metadata={"help": "Texts of the metric to draw for each reward step; all of them by default."}
    )
    student_offload: bool = field(
        default=False,
        metadata={"help": "Keep the student in host memory between reward steps, while the generator has the GPU."},
    )
    student_server: str | None = field(
        default=None, metadata={"help": "Address of a `trl-dpg serve`, whose student and inner loop are used."}
    )
    student_server_max_wait: float = field(
        default=MAX_WAIT, metadata={"help": "Seconds to wait for a student's server that does not answer."}
    )
    accept_changed_setup: bool = field(
        default=False,
        metadata={"help": "Go on from a checkpoint even if it is not whole, or if the set-up has changed since."},
    )
    num_logged_samples: int = field(
        default=8, metadata={"help": "Samples with the highest and lowest scores to log; 0 for none."}
    )

    save_rollouts: bool = field(
        default=False, metadata={"help": "Keep all prompts, completions and scores, as Parquet files in `rollouts`."}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True  # so that TRL's defaults work on a CPU
        GRPOConfig.__post_init__(self)
        StudentArguments.__post_init__(self)
        if self.train_on not in ("completion", "prompt_completion"):
            raise ValueError(f"Unknown train_on {self.train_on!r}. Choose 'completion' or 'prompt_completion'.")
        check_sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            warn_of_truncation(self.top_p, self.top_k, self.min_p, self.repetition_penalty)
        Placement(self.student_device, self.student_offload)  # raises if they cannot be combined
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, got {self.max_steps}.")
        StudentText(self.student_text, self.unfinished_thoughts)  # raises if a choice is unknown
        for name in ("verify_steps", "num_logged_samples"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name} must not be negative, got {vars(self)[name]}.")
        if self.student_server is not None and self.world_size > 1 and self.student_server_max_wait > self.ddp_timeout:
            logger.warning(
                f"The first process waits for the server up to {self.student_server_max_wait:g} s "
                f"(`student_server_max_wait`), but the other processes wait for the first only {self.ddp_timeout} s "
                "(`ddp_timeout`). Raise `ddp_timeout` above it."
            )
        if self.metric_samples is not None and self.metric_samples < 1:
            raise ValueError(f"metric_samples must be at least 1, got {self.metric_samples}.")
        size = self.generation_batch_size
        if not self.cross_group_batching:
            size //= self.num_generations
        if size % self.student_batch_size:
            raise ValueError(
                f"student_batch_size ({self.student_batch_size}) must divide the {size} samples the student is "
                "trained on in each reward step (generation_batch_size, divided by num_generations without "
                "cross_group_batching)."
            )

    def to_dict(self):
        # transformers hides the values of names that end with "_token", because it assumes that they are secret
        return redacted(super().to_dict() | {"per_token": self.per_token})
