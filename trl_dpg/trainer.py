"""`DPGTrainer`: GRPO whose reward is the effect of the completions, as training data, on a metric."""

import json
import os
import textwrap
from collections.abc import Callable
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from .callbacks import TUNING_NAME, DPGLoggingCallback, PhaseTimer
from .config import DPGConfig
from .files import check_links
from .generation import keep_one_input_hook
from .guards import GuardCallback
from .provenance import show_in_card
from .restart import RestartCallback
from .reward import DPGReward
from .reward_arguments import scorer_arguments
from .rollouts import RolloutWriter
from .student import Examples, FinetunedStudent, Student


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = logging.get_logger(__name__)

SHORT_RUN = 200
"""Up to this number of steps, GRPO's default learning rate gets a warning."""
OF_THE_REWARD = (
    "cross_group_batching",
    "num_generations",
    "train_on",
    "verify_steps",
    "student_text",
    "unfinished_thoughts",
    "chat_template_kwargs",
    "student_device",
    "student_offload",
    "metric_samples",
    "student_aggregation",
)
"""Fields of [`DPGConfig`] that are arguments of [`DPGReward`]."""


class DPGTrainer(GRPOTrainer):
    """
    Trainer for Dataset Policy Gradients (Thrush et al., arXiv 2604.08423).

    Trains a generator by GRPO to write data that raises a metric of the student fine-tuned on it. The changes with
    respect to [`~trl.GRPOTrainer`] are:

    - the reward [`DPGReward`], which comes before any other `reward_funcs`;
    - `_calculate_rewards`, which tells the reward whether this is an evaluation, sets its number of generations,
      switches its verification off in evaluation, takes the time, and keeps the rollouts with `save_rollouts`;
    - `create_model_card`, which adds metric, student and inner loop;
    - a [`RestartCallback`], which keeps what a restart at any save needs, and checks it;
    - a [`DPGLoggingCallback`], which logs samples, scores and pictures;
    - a [`PhaseTimer`], which logs the seconds of generation, reward and update;
    - a [`GuardCallback`], which warns of a training that no longer learns.

    Everything else (generation, advantages, loss, scalars) is inherited.

    In evaluation, a student is fine-tuned on the completions of each evaluation batch. The figures are logged under
    `eval_dpg/`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The generator.
        student (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`Student`], *optional*):
            The model that is fine-tuned on the completions; `args.student_model_name_or_path` when `None`. Or a list
            of several, see [`DPGReward`]; `args.student_models` when `None`.
        target_metric (`Callable`):
            Φ: maps a [`FinetunedStudent`] to a scalar tensor, higher is better. See `trl_dpg.metrics`.
        args ([`DPGConfig`], *optional*):
            Configuration of generator, student and inner loop.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prompts, as for GRPO.
        reward_funcs (*optional*):
            Rewards in addition to that of DPG. `args.reward_weights` then starts with the weight of DPG's reward. If
            there is one weight less, as in a script for GRPO, DPG's weight is 1. Rewards of environments come last,
            with weight 1.
        student_peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters of the student; overrides the `student_lora_*` arguments.
        student_quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            4-bit quantisation of a student loaded from a path; overrides the `student_bnb_*` arguments.
        student_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer; loaded from its path when `None`.
        replay_dataset ([`~datasets.Dataset`] or `list`, *optional*):
            Rows that are mixed into the student's data and never scored; loaded from `args.replay_dataset` when
            `None`. Their number is `args.replay_ratio` for each completion. See [`~trl_dpg.replay.Replay`].
        reward_processing_classes (*optional*):
            Tokenizers of the `reward_funcs`, as for GRPO. The first may be `None`, for DPG's reward.
        kwargs:
            All further arguments of [`~trl.GRPOTrainer`].

    Attributes:
        dpg_reward ([`DPGReward`]): The reward.
        restart ([`RestartCallback`]): Keeps and checks what a restart needs.
        fresh_students (`dict[str, dict]`): Figures of fresh students, by the generator's state, for the model card.

    Raises:
        `ValueError`:
            If the student or the metric is missing, if the metric is not callable, if the number of `reward_weights`
            or `reward_processing_classes` is wrong, if `args` is not a [`DPGConfig`], if student and generator share
            parameters, or if there are fewer prompts than a generation batch needs.
    """

    _tag_names = ["trl", "dpg"]
    _name = "DPG"
    _paper = {
        "title": "Synthetic Data for any Differentiable Target",
        "id": "2604.08423",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{thrush2026synthetic,
                title   = {{Synthetic Data for any Differentiable Target}},
                author  = {Tristan Thrush and Sung Min Park and Herman Brunborg and Luke Bailey and Marcel Roed and
                           Neil Band and Christopher Potts and Tatsunori Hashimoto},
                year    = 2026,
                eprint  = {arXiv:2604.08423},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        student: "str | PreTrainedModel | PeftModel | Student | list | None" = None,
        target_metric: Callable[[FinetunedStudent], Tensor] | None = None,
        args: DPGConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        reward_funcs=None,
        *,
        student_peft_config: "PeftConfig | None" = None,
        student_quantization_config: "BitsAndBytesConfig | None" = None,
        student_processing_class: PreTrainedTokenizerBase | None = None,
        replay_dataset: Examples | None = None,
        reward_processing_classes=None,
        **kwargs,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else model.config._name_or_path
            args = DPGConfig(f"{model_name.split('/')[-1]}-DPG")
        _advise_on_learning_rate(args)
        _check_folder_and_prompts(args, train_dataset)
        of_the_student = student_processing_class, student_peft_config, student_quantization_config
        scorer = scorer_arguments(args, model, student, target_metric, replay_dataset, of_the_student)
        further = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        args = _with_reward_weights(args, len(further))
        self.fresh_students: dict[str, dict] = {}
        self.dpg_reward = DPGReward(
            **scorer,
            tuning_file=Path(args.output_dir) / TUNING_NAME,
            **{name: vars(args)[name] for name in OF_THE_REWARD},
        )

        super().__init__(
            model=model,
            reward_funcs=[self.dpg_reward, *further],
            args=args,
            train_dataset=train_dataset,
            reward_processing_classes=_with_reward_processing_classes(reward_processing_classes, len(further)),
            **kwargs,
        )
        keep_one_input_hook(self.model)
        self.dpg_reward.processing_class = self._tokenizer
        self.restart = RestartCallback.add_to(self, args.accept_changed_setup)
        # After the trackers' own callbacks, so that these have started their runs before
        tensorboard = [c for c in self.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]
        self.add_callback(DPGLoggingCallback(self.dpg_reward, args.num_logged_samples, *tensorboard))
        self.phases, self.rollouts = PhaseTimer(self._metrics["train"]), RolloutWriter(args.output_dir)
        for callback in (self.phases, GuardCallback(), *[self.rollouts] * args.save_rollouts):
            self.add_callback(callback)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.dpg_reward.choice.training = self.model.training
        self.dpg_reward.num_generations = self.num_generations if self.model.training else self.num_generations_eval
        self.dpg_reward.verify_steps = self.args.verify_steps if self.model.training else 0
        with self.phases.rewarding():
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            if self.args.save_rollouts and self.model.training:
                self._keep_rollouts(prompts, completions, rewards)
        return rewards

    def _keep_rollouts(self, prompts, completions, rewards: Tensor) -> None:
        """Write this process's rollouts. `rewards` `[N, F]` are those of all processes, of each reward function."""
        first = self.accelerator.process_index * len(prompts)
        mine = slice(first, first + len(prompts))
        scores = self.dpg_reward.last_batch.scores[mine].tolist()  # type: ignore[union-attr]  # it was called just now
        by_name = dict(zip(self.reward_func_names, rewards[mine].T.tolist(), strict=True))
        self.rollouts.write(self.state.global_step + 1, prompts, completions, scores, by_name)

    def _results(self) -> list[tuple[str, float, float]]:
        """The metric, its proxies and verifications, each with its first and its last value in the logs."""
        apart = ("dpg/score/", "dpg/student_loss/", "dpg/seconds", "dpg/num_", "dpg/predicted", "dpg/thinking")
        logged: dict[str, list[float]] = {}
        for logs in self.state.log_history:
            for name, value in logs.items():
                if name.startswith("dpg/") and not name.startswith(apart):
                    logged.setdefault(name.removeprefix("dpg/"), []).append(value)
        return [(name, values[0], values[-1]) for name, values in logged.items()]

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ):
        """
        TRL's model card, and what the generator was trained for: metric, student and inner loop.

        The model is called as its output folder if `model_name` is not given. Models and datasets that are local files
        are not linked to the Hub.
        """
        name = model_name or Path(self.args.hub_model_id or self.args.output_dir).name
        super().create_model_card(name, dataset_name if _is_on_the_hub(dataset_name) else None, tags)
        if not self.is_world_process_zero():
            return
        path = os.path.join(self.args.output_dir, "README.md")
        card = ModelCard.load(path)
        base = Path(self.model.config._name_or_path).name
        card.text = card.text.replace("[None](https://huggingface.co/None)", f"`{base}`" if base else "a local model")
        card.text = card.text.replace('model="None"', f'model="{name}"')
        card.text += "\n" + textwrap.dedent("""
            ## Dataset Policy Gradients

            This generator was trained to write data that raises a metric of a student fine-tuned on it.

            - Target metric: `{metric}`
            - Student: {student}
            - Inner loop:

            ```json
            {inner_loop}
            ```

            | in training | first step | last step |
            |---|---|---|
            {results}
            """).format(
            **self.dpg_reward.described(),
            inner_loop=json.dumps(asdict(self.dpg_reward.inner_loop_config), indent=2),
            results="\n".join(f"| {name} | {first:.5g} | {last:.5g} |" for name, first, last in self._results()),
        )
        if self.fresh_students:
            states = list(self.fresh_students)
            first, *_ = self.fresh_students.values()
            rows = [
                [name, *(f"{figures[name]:.5g}" for figures in self.fresh_students.values())]
                for name, value in first.items()
                if isinstance(value, float)
            ]
            table = [["fresh students on texts of the", *(f"{state} generator" for state in states)]]
            table += [["---"] * (1 + len(states)), *rows]
            card.text += "\n" + "".join(f"| {' | '.join(row)} |\n" for row in table)
        card.save(path)
        show_in_card(self.args.output_dir)


def _is_on_the_hub(dataset_name: str | None) -> bool:
    """Whether the name is an id of the Hub, and not that of a file or folder."""
    if dataset_name is None or os.path.exists(dataset_name):
        return False
    try:
        validate_repo_id(dataset_name)
    except HFValidationError:
        return False
    return True


def _advise_on_learning_rate(args) -> None:
    """Warn if a short run has GRPO's own learning rate. AdamW moves a weight by about this rate in a step."""
    rate = args.learning_rate
    if 0 < args.max_steps <= SHORT_RUN and rate == GRPOConfig.learning_rate:
        logger.warning(
            f"`learning_rate` is GRPO's default of {rate:g}. In {args.max_steps} steps it moves no weight of the "
            f"generator by more than about {args.max_steps * rate:g}, which changes next to nothing. For up to "
            f"{SHORT_RUN} steps, the recipes use 1e-3 to 2e-3: small models in full, SmolLM2-135M by LoRA."
        )


def _with_reward_weights(args: DPGConfig, num_further: int) -> DPGConfig:
    """The arguments with a weight for each reward: DPG's, then those of the further ones."""
    if args.reward_weights is None or len(args.reward_weights) == 1 + num_further:
        return args
    args = copy(args)
    args.reward_weights = _for_all_rewards("reward_weights", args.reward_weights, num_further, own=1.0)  # type: ignore[arg-type]
    return args


def _with_reward_processing_classes(classes, num_further: int) -> list | None:
    """The tokenizers with one for each reward: none for DPG's, then those of the further ones."""
    if classes is None:
        return None
    classes = classes if isinstance(classes, list) else [classes]
    return _for_all_rewards("reward_processing_classes", classes, num_further, own=None)


def _for_all_rewards(name: str, values: list, num_further: int, own) -> list:
    """A value for each reward, with DPG's `own` in front if it was left out."""
    if len(values) == 1 + num_further:
        return list(values)
    if len(values) != num_further:
        raise ValueError(
            f"`{name}` has {len(values)} {name.rpartition('_')[2]} for {1 + num_further} rewards: DPG's comes first, "
            f"then those of the {num_further} `reward_funcs`, and the number must match. Without DPG's, which is then "
            f"{own}, give {num_further}."
        )
    return [own, *values]


def _check_folder_and_prompts(args: DPGConfig, train_dataset) -> None:
    if not isinstance(args, DPGConfig):
        raise ValueError(
            f"`args` must be a DPGConfig (a GRPOConfig with the student's fields), got {type(args).__name__}."
        )
    check_links(args.output_dir)
    num_prompts = args.generation_batch_size // args.num_generations
    number = num_prompts
    if isinstance(train_dataset, Dataset):
        number = len(train_dataset)
    elif isinstance(train_dataset, IterableDataset):
        number = sum(1 for _ in train_dataset.take(num_prompts))  # a stream that is too short would end without a step
    if number < num_prompts:
        raise ValueError(
            f"train_dataset has {number} rows, but a generation batch takes {num_prompts} prompts "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}), "
            "so there would be no step. Use more prompts, or raise num_generations."
        )
