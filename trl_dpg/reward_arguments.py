"""What a trainer's reward scores by: students, metric, inner loop and replayed rows, or a server."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .config import DPGConfig
from .replay import Replay
from .student import Examples, FinetunedStudent, Student


def scorer_arguments(args: DPGConfig, model, student, target_metric, replay_dataset, of_the_student) -> dict[str, Any]:
    """
    Where the scores come from, as arguments of [`DPGReward`]: students, metric, inner loop and replayed rows, or a
    server.

    Args:
        args ([`DPGConfig`]), model, student, target_metric, replay_dataset:
            Those of the [`DPGTrainer`].
        of_the_student (`tuple`):
            Its `student_processing_class`, `student_peft_config` and `student_quantization_config`.
    """
    if args.student_server is not None:
        wait = args.student_server_max_wait
        replay = _replay(args, replay_dataset)
        server = dict(server=args.student_server, server_max_wait=wait)
        return dict(student=student, metric=target_metric, replay=replay, **server)
    metric = _checked_metric(target_metric)
    students = _given_students(args, student, of_the_student[0])
    for student in students:
        _check_apart(model, student)
    students = [_load_student(args, student, *of_the_student) for student in students]
    replay = _replay(args, replay_dataset)
    return dict(student=students, metric=metric, inner_loop_config=args.inner_loop_config(), replay=replay)


def _given_students(args, student, processing_class) -> list:
    """The students from the argument or, if it is `None`, from the configuration."""
    if student is None:
        student = args.student_models or args.student_model_name_or_path
        if args.student_models and args.student_model_name_or_path is not None:
            raise ValueError(
                f"`student_models` and `student_model_name_or_path` ({args.student_model_name_or_path!r}) both name "
                "students. Give one of them."
            )
    if student is None:
        raise ValueError("A student is required: pass `student` or set `student_model_name_or_path`.")
    students = list(student) if isinstance(student, list | tuple) else [student]
    if len(students) > 1 and processing_class is not None:
        raise ValueError(
            f"`student_processing_class` is the tokenizer of one student, but there are {len(students)}. Pass each as "
            "a `Student` with its `processing_class`, or by its path."
        )
    return students


def _replay(args, rows: Examples | None) -> Replay | None:
    """The replayed rows from the argument or, if it is `None`, from the configuration."""
    return args.replay() if rows is None else Replay(rows, args.replay_ratio, args.seed)


def _checked_metric(metric) -> Callable[[FinetunedStudent], Tensor]:
    if metric is None:
        raise ValueError(
            "`target_metric` is required: a callable that maps the fine-tuned student to a scalar tensor."
        )
    if isinstance(metric, str):
        raise ValueError(
            f"`target_metric` is the text {metric!r}. Names of metrics are for recipes and commands, which give a "
            "metric its arguments. Pass the metric itself, e.g. trl_dpg.metrics.LanguageModelingMetric(texts)."
        )
    if isinstance(metric, list | tuple):
        raise ValueError(
            f"`target_metric` is a {type(metric).__name__}, but the student has one metric. Pass the weighted sum: "
            "trl_dpg.metrics.CombinedMetric(metrics, weights)."
        )
    if isinstance(metric, type):
        raise ValueError(f"`target_metric` is the class {metric.__name__}. Pass an instance, with its arguments.")
    return metric


def _check_apart(model, student) -> None:
    if isinstance(model, str) or isinstance(student, str):
        return
    student_model = student.model if isinstance(student, Student) else student
    if {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in student_model.parameters()}:
        raise ValueError(
            "The student and the generator share parameters, so training the generator would change the initial "
            "weights of the student. Load the model twice."
        )


def _load_student(args: DPGConfig, student, processing_class, peft_config, quantization_config) -> Student:
    if not isinstance(student, Student):
        return args.load_student(student, processing_class, peft_config, quantization_config)
    given = {
        "student_peft_config": peft_config,
        "student_quantization_config": quantization_config,
        "student_processing_class": processing_class,
        "args.student_use_peft": args.student_use_peft or None,
    }
    ignored = [name for name, value in given.items() if value is not None]
    if ignored:
        raise ValueError(
            f"The student is a `Student` already, so these arguments would have no effect: {', '.join(ignored)}. Use "
            "them when you create the Student."
        )
    return student
