"""The reward of a completion: its effect on the target metric when a student is trained on it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .metagradients import InnerLoopConfig
from .metric_state import MetricState
from .metrics.base import metric_name
from .metrics.draw import check_samples
from .ranks import ALONE, Ranks, from_all_ranks
from .replay import Mixture, Replay, without_replay
from .reward_checks import check_combination, check_given, check_not_given, check_several, check_train_on
from .score_client import MAX_WAIT, ScoreClient
from .scored_batch import (
    Sample,
    ScoredBatch,
    ScoredDataset,
    as_batch,
    figures,
    from_json,
    split_prompts,
    unit_scale,
)
from .several_students import combine, student_names
from .student import FinetunedStudent, Student
from .student.placement import Placement
from .student_scorer import NUM_VERIFIED as NUM_VERIFIED
from .student_scorer import StudentScorer, do_jobs, plan_jobs
from .student_text import StudentText, Text, thinking_figures
from .text import completion_text
from .tuning import Choice, Tuning, check_scores


Message = dict[str, Any]
T = TypeVar("T")


class DPGReward:
    """
    A TRL reward function: the metagradient of each completion (Thrush et al., arXiv 2604.08423).

    The completions of one generation batch, from all ranks, are a dataset. A fresh student is fine-tuned on it, and
    the reward of completion i is ∂Φ/∂w_i, divided by the standard deviation over the batch. The reward works in
    [`~trl.GRPOTrainer`] and [`~trl.RLOOTrainer`] without changes.

    The division is needed because raw metagradients have sizes from 1e-9 to 1e-3, and TRL divides rewards by their
    standard deviation plus 1e-4. The raw scores are logged, too.

    Args:
        student (`Student` or `list[Student]`):
            The student before fine-tuning. Of several students, each is fine-tuned on all completions, and the rewards
            are one value of their scores, see `student_aggregation`. They work one after the other, or one on each
            rank if there are at least as many students as ranks.
        metric (`Callable`):
            Φ: maps a [`FinetunedStudent`] to a scalar tensor, higher is better.
        inner_loop_config (`InnerLoopConfig`, *optional*):
            How the student is fine-tuned, and how its metric is attributed to the samples. What is `"auto"` in it is
            chosen at the first call by [`~trl_dpg.tuning.tune`], on the first dataset, while the other ranks wait.
        cross_group_batching (`bool`, *optional*, defaults to `True`):
            Whether all completions are one dataset. If `False`, there are `num_generations` datasets with one
            completion of each prompt. A student is fine-tuned on each, and each rank scores a part of the datasets.
            One dataset is scored by all ranks together, each with a part of every step's samples.
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
        server (`str`, *optional*):
            Address of a `trl-dpg serve`, e.g. `"http://127.0.0.1:8000"`, in the place of `student`, `metric` and
            `inner_loop_config`. Its token is in the environment variable `TRL_DPG_SERVER_TOKEN`. Only the main process
            asks the server.
        server_max_wait (`float`, *optional*, defaults to `3600.0`):
            Seconds to wait for a server that does not answer, or that has too much to do.
        student_device (`str`, *optional*, defaults to `"auto"`):
            Where the student is fine-tuned: on the trainer's device (`"auto"`), on `"cpu"`, or on a device such as
            `"cuda:1"`. It is moved there by each call.
        student_offload (`bool`, *optional*, defaults to `False`):
            Whether the student is in host memory between two calls, so that generation and update have the GPU for
            themselves. Of several students, only the one that works is on the GPU.
        metric_samples (`int`, *optional*):
            Texts of the metric that are drawn at random for each call, see [`LanguageModelingMetric.draw`]. Φ before
            and after, and its gradient, are of the same texts. All texts when `None`, and in evaluation.
        student_aggregation (`str`, *optional*, defaults to `"mean"`):
            Of several students, each one's scores are divided by their standard deviation over the batch. A
            completion's reward is their `"mean"`, or the lowest of them (`"worst"`).
        replay ([`~trl_dpg.replay.Replay`], *optional*):
            Rows of a dataset that are mixed into every dataset, and never scored. Each call has other rows. Calls in
            an evaluation all have the same ones.

    Attributes:
        students (`list[Student]`): All students. `student` is the first.
        tuning ([`~trl_dpg.tuning.Tuning`] or `None`):
            The choice of the `"auto"` values, after the first call.
        choice ([`~trl_dpg.tuning.Choice`]):
            Makes the choice. [`DPGTrainer`] tells it when its calls are evaluations.
        metric_state ([`~trl_dpg.metric_state.MetricState`]):
            The draws of the metric's texts and the multipliers of its constraints, for checkpoints.
        last_token_scores (`list[torch.Tensor]` or `None`):
            With `per_token=True`, the raw scores of the tokens of this rank's completions in the last call. Each
            completion has a tensor as long as its `completion_ids`, whose sum is the completion's raw score.
        last_batch (`ScoredBatch` or `None`):
            Texts, raw scores and the metric's readout of the last call, from all ranks.

    Raises:
        `ValueError`:
            If an option is unknown, if a student or a metric is missing, or given beside `server`, if this machine has
            no such `student_device`, or if the student's tokenizer is slow and `per_token=True`. With several
            students, also if they share a model, if an `"auto"` is to be chosen, if token ids are given and their
            tokenizers differ, or with the naive baseline. With the naive baseline (`attribution="dataset"`), also if
            `cross_group_batching`, `per_token` or `verify_steps` is set: it has one reward for a whole dataset, and no
            scores of samples or tokens. Nor can it choose an `"auto"`.
    """

    def __init__(
        self,
        student: Student | Sequence[Student] | None = None,
        metric: Callable[[FinetunedStudent], Tensor] | None = None,
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
        server: str | None = None,
        server_max_wait: float = MAX_WAIT,
        student_device: str = "auto",
        student_offload: bool = False,
        metric_samples: int | None = None,
        student_aggregation: str = "mean",
        replay: Replay | None = None,
    ):
        check_train_on(train_on)
        students: list[Any] = [student] if isinstance(student, Student) else list(student or [])
        self.client = None if server is None else ScoreClient(server, server_max_wait)
        if server is None:
            check_given(students, metric)
            check_samples(metric, metric_samples)
        else:
            own = {"inner_loop_config": inner_loop_config, "verify_steps": verify_steps or None, "replay": replay}
            check_not_given(student=student, metric=metric, metric_samples=metric_samples, **own)
        inner_loop_config = inner_loop_config or InnerLoopConfig()
        check_combination(students, inner_loop_config, cross_group_batching, num_generations, verify_steps)
        check_several(students, metric, inner_loop_config, student_aggregation, replay)
        check_scores(inner_loop_config)
        self.student_text = StudentText(student_text, unfinished_thoughts, chat_template_kwargs=chat_template_kwargs)
        self.__name__ = "dpg"  # the reward's name in TRL's logs
        self.metric: Callable[[FinetunedStudent], Tensor] = metric  # type: ignore[assignment]  # none with a server
        self.replay, self.batch_size = replay, inner_loop_config.batch_size  # without replayed rows
        self.inner_loop_config = inner_loop_config if replay is None else replay.widened(inner_loop_config)
        self.student_aggregation, self.cross_group_batching = student_aggregation, cross_group_batching
        self.num_generations = num_generations
        self.train_on = train_on
        self.processing_class = processing_class
        self.verify_steps = verify_steps
        self.choice = Choice(tuning_file)
        self.placement = Placement(student_device, student_offload).checked()
        self.last_token_scores: list[Tensor] | None = None
        self.last_batch: ScoredBatch | None = None
        self._ranks: Ranks | None = None  # that score a single dataset together
        self._step: int | None = None  # of the trainer
        self._num_verifiable = 0  # calls with verify_steps > 0
        self._num_drawn = 0  # draws of replayed rows in training
        self.metric_state = MetricState(metric_samples, inner_loop_config.seed)
        self._scorers = [StudentScorer(own, self.placement, self.metric_state) for own in students]

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
        self._step = kwargs["trainer_state"].global_step + 1 if "trainer_state" in kwargs else None
        scored = self.score(datasets)
        self.last_batch = as_batch(samples, places, scored, self.inner_loop_config)

        raw = self.last_batch.scores
        rewards = unit_scale(raw)
        start = sum(len(part) for part in parts[: PartialState().process_index])
        mine = slice(start, start + len(completions))
        if self.last_batch.token_scores is not None:
            self.last_token_scores = self.last_batch.token_scores[mine]
        if log_metric is not None:
            found = figures(raw, scored, self.inner_loop_config.attribution)
            for name, value in (found | thinking_figures([sample.reading for sample in samples])).items():
                log_metric(f"dpg/{name}", value)
            log_metric("dpg/seconds", time.perf_counter() - started)
        if log_extra is not None:
            log_extra("dpg_score", raw[mine].tolist())
            if self.last_token_scores is not None:
                log_extra("dpg_token_scores", [scores.tolist() for scores in self.last_token_scores])
        return rewards[mine].tolist()

    @property
    def students(self) -> list[Student]:
        return [scorer.student for scorer in self._scorers]

    @property
    def student(self) -> Student:
        return self._scorers[0].student

    @student.setter
    def student(self, student: Student) -> None:
        self._scorers[0].student = student

    @property
    def tuning(self) -> Tuning | None:
        return self.choice.tuning

    def begin_training(self, resumed: bool) -> None:
        """Take the choice of the `"auto"` values from the file, or remove it before a new one. On all ranks."""
        if self.client is not None:
            self.described()
            return
        self.inner_loop_config = self.choice.begin(self.student, self.metric, self.inner_loop_config, resumed)

    def described(self) -> dict[str, str]:
        """`metric` and `student` in words. On all ranks, as the main process asks the server if there is one."""
        if self.client is None:
            return {"metric": metric_name(self.metric), "student": "; ".join(map(Student.describe, self.students))}
        if not self.client.known:
            self.client.known = _from_main(self.client.health, "The score server")
            inner_loop = self.client.known["inner_loop"]
            self.inner_loop_config = InnerLoopConfig(**inner_loop | {"betas": tuple(inner_loop["betas"])})
        return {name: self.client.known[name] for name in ("metric", "student")}

    def score(self, datasets: list[list[Sample]]) -> list[ScoredDataset]:
        """
        The results of datasets, each of which trains a student of its own. All ranks call this with all datasets.

        Raises:
            `RuntimeError`: If the computation failed on another rank. Its own error is raised as it is.
        """
        if self.client is not None:
            self.described()
            score = self.client.score
            answers = _from_main(lambda: [score([own.example for own in each]) for each in datasets], "The DPG reward")
            return [from_json(answer) for answer in answers]
        mixtures = self._mixtures(datasets)
        first, batch = self._scorers[0], (self.student, mixtures[0].examples, self.metric)
        move_in = partial(first.move, self.placement.move_in, self.metric)
        self.inner_loop_config = self.choice.make(*batch, self.inner_loop_config, prepare=move_in)
        with self.metric_state.texts(self.metric, self.choice.training):
            results = self._score(datasets, mixtures)
        scored = results[0]
        if len(results) > 1:
            names = student_names(self.students)
            scored = combine(results, names, self.student_aggregation, self.inner_loop_config.attribution)
        return self.metric_state.react(self.metric, scored, self.choice.training)

    def _mixtures(self, datasets: list[list[Sample]]) -> list[Mixture]:
        """What the student is fine-tuned on: the samples of each dataset, with the replayed rows of this call."""
        mixtures = [without_replay([sample.example for sample in dataset]) for dataset in datasets]
        if self.replay is None:
            return mixtures
        self._num_drawn += self.choice.training
        draw = partial(self.replay.mix, batch_size=self.batch_size, index=self._num_drawn * self.choice.training)
        mixed: list[Mixture] = []
        from_all_ranks(lambda: mixed.extend(draw(own.examples) for own in mixtures), "Drawing replayed rows")
        return mixed

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
            Sample(prompt, reading, _example(prompt, reading.completion, self.train_on), own)
            for prompt, reading, own in zip(prompts, readings, ids, strict=True)
        ]

    def _score(self, datasets: list[list[Sample]], mixtures: list[Mixture]) -> list[list[ScoredDataset]]:
        """The results of each student, of each dataset: of one by all ranks together, of several by one rank each."""
        state = PartialState()
        due = self.verify_steps > 0 and self._num_verifiable % self.verify_steps == 0
        self._num_verifiable += self.verify_steps > 0
        jobs = plan_jobs(self._scorers, datasets, mixtures, due)
        how = self.metric, self.inner_loop_config, self._step, self.processing_class
        if len(datasets) == 1 and (len(jobs) == 1 or len(jobs) < state.num_processes):
            self._ranks = self._ranks or Ranks.of_this_run(self.placement.where())
            with self._ranks.guard("The DPG reward"):
                everyones = do_jobs(dict(enumerate(jobs)), self._ranks, *how)
        else:
            mine = {k: jobs[k] for k in range(state.process_index, len(jobs), state.num_processes)}
            shares = from_all_ranks(lambda: do_jobs(mine, ALONE, *how), "The DPG reward")
            everyones = {job: dataset for share in shares for job, dataset in share.items()}
        done = [everyones[job] for job in range(len(jobs))]
        return [done[first : first + len(datasets)] for first in range(0, len(done), len(datasets))]


def _from_main(function: Callable[[], T], name: str) -> T:
    """The result of a function on the main process, on all ranks; or its error."""
    results = from_all_ranks(lambda: function() if PartialState().is_main_process else None, name)
    return results[0]  # type: ignore[return-value]  # the main process is the first


def _example(prompt: Text, completion: Text, train_on: str) -> Any:
    if train_on == "prompt_completion":
        return {"prompt": prompt, "completion": completion}
    return completion_text(completion)
