"""`trl-dpg dpg`: one run in a folder, from which checkpoint it goes on, and how a signal stops it."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trl_dpg.stopping import STOPPED, StopOnSignal, say

from .arguments import UsageError


AGAIN = "Go on with the same command and --resume_from_checkpoint auto."


@contextmanager
def one_run(output_dir: Path) -> Iterator[StopOnSignal]:
    """Refuse a folder in which another run is at work, and catch the signals that stop a run."""
    from accelerate import PartialState

    from trl_dpg.files import locked
    from trl_dpg.ranks import from_all_ranks

    taken = UsageError(f"--output_dir {str(output_dir)!r}: another run is at work in this folder. Choose another one.")
    with ExitStack() as stack:
        main = PartialState().is_main_process
        lock = locked(output_dir / "_dpg.lock", taken)
        from_all_ranks(lambda: stack.enter_context(lock) if main else None, "Taking the folder")
        yield stack.enter_context(StopOnSignal(f"There was no step to save. {AGAIN}"))


def checkpoint(training_args) -> str | None:
    """
    The checkpoint to go on from.

    `"auto"` is the newest whole one of the output folder, or none if there is none. `True` is the newest whole one;
    there must be one.
    """
    from trl_dpg.checkpoints import newest_whole, why_not_whole

    given, folder = training_args.resume_from_checkpoint, training_args.output_dir
    if given not in ("auto", True, "true", "True"):
        reason = why_not_whole(given) if given else None
        if reason is not None and not (training_args.accept_changed_setup and Path(given).is_dir()):
            raise UsageError(f"--resume_from_checkpoint {given!r} is not a whole checkpoint: {reason}.")
        return given or None
    last = newest_whole(folder)
    if last is None and given != "auto":
        raise UsageError(
            f"--resume_from_checkpoint: there is no checkpoint in {folder!r} that is whole. Use 'auto' to start anew."
        )
    return None if last is None else str(last)


def train(trainer, last: str | None, stop: StopOnSignal) -> None:
    """
    Train, from a checkpoint if there is one. If a signal stops the training, the process ends.

    A checkpoint of the last step is only loaded. transformers would make one more step.
    """
    from trl_dpg.ranks import from_all_ranks
    from trl_dpg.restart import ChangedSetup

    trainer.args.resume_from_checkpoint = last  # the callbacks need the folder, too
    try:
        if last is None or not load_finished(trainer, last):
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=last)
    except ChangedSetup as error:
        raise UsageError(
            str(error).replace("set `accept_changed_setup`", "give --accept_changed_setup true")
        ) from error
    received = next((number for number in from_all_ranks(lambda: stop.received, "Stopping") if number), None)
    if received is not None:
        save(trainer)
        step = trainer.state.global_step
        say(f"Stopped by {received.name} after step {step}; checkpoint-{step} is saved. {AGAIN}")
        sys.exit(STOPPED)
    stop.outside = f"The training is done, the fresh students are not. {AGAIN}"


def save(trainer) -> None:
    """Save the step after which a signal stopped the training, if the trainer has not."""
    from trl_dpg.checkpoints import checkpoint_folder, why_not_whole
    from trl_dpg.ranks import from_all_ranks

    folder = checkpoint_folder(trainer.args.output_dir, trainer.state.global_step)
    if from_all_ranks(lambda: why_not_whole(folder), "Stopping")[0] is not None:
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


def load_finished(trainer, last: str) -> bool:
    """Load a checkpoint of the last step, if it is one."""
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    path = Path(last, TRAINER_STATE_NAME)
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if not path.exists() or trainer.args.max_steps <= 0 or sharded:
        return False
    state = TrainerState.load_from_json(str(path))
    if state.global_step < trainer.args.max_steps:
        return False
    trainer.restart.check(last)
    trainer._load_from_checkpoint(last)
    trainer.restart.load(last)
    trainer.state = state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()  # as at the end of a training
    trainer.dpg_reward.begin_training(resumed=True)  # which takes the numbers that `auto` became
    return True
