"""The reward of a completion: its effect on the target metric when a student is trained on it."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .metagradients import InnerLoopConfig
from .metagradients.config import NotFiniteError
from .metagradients.fine_tuning import FineTuning
from .metagradients.metagradient import differentiate
from .metagradients.out_of_memory import size_that_fits
from .metrics.base import metric_name
from .ranks import from_all_ranks
from .scored_batch import Sample, ScoredBatch, ScoredDataset, split_prompts
from .student import FinetunedStudent, Student
from .student_text import StudentText, Text, thinking_figures
from .text import completion_text, message_text
from .token_alignment import TokenBytes, hand_over
from .tuning import Choice, Tuning, check_scores
from .verification import predicted_and_actual, random_signs


Message = dict[str, Any]
T = TypeVar("T")
NUM_VERIFIED = 6
"""Directions in which a verification changes the data weights. Each takes two fine-tunings of the student."""


class DPGReward:
    """
    A TRL reward function: the metagradient of each completion (Thrush et al., arXiv 2604.08423).

    The completions of one generation batch, from all ranks, are a dataset. A fresh student is fine-tuned on it, and
    the reward of completion i is ∂Φ/∂w_i, divided by the standard deviation over the batch. The reward works in
    [`~trl.GRPOTrainer`] and [`~trl.RLOOTrainer`] without changes.

    The division is needed because raw metagradients have sizes from 1e-9 to 1e-3, and TRL divides rewards by their
    standard deviation plus 1e-4. The raw scores are logged, too.

    Args:
        student (`Student`):
            The student before fine-tuning. It is moved to the trainer's device at the first call.
        metric (`Callable`):
            Φ: maps a [`FinetunedStudent`] to a scalar tensor, higher is better.
        inner_loop_config (`InnerLoopConfig`, *optional*):
            How the student is fine-tuned, and how its metric is attributed to the samples. What is `"auto"` in it is
            chosen at the first call by [`~trl_dpg.tuning.tune`], on the first dataset, while the other ranks wait.
        cross_group_batching (`bool`, *optional*, defaults to `True`):
            Whether all completions are one dataset. If `False`, there are `num_generations` datasets with one
            completion of each prompt. A student is fine-tuned on each, and each rank scores a part of the datasets.
        num_generations (`int`, *optional*):
            Completions per prompt, as in the trainer's configuration. Needed without `cross_group_batching`.
        train_on (`str`, *optional*, defaults to `"completion"`):
            `"completion"`: the student is trained on the completion's text alone. `"prompt_completion"`: on the
            completion given its prompt (with the student's chat template for conversations).
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The generator's tokenizer. Needed for the scores of its tokens (`per_token=True`). [`DPGTrainer`] sets it.
        verify_steps (`int`, *optional*, defaults to `0`):
            Calls between two verifications; `0`: none. The first call is always verified. It is logged how well the
            scores of the (first) dataset predict the metric's change when the data weights change, as
            `dpg/verify/pearson` and `dpg/verify/spearman`; see `trl_dpg.verification`.
        student_text (`str`, *optional*, defaults to `"answer"`), unfinished_thoughts (`str`, *optional*, defaults to
            `"empty"`), chat_template_kwargs (`dict`, *optional*):
            What the student reads of a thinking generator's completions, see [`~trl_dpg.student_text.StudentText`].
            With `processing_class`, the generator's way to mark its reasoning is known.
        tuning_file (`str` or `Path`, *optional*):
            Where the choice of the `"auto"` values is written, with its evidence. If it is there for the same set-up,
            nothing is chosen anew. [`DPGTrainer`] sets it to `<output_dir>/tune.json`.

    Attributes:
        tuning ([`~trl_dpg.tuning.Tuning`] or `None`):
            The choice of the `"auto"` values, after the first call.
        choice ([`~trl_dpg.tuning.Choice`]):
            Makes the choice. [`DPGTrainer`] tells it when its calls are evaluations.
        last_token_scores (`list[torch.Tensor]` or `None`):
            With `per_token=True`, the raw scores of the tokens of this rank's completions in the last call. Each
            completion has a tensor as long as its `completion_ids`, whose sum is the completion's raw score.
        last_batch (`ScoredBatch` or `None`):
            Texts, raw scores and the metric's readout of the last call, from all ranks.

    Raises:
        `ValueError`:
            If an option is unknown, or if the student's tokenizer is slow and `per_token=True`. With the naive
            baseline (`attribution="dataset"`), also if `cross_group_batching`, `per_token` or `verify_steps` is set:
            it has one reward for a whole dataset, and no scores of samples or tokens. Nor can it choose an `"auto"`.
    """

    def __init__(
        self,
        student: Student,
        metric: Callable[[FinetunedStudent], Tensor],
        inner_loop_config: InnerLoopConfig | None = None,
        cross_group_batching: bool = True,
        num_generations: int | None = None,
        train_on: str = "completion",
        processing_class: PreTrainedTokenizerBase | None = None,
        verify_steps: int = 0,
        tuning_file: str | Path | None = None,
        student_text: str = "answer",
        unfinished_thoughts: str = "empty",
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        if train_on not in ("completion", "prompt_completion"):
            raise ValueError(f"Unknown train_on {train_on!r}. Choose 'completion' or 'prompt_completion'.")
        if not callable(metric):
            raise ValueError(
                f"The metric must be a callable from the fine-tuned student to a scalar tensor, got {metric!r}."
            )
        if student.processing_class is None:
            raise ValueError(
                "The student has no tokenizer to read completions with. Pass `processing_class` to Student."
            )
        inner_loop_config = inner_loop_config or InnerLoopConfig()
        _check_combination(student, inner_loop_config, cross_group_batching, num_generations, verify_steps)
        check_scores(inner_loop_config)
        self.student_text = StudentText(student_text, unfinished_thoughts, chat_template_kwargs=chat_template_kwargs)
        self.__name__ = "dpg"  # the reward's name in TRL's logs
        self.student = student
        self.metric = metric
        self.inner_loop_config = inner_loop_config
        self.cross_group_batching = cross_group_batching
        self.num_generations = num_generations
        self.train_on = train_on
        self.processing_class = processing_class
        self.verify_steps = verify_steps
        self.choice = Choice(tuning_file)
        self.last_token_scores: list[Tensor] | None = None
        self.last_batch: ScoredBatch | None = None
        self._token_bytes: TokenBytes | None = None
        self._step: int | None = None  # of the trainer
        self._num_verifiable = 0  # calls with verify_steps > 0
        # Student, the memory and versions of its weights, and metric; and the metric's value there
        self._start: tuple[tuple, float] | None = None

    def __call__(
        self,
        prompts: list[Text],
        completions: list[Text],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        completion_ids: list[list[int]] | None = None,
        **kwargs,
    ) -> list[float]:
        """
        Score a batch. The trainer calls this on every rank, with the rank's completions.

        Args:
            prompts (`list`): This rank's prompts.
            completions (`list`): This rank's completions, texts or messages. Those of one prompt are consecutive.
            log_metric (`Callable`, *optional*): TRL's function that logs scalars. Used for those under `dpg/`.
            log_extra (`Callable`, *optional*): TRL's function that adds columns to the table of completions.
            completion_ids (`list[list[int]]`, *optional*): The generator's token ids, needed with `per_token=True`.

        Returns:
            `list[float]`:
                A reward for each of this rank's completions. The standard deviation over all ranks is 1. All rewards
                are 0 if all scores are equal.
        """
        started = time.perf_counter()
        parts = from_all_ranks(lambda: self._samples(prompts, completions, completion_ids), "The DPG reward")
        samples = [sample for part in parts for sample in part]
        groups = None if self.cross_group_batching else self.num_generations
        places = split_prompts([sample.prompt for sample in samples], groups)  # an error here is raised on all ranks
        datasets = [[samples[place] for place in own] for own in places]
        batch = self.student, [sample.example for sample in datasets[0]], self.metric
        self.inner_loop_config = self.choice.make(*batch, self.inner_loop_config, self._move_student)
        self._step = kwargs["trainer_state"].global_step + 1 if "trainer_state" in kwargs else None
        shares = from_all_ranks(lambda: self._score(datasets), "The DPG reward")
        everyones = {index: dataset for share in shares for index, dataset in share.items()}
        scored = [everyones[index] for index in range(len(datasets))]
        self.last_batch = self._batch(samples, places, scored)

        raw = self.last_batch.scores
        scale = raw.std(correction=0)
        equal = scale <= 1e-6 * raw.abs().max()  # the differences are only rounding errors
        rewards = torch.zeros_like(raw) if equal else raw / scale
        start = sum(len(part) for part in parts[: PartialState().process_index])
        mine = slice(start, start + len(completions))
        if self.last_batch.token_scores is not None:
            self.last_token_scores = self.last_batch.token_scores[mine]
        if log_metric is not None:
            figures = self._figures(raw, scored) | thinking_figures([sample.reading for sample in samples])
            for name, value in figures.items():
                log_metric(f"dpg/{name}", value)
            log_metric("dpg/seconds", time.perf_counter() - started)
        if log_extra is not None:
            log_extra("dpg_score", raw[mine].tolist())
            if self.last_token_scores is not None:
                log_extra("dpg_token_scores", [scores.tolist() for scores in self.last_token_scores])
        return rewards[mine].tolist()

    @property
    def tuning(self) -> Tuning | None:
        return self.choice.tuning

    def begin_training(self, resumed: bool) -> None:
        """Take the choice of the `"auto"` values from the file, or remove it before a new one. On all ranks."""
        self.inner_loop_config = self.choice.begin(self.student, self.metric, self.inner_loop_config, resumed)

    def _move_student(self) -> None:
        """Move the student to the trainer's device."""
        here, there = self.student.device, PartialState().device
        if here.type != there.type or (there.type == "cuda" and there.index not in (None, here.index)):
            self.student.to(there)

    def _samples(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]] | None
    ) -> list[Sample]:
        """The samples of this rank's completions."""
        ids: list[list[int]] = [[]] * len(completions)
        if self.inner_loop_config.per_token:
            if self.processing_class is None or completion_ids is None:
                raise ValueError(
                    "The scores of the generator's tokens (per_token=True) need its tokenizer and its token ids. Pass "
                    "the trainer's `processing_class` to DPGReward, and `completion_ids` to its calls, as TRL does."
                )
            ids = completion_ids
        reader = replace(self.student_text, tokenizer=self.processing_class)
        readings = reader.read(prompts, completions, completion_ids)
        return [
            Sample(prompt, reading, self._example(prompt, reading.completion), own)
            for prompt, reading, own in zip(prompts, readings, ids, strict=True)
        ]

    def _example(self, prompt: Text, completion: Text) -> Any:
        if self.train_on == "prompt_completion":
            return {"prompt": prompt, "completion": completion}
        return completion_text(completion)

    def _score(self, datasets: list[list[Sample]]) -> dict[int, ScoredDataset]:
        """Score this rank's part of the datasets. The results are by index of the dataset."""
        state = PartialState()
        due = self.verify_steps > 0 and self._num_verifiable % self.verify_steps == 0
        self._num_verifiable += self.verify_steps > 0
        self._move_student()
        mine = range(state.process_index, len(datasets), state.num_processes)
        return {index: self._score_dataset(datasets[index], verify=due and index == 0) for index in mine}

    def _score_dataset(self, samples: list[Sample], verify: bool) -> ScoredDataset:
        fine_tuning = FineTuning(self.student, [sample.example for sample in samples], self.inner_loop_config)
        parameters = [(parameter.data_ptr(), parameter._version) for parameter in self.student.model.parameters()]
        start = (self.student, parameters, self.metric)
        metric_before = self._start[1] if self._start is not None and self._start[0] == start else None
        try:
            output = differentiate(fine_tuning, self.metric, metric_before=metric_before, score_parts=True)
        except FloatingPointError as error:
            raise FloatingPointError(self._locate(error, samples)) from error
        except Exception as error:
            error.add_note(f"This was in the {self._place()}, with the metric {metric_name(self.metric)}.")
            raise
        self._start = (start, output.metric_before)
        tokens: list[list[str]] = []
        token_scores: list[Tensor] = []
        further = size_that_fits(self.student)
        if self.inner_loop_config.per_token:
            if self._token_bytes is None or self._token_bytes.tokenizer is not self.processing_class:
                self._token_bytes = TokenBytes(self.processing_class)  # type: ignore[arg-type]
            completions = [(sample.ids, sample.reading.pieces) for sample in samples]
            tokens, token_scores = hand_over(output.token_scores, output.token_ends, completions, self._token_bytes)  # type: ignore[arg-type]
        if verify:
            directions = random_signs(NUM_VERIFIED, len(samples), self.inner_loop_config.seed)
            agreement = predicted_and_actual(fine_tuning, self.metric, output.scores, directions)
            further |= {"verify/pearson": agreement.pearson, "verify/spearman": agreement.spearman}
        light = replace(output, token_scores=None, samples=[])
        return ScoredDataset(light, output.num_empty, output.num_truncated, tokens, token_scores, further)

    def _place(self) -> str:
        step = "" if self._step is None else f"step {self._step} of the generator, "
        return f"reward of {step}rank {PartialState().process_index}"

    def _locate(self, error: FloatingPointError, samples: list[Sample]) -> str:
        """The message of an error, with step, rank and sample."""
        message = f"{self._place().capitalize()}: {error}"
        if isinstance(error, NotFiniteError):
            row = error.rows[0]
            text = "".join(piece.text for piece in samples[row].reading.pieces)
            message += f" Found at {len(error.rows)} samples, the first is completion {row}: {text!r:.80}"
        return message

    def _batch(self, samples: list[Sample], places: list[list[int]], scored: list[ScoredDataset]) -> ScoredBatch:
        """The results of all datasets as one batch, in the order of the completions."""
        scores = torch.zeros(len(samples), dtype=torch.float64)
        for own, dataset in zip(places, scored, strict=True):
            scores[own] = dataset.output.scores.double()
            if self.inner_loop_config.attribution == "dataset":
                scores[own] -= dataset.output.metric_before
        batch = ScoredBatch(
            prompts=[_text(sample.prompt) for sample in samples],
            completions=["".join(piece.text for piece in sample.reading.pieces) for sample in samples],
            scores=scores,
            readout=scored[0].output.readout,
        )
        if self.inner_loop_config.per_token:
            batch.tokens = _in_order(places, [dataset.tokens for dataset in scored])
            batch.token_scores = _in_order(places, [dataset.token_scores for dataset in scored])
        return batch

    def _figures(self, raw: Tensor, scored: list[ScoredDataset]) -> dict[str, float]:
        """The figures to log. Figures of several datasets are averaged."""
        outputs = [dataset.output for dataset in scored]

        def mean(values):
            return sum(values) / len(outputs)

        figures = {
            "score/mean": raw.mean().item(),
            "score/std": raw.std(correction=0).item(),
            "score/min": raw.min().item(),
            "score/max": raw.max().item(),
            "metric_before": mean(output.metric_before for output in outputs),
            "metric_after": mean(output.metric_after for output in outputs),
            "metric_change": mean(output.metric_after - output.metric_before for output in outputs),
            "student_loss/first": mean(output.losses[0].item() for output in outputs),
            "student_loss/last": mean(output.losses[-1].item() for output in outputs),
            "num_empty": float(sum(dataset.num_empty for dataset in scored)),
            "num_truncated": float(sum(dataset.num_truncated for dataset in scored)),
        }
        for name in outputs[0].part_scores:
            parts = torch.cat([output.part_scores[name] for output in outputs]).double()
            figures[f"score/std/{name}"] = parts.std(correction=0).item()
        if self.inner_loop_config.attribution != "dataset":
            figures["predicted_change"] = mean(output.scores.sum().item() for output in outputs)
        for name in outputs[0].proxies:
            figures[name] = mean(output.proxies[name] for output in outputs)
        mine = outputs[:: PartialState().num_processes]  # the datasets that the main process scores
        for name in outputs[0].seconds:
            figures[f"seconds/{name}"] = sum(output.seconds[name] for output in mine)
        return figures | scored[0].further


def _check_combination(
    student: Student,
    config: InnerLoopConfig,
    cross_group_batching: bool,
    num_generations: int | None,
    verify_steps: int,
) -> None:
    """Refuse settings of a reward that cannot be combined."""
    if cross_group_batching and config.attribution == "dataset":
        raise ValueError(
            "attribution='dataset' rewards every completion of a dataset alike, so the generator learns nothing "
            "from one dataset of all completions. Set cross_group_batching=False."
        )
    if not cross_group_batching and num_generations is None:
        raise ValueError("cross_group_batching=False needs num_generations, the trainer's completions per prompt.")
    if config.per_token:
        if config.attribution == "dataset":
            raise ValueError("attribution='dataset' rewards whole datasets, so it has no scores per_token.")
        if not student.processing_class.is_fast:  # type: ignore[union-attr]
            raise ValueError(
                f"The student's tokenizer ({type(student.processing_class).__name__}) is slow: it does not know "
                "the positions of its tokens in the text, so their scores cannot be assigned to the generator's "
                "tokens. Use a fast tokenizer, or per_token=False."
            )
    if verify_steps < 0:
        raise ValueError(f"verify_steps must be 0 (never) or positive, got {verify_steps}.")
    if verify_steps and config.attribution == "dataset":
        raise ValueError("attribution='dataset' computes no scores of samples to verify. Set verify_steps=0.")


def _text(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message_text(message) for message in prompt)


def _in_order(places: list[list[int]], datasets: list[list[T]]) -> list[T]:
    """One list with the values of all datasets' samples, in the order of the batch."""
    by_place = dict(zip(chain(*places), chain(*datasets), strict=True))
    return [by_place[place] for place in range(len(by_place))]
