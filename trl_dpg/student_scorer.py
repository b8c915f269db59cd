"""Scores datasets by one student, which is moved to its device for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .metagradients import InnerLoopConfig, MetagradientOutput
from .metagradients.config import NotFiniteError
from .metagradients.fine_tuning import FineTuning
from .metagradients.metagradient import differentiate
from .metagradients.out_of_memory import size_that_fits
from .metric_state import MetricState
from .metrics.base import metric_name
from .ranks import Ranks
from .replay import Mixture
from .scored_batch import Sample, ScoredDataset, located, place
from .student import FinetunedStudent, Student
from .student.placement import Placement
from .token_alignment import TokenBytes, hand_over
from .verification import predicted_and_actual, random_signs


NUM_VERIFIED = 6
"""Directions in which a verification changes the data weights. Each takes two fine-tunings of the student."""


class StudentScorer:
    """
    One student, and where it works.

    Args:
        student (`Student`): The student. It waits where the placement says.
        placement (`Placement`): Where it works and waits.
        metric_state (`MetricState`): What is known of the metric before any fine-tuning.
    """

    def __init__(self, student: Student, placement: Placement, metric_state: MetricState):
        self.student, self.placement, self.metric_state = student, placement, metric_state
        self._token_bytes: TokenBytes | None = None
        placement.move_out(student)

    def move(self, move: Callable[[Student], None], metric: Callable) -> None:
        """Move the student. It is the same student afterwards, with the same value of the metric."""
        self.metric_state.move(self.student, metric, move)

    @contextmanager
    def in_place(self, metric: Callable) -> Iterator[None]:
        """Context in which the student is where it works."""
        self.move(self.placement.move_in, metric)
        try:
            yield
        finally:
            self.move(self.placement.move_out, metric)

    def score(
        self,
        samples: list[Sample],
        mixture: Mixture,
        metric: Callable[[FinetunedStudent], Tensor],
        config: InnerLoopConfig,
        ranks: Ranks,
        verify: bool,
        step: int | None,
        generator_tokenizer: PreTrainedTokenizerBase | None,
    ) -> ScoredDataset:
        """
        The results of a dataset.

        Args:
            samples (`list[Sample]`): N samples.
            mixture (`Mixture`): Them and the replayed rows, on which the student is fine-tuned.
            metric (`Callable`), config (`InnerLoopConfig`), ranks (`Ranks`): See [`FineTuning`].
            verify (`bool`): Whether to compare predicted and actual changes of the metric.
            step (`int` or `None`): The trainer's step, for messages.
            generator_tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `None`): Needed with `per_token`.
        """
        fine_tuning = FineTuning(self.student, mixture.examples, config, ranks)
        mixture.check(fine_tuning.samples)
        known = self.metric_state.known(self.student, metric)
        try:
            whole = differentiate(fine_tuning, metric, metric_before=known, score_parts=True)
        except FloatingPointError as error:
            raise FloatingPointError(located(_of_the_samples(error, mixture), samples, step)) from error
        except Exception as error:
            error.add_note(f"This was in the {place(step)}, with the metric {metric_name(metric)}.")
            raise
        whole = self.metric_state.remember(self.student, metric, whole)
        output: MetagradientOutput = mixture.of_the_samples(whole)
        tokens: list[list[str]] = []
        token_scores: list[Tensor] = []
        further: dict[str, Any] = size_that_fits(self.student)
        if config.per_token:
            if self._token_bytes is None or self._token_bytes.tokenizer is not generator_tokenizer:
                self._token_bytes = TokenBytes(generator_tokenizer)  # type: ignore[arg-type]
            completions = [(sample.ids, sample.reading.pieces) for sample in samples]
            tokens, token_scores = hand_over(output.token_scores, output.token_ends, completions, self._token_bytes)  # type: ignore[arg-type]
        if verify:
            directions = random_signs(NUM_VERIFIED, len(samples), config.seed)
            moved = directions.new_zeros(NUM_VERIFIED, len(mixture.examples))  # replayed rows keep their weights
            moved[:, mixture.own] = directions
            agreement = predicted_and_actual(fine_tuning, metric, whole.scores, moved)
            further |= {"verify/pearson": agreement.pearson, "verify/spearman": agreement.spearman}
        light = replace(output, token_scores=None, samples=[])
        return ScoredDataset(light, output.num_empty, output.num_truncated, tokens, token_scores, further)


class Job(NamedTuple):
    """A dataset to be scored by a student, see [`StudentScorer.score`]."""

    scorer: StudentScorer
    samples: list[Sample]
    mixture: Mixture
    verify: bool


def plan_jobs(
    scorers: list[StudentScorer], datasets: list[list[Sample]], mixtures: list[Mixture], verify: bool
) -> list[Job]:
    """Every dataset by the first student, then by the next. With `verify`, the first dataset is to be verified."""
    own = list(zip(datasets, mixtures, strict=True))
    return [
        Job(scorer, samples, mixture, verify and index == 0)
        for scorer in scorers
        for index, (samples, mixture) in enumerate(own)
    ]


def do_jobs(
    jobs: dict[int, Job],
    ranks: Ranks,
    metric: Callable[[FinetunedStudent], Tensor],
    config: InnerLoopConfig,
    step: int | None,
    generator_tokenizer: PreTrainedTokenizerBase | None,
) -> dict[int, ScoredDataset]:
    """Do jobs in their order. A student is moved once for those of its jobs that come one after the other."""
    done = {}
    for scorer, own in groupby(jobs.items(), key=lambda item: item[1].scorer):
        with scorer.in_place(metric):
            for index, (_, samples, mixture, verify) in own:
                what = samples, mixture, metric, config, ranks, verify
                done[index] = scorer.score(*what, step, generator_tokenizer)
    return done


def _of_the_samples(error: FloatingPointError, mixture: Mixture) -> FloatingPointError:
    """The error with the places of its samples in the dataset, without those of replayed rows."""
    if isinstance(error, NotFiniteError) and mixture.has_replay:
        places = {place: index for index, place in enumerate(mixture.own)}
        return NotFiniteError(str(error), [places[row] for row in error.rows if row in places])
    return error
