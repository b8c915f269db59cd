"""
Fresh students at the end of `trl-dpg dpg`: what texts of the trained generator do, and texts of the untrained one.

Stock SFTTrainer fine-tunes the students. Each seed has newly sampled texts and a student of its own.
"""

import inspect
import statistics
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..evaluation import evaluate_dataset, interval, metric_before
from ..generation import generate_texts, prompt_completion_pairs
from ..metrics import CombinedMetric, Metric
from ..metrics.combine import compared, part_values
from ..replay import Replay
from ..student_text import StudentText, thinking_figures
from .arguments import SAMPLING


Figures = dict[str, Any]
UNTRAINED, TRAINED = "untrained", "trained"


class FreshStudents:
    """
    Tests a generator before and after its training.

    Args:
        trainer ([`DPGTrainer`]):
            The trainer.
        rows ([`~datasets.Dataset`]):
            The rows whose prompts are completed.
        metric (`Callable`):
            Φ.
        held_out (`dict[str, Callable]`):
            Further metrics of the fresh students by name, e.g. Φ on other texts.
        rewards (`list`):
            Further rewards, computed for the sampled texts.
        number (`int`):
            Number of fresh students for each state of the generator.
        greedy_prompt (`str`, *optional*):
            A prompt that the students complete greedily.

    Attributes:
        texts (`dict[str, list[list[str]]]`): The sampled texts of each seed, by the state of the generator.
        students (`dict[str, list[dict]]`): The figures of each student, by the state of the generator.
    """

    def __init__(
        self,
        trainer,
        rows: Dataset,
        metric: Callable,
        held_out: dict[str, Callable],
        rewards: list,
        number: int,
        greedy_prompt: str | None = None,
    ):
        self.metric = metric.objective() if isinstance(metric, CombinedMetric) else metric  # without multipliers
        self.trainer, self.rows, self.held_out, self.rewards = trainer, rows, held_out, rewards
        self.greedy_prompt = greedy_prompt
        self.seeds = [trainer.args.seed + k for k in range(number)]
        self.texts: dict[str, list[list[str]]] = {}
        self.students: dict[str, list[Figures]] = {}
        self.before: Figures = {}

    def sample(self, state: str) -> None:
        """Let the generator, which is in this state now, write the texts of all seeds."""
        self.texts[state] = [sample(self.trainer, self.rows["prompt"], seed) for seed in self.seeds]

    def judge(self) -> Iterator[dict[str, Any]]:
        """Test all students, seed by seed. After each seed, yield [`figures`]. A line is printed for each student."""
        metrics = {"metric": self.metric, **self.held_out}
        befores, starts = {}, {}
        for name, own in self.trainer.args.each_student().items():
            student = own.load_student()
            befores[name] = {figure: metric_before(student, metric) for figure, metric in metrics.items()}
            starts[name] = part_values(self.metric)
            del student
        self.before = of_all(befores)
        self.students = {state: [] for state in self.texts}
        for place, seed in enumerate(self.seeds):
            for state, samples in self.texts.items():
                args = copy(self.trainer.args)
                args.seed = seed
                what = self.metric, self.rewards, self.greedy_prompt, self.held_out, self.trainer.processing_class
                figures = judge(samples[place], self.rows, args, *what, self.trainer.dpg_reward.replay, starts)
                self.students[state].append(figures)
                title = f"fresh student {place + 1} of {len(self.seeds)}, {state} generator"
                print(f"{title}: {_line(figures)}", flush=True)
            yield self.figures()

    def figures(self) -> dict[str, Figures]:
        """
        Means over the seeds so far, by the state of the generator. What is no number is of the first student.

        With several seeds, `fresh_students` has the values of all: `seeds`, `before` (the student before any
        fine-tuning), `untrained`, `trained`, and `difference` (mean and half the width of its 95 % interval).
        """
        means = {
            state: {
                name: statistics.mean(figures[name] for figures in students) if isinstance(value, float) else value
                for name, value in students[0].items()
            }
            for state, students in self.students.items()
        }
        if len(self.seeds) == 1:
            return means
        values = {state: _columns(students) for state, students in self.students.items()}
        difference = {
            name: dict(zip(("mean", "half_width"), interval(_minus(trained, values[UNTRAINED][name])), strict=True))
            for name, trained in values[TRAINED].items()
        }
        seeds = self.seeds[: len(self.students[TRAINED])]
        return means | {"fresh_students": {"seeds": seeds, "before": self.before, **values, "difference": difference}}

    def render(self) -> str:
        """A table for the terminal."""
        number = len(self.seeds)
        what = "one fresh student each" if number == 1 else f"{number} fresh students each, 95 % intervals"
        rows = [[f"texts of the generator, {what}", "before", UNTRAINED, TRAINED, "difference"]]
        values = {state: _columns(students) for state, students in self.students.items()}
        for name, trained in values[TRAINED].items():
            untrained = values[UNTRAINED][name]
            before = f"{self.before[name]:.4g}" if name in self.before else ""
            rows.append([name, before, *map(_plus_minus, (untrained, trained, _minus(trained, untrained)))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *cells in rows:
            numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *numbers]))
        return "\n".join(lines)


def sample(trainer, prompts, seed: int) -> list[str]:
    """Completions, sampled with the settings of the trainer."""
    args = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.train()  # as in training; eval mode would pack a 4-bit model for inference, which cannot be undone
    return generate_texts(
        model,
        trainer.processing_class,
        prompts,
        args.max_completion_length,
        seed=seed,
        chat_template_kwargs=args.chat_template_kwargs,
        generation_kwargs=args.generation_kwargs,
        skip_special_tokens=not _reader(args, trainer.processing_class).needs_special_tokens,
        **{name: vars(args)[name] for name in SAMPLING},
    )


def judge(
    texts: list[str],
    rows: Dataset,
    args,
    metric: Callable,
    rewards: list,
    greedy_prompt: str | None = None,
    held_out: dict[str, Callable] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    replay: Replay | None = None,
    starts: dict[str, dict[str, float]] | None = None,
) -> Figures:
    """
    Test a fresh student on texts, and compute the further rewards of the texts. Of several students, a figure is the
    mean, and that of each is called `<figure>/<name>`. What is no number is of the first one.

    Args:
        texts (`list[str]`): Completions.
        rows ([`~datasets.Dataset`]): The row of the prompts' dataset for each text.
        args ([`DPGConfig`]): The student and its fine-tuning.
        metric (`Callable`): Φ.
        rewards (`list`): Reward functions. Asynchronous functions and reward models are left out.
        greedy_prompt (`str`, *optional*): A prompt that the student completes greedily.
        held_out (`dict[str, Callable]`, *optional*): Further metrics of the student by name.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): The generator's tokenizer, which
            tells how it marks its reasoning.
        replay ([`~trl_dpg.replay.Replay`], *optional*): Rows that are mixed into the students' data.
        starts (`dict[str, dict[str, float]]`, *optional*): By student, the values of the metric's parts before any
            fine-tuning, with which those of constrained parts are compared.
    """
    pairs = prompt_completion_pairs(rows["prompt"], texts)
    readings = _reader(args, processing_class).read(rows["prompt"], texts)
    read = [reading.completion for reading in readings]
    with_prompts = args.train_on == "prompt_completion"
    data: Any = Dataset.from_list(prompt_completion_pairs(rows["prompt"], read)) if with_prompts else read  # type: ignore[arg-type]
    each: dict[str, dict[str, float]] = {}
    further: Figures = {}
    for student, own in args.each_student().items():
        result = evaluate_dataset(own.load_student, data, metric, args.inner_loop_config(), args.seed, replay)
        each[student] = result.figures() | (compared(metric, starts[student]) if starts else {})
        each[student] |= {name: result.measure(held) for name, held in (held_out or {}).items()}
        if not further:
            further = metric.readout(result.finetuned) if isinstance(metric, Metric) else {}
            further |= {} if greedy_prompt is None else {"greedy": result.finetuned.generate(greedy_prompt)}
    figures: Figures = of_all(each) | thinking_figures(readings)
    columns = {name: list(rows[name]) for name in rows.column_names if name != "prompt"}
    for reward in rewards:
        if callable(reward) and not inspect.iscoroutinefunction(reward):
            completions = [pair["completion"] for pair in pairs]
            values = reward(prompts=list(rows["prompt"]), completions=completions, **columns)
            values = [value for value in values if value is not None]
            figures[reward.__name__] = sum(values) / max(len(values), 1)
    return figures | further | {"samples": texts[:8]}


def of_all(students: dict[str, dict[str, float]]) -> Figures:
    """The figures of one student or, of several, their means and those of each: `metric`, `metric/llama`, ..."""
    first, *others = students.values()
    if not others:
        return dict(first)
    means = {name: statistics.mean(own[name] for own in students.values()) for name in first}
    return means | {f"{name}/{student}": own[name] for student, own in students.items() for name in own}


def _reader(args, processing_class: PreTrainedTokenizerBase | None) -> StudentText:
    """What a student reads, by the arguments of the training."""
    return StudentText(args.student_text, args.unfinished_thoughts, processing_class, args.chat_template_kwargs)


def _columns(students: list[Figures]) -> dict[str, list[float]]:
    """The values of all students, by the name of the figure."""
    names = [name for name, value in students[0].items() if isinstance(value, float)]
    return {name: [figures[name] for figures in students] for name in names}


def _minus(first: list[float], second: list[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _plus_minus(values: list[float]) -> str:
    mean, half_width = interval(values)
    return f"{mean:.4g}" if half_width is None else f"{mean:.4g} ± {half_width:.2g}"


def _line(figures: Figures) -> str:
    shown = {name: value for name, value in figures.items() if isinstance(value, float | str)}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v!r}" for k, v in shown.items())
