"""Goes on from a checkpoint as if the run had not stopped: keeps what TRL buffers, and checks what is loaded."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler

from .callbacks import DPGLoggingCallback
from .checkpoints import checkpoint_folder, mark_whole, put_aside, setup_of, why_not_whole
from .reward import DPGReward
from .run_setup import changes, run_setup
from .scored_batch import ScoredBatch


logger = logging.get_logger(__name__)

ACCEPT = "accept_changed_setup"


class RestartCallback(TrainerCallback):
    """
    Makes a run that goes on from a checkpoint the run that it would have been without the stop, at any save.

    The trainer's own checkpoint has weights, optimizer, scheduler, random states and its state. This callback adds,
    for each process, what TRL holds between two updates of one generation batch: its samples with advantages and log
    probabilities, the position in the batch, and figures that are not logged yet. It declares the checkpoint whole
    when everything is written, and only then lets older ones go (`save_total_limit`).

    When a run goes on, the checkpoint must be whole and of the same set-up, and the order of the prompts is that of
    the epoch. When a new run begins in the folder of an earlier one, the earlier one's files are moved aside.

    [`DPGTrainer`] adds this callback. With another trainer of TRL that buffers generation batches, add it yourself:
    `RestartCallback.add_to(trainer)`. It comes before all other callbacks, which write to the folder of the run.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
        accept_changed_setup (`bool`, *optional*, defaults to `False`):
            Whether to go on, with a warning, from a checkpoint that is not whole or of another set-up.

    Attributes:
        further (`dict[str, Any]`):
            Settings that the trainer does not know. A script sets them before the training.

    Raises:
        `ValueError`: When training begins, if the checkpoint is not whole, or if the set-up has changed.
    """

    def __init__(self, trainer, accept_changed_setup: bool = False):
        self.trainer = trainer
        self.accept_changed_setup = accept_changed_setup
        self.further: dict[str, Any] = {}
        self._limit: int | None = None
        self._seconds = 0.0  # of the pieces before this one
        self._began: float | None = None

    @classmethod
    def add_to(cls, trainer, accept_changed_setup: bool = False) -> "RestartCallback":
        """Add the callback to a trainer, before its other callbacks."""
        restart = cls(trainer, accept_changed_setup)
        trainer.callback_handler.callbacks.insert(0, restart)
        return restart

    @property
    def reward(self) -> DPGReward | None:
        return next((reward for reward in self.trainer.reward_funcs if isinstance(reward, DPGReward)), None)

    @property
    def seconds(self) -> float:
        """Seconds of training, over all pieces of the run."""
        return self._seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    # -- the beginning ----------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self._give_limit_back(args)  # after an error in a save of transformers
        self._seconds = 0.0
        if state.global_step:
            folder = self._folder(args, state)
            self.check(folder)
            self.load(folder)
            advance_prompts(train_dataloader, int(state.epoch))
        self.trainer.accelerator.wait_for_everyone()  # all have read before something is moved
        if args.should_save:
            put_aside(args.output_dir, state.global_step)
        self._began = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self._give_limit_back(args)

    def on_step_end(self, args, state, control, **kwargs):
        self._take_limit(args)

    def on_train_end(self, args, state, control, **kwargs):
        self._seconds, self._began = self.seconds, None
        self._give_limit_back(args)

    def _take_limit(self, args) -> None:
        """
        Until the next step: transformers removes older checkpoints before the new one is whole, and at the end of the
        training perhaps the last one. `on_save` removes the older ones.
        """
        if args.save_total_limit is not None:
            self._limit, args.save_total_limit = args.save_total_limit, None

    def _give_limit_back(self, args) -> None:
        if args.save_total_limit is None:
            args.save_total_limit = self._limit
        self._limit = None

    def _folder(self, args, state) -> Path:
        """The checkpoint from which the trainer's state was loaded. The trainer does not tell its callbacks."""
        given = args.resume_from_checkpoint
        for folder in (given, checkpoint_folder(args.output_dir, state.global_step)):
            path = None if not isinstance(folder, str | Path) else Path(folder, TRAINER_STATE_NAME)
            if path is not None and path.is_file():
                found = TrainerState.load_from_json(str(path))
                same = json.dumps(found.log_history) == json.dumps(state.log_history)
                if found.global_step == state.global_step and same:
                    return path.parent
        raise ValueError(
            f"The folder of the checkpoint of step {state.global_step} is not known: it is not in "
            f"{args.output_dir!r}. Set `args.resume_from_checkpoint` to the folder, too."
        )

    def check(self, folder: str | Path) -> None:
        """Refuse a checkpoint that is not whole or of another set-up. With `accept_changed_setup`, warn."""
        reason = why_not_whole(folder)
        if reason is not None:
            self._refuse(
                f"{str(folder)!r} is not a whole checkpoint: {reason}. Go on from an earlier one, or set `{ACCEPT}` "
                "to take what there is. The run is then not the one that it would have been."
            )
            return
        changed = changes(setup_of(folder), run_setup(self.trainer, self.reward, self.further))
        if changed:
            self._refuse(
                f"The set-up is not that of {str(folder)!r}: {'; '.join(changed)}. Go on with the settings of then, "
                f"start a new run in another folder, or set `{ACCEPT}`."
            )

    def _refuse(self, message: str) -> None:
        if not self.accept_changed_setup:
            raise ChangedSetup(message)
        logger.warning(message)

    # -- save and load ----------------------------------------------------------------------------------------------

    def on_save(self, args, state, control, **kwargs):
        self._give_limit_back(args)
        folder = checkpoint_folder(args.output_dir, state.global_step)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, figures = self._state()
        save_file(tensors, batch_file(folder, args.process_index))
        text = json.dumps(figures, default=str, ensure_ascii=False)
        state_file(folder, args.process_index).write_text(text, encoding="utf-8", errors="backslashreplace")
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            torch.save(args, folder / TRAINING_ARGS_NAME)  # with the limit
            mark_whole(folder, run_setup(self.trainer, self.reward, self.further), args.save_only_model)
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True)
        self._take_limit(args)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What this process holds between two updates, as tensors and as values that JSON can hold."""
        trainer = self.trainer
        in_the_batch = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations)
        slices = trainer._buffered_inputs if in_the_batch else []
        entries = {f"{index}.{name}": value for index, own in enumerate(slices) for name, value in own.items()}
        tensors = {name: value.contiguous().clone() for name, value in entries.items() if isinstance(value, Tensor)}
        pending = {name: values for name, values in trainer._metrics["train"].items() if values}
        figures = {
            "position": trainer._step,
            "slices": len(slices),
            "values": {name: value for name, value in entries.items() if name not in tensors},
            "loss": trainer._tr_loss.item(),
            "last_logged": trainer._globalstep_last_logged,
            "pending": pending,
            "tokens": trainer._total_train_tokens,
            "table": _table(trainer._logs) if trainer.log_completions else None,
            "seconds": self.seconds,
        }
        if self.reward is not None:
            batch = self._batch_to_log(self.reward) if "dpg/metric_after" in pending else None
            figures |= {"num_verifiable": self.reward._num_verifiable, "batch": batch and _from_batch(batch)}
            figures |= {"num_drawn": self.reward._num_drawn}
            figures["metric"] = self.reward.metric_state.state(self.reward.metric)
        return tensors, figures

    def load(self, folder: str | Path) -> None:
        """Take the state of a checkpoint. One of another trainer has none: its generation batch begins anew."""
        trainer, rank = self.trainer, self.trainer.args.process_index
        if not state_file(folder, rank).is_file():
            logger.warning(f"{str(folder)!r} has no state of a generation batch. The run goes on with a new batch.")
            return
        figures = json.loads(state_file(folder, rank).read_text(encoding="utf-8"))
        tensors = {name: value.clone() for name, value in load_file(batch_file(folder, rank)).items()}
        slices: list[dict[str, Any]] = [{} for _ in range(figures["slices"])]
        for name, value in {**figures["values"], **tensors}.items():
            index, _, key = name.partition(".")
            slices[int(index)][key] = value.to(trainer.args.device) if isinstance(value, Tensor) else value
        trainer._step = figures["position"]
        trainer._buffered_inputs = slices or None
        trainer._tr_loss = torch.tensor(figures["loss"], device=trainer.args.device)
        trainer._globalstep_last_logged = figures["last_logged"]
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(figures["pending"])
        trainer._total_train_tokens = figures["tokens"]
        _fill_table(trainer._logs, figures["table"] or {})
        self._seconds = figures["seconds"]
        if self.reward is not None and "num_verifiable" in figures:
            self.reward._num_verifiable = figures["num_verifiable"]
            self.reward._num_drawn = figures.get("num_drawn", 0)
            if "metric" in figures:  # not written by earlier versions
                self.reward.metric_state.load(self.reward.metric, figures["metric"])
            self.reward.last_batch = figures["batch"] and _to_batch(figures["batch"])
            for callback in self._logging():
                callback.train_batch = self.reward.last_batch

    def _logging(self) -> list[DPGLoggingCallback]:
        return [own for own in self.trainer.callback_handler.callbacks if isinstance(own, DPGLoggingCallback)]

    def _batch_to_log(self, reward: DPGReward) -> ScoredBatch | None:
        """The training's last batch. After an evaluation, only the callback that logs it has it."""
        return next((callback.train_batch for callback in self._logging()), reward.last_batch)


class ChangedSetup(ValueError):
    """A checkpoint that is not whole, or not of this set-up."""


def batch_file(folder: str | Path, rank: int) -> Path:
    return Path(folder, f"dpg_batch_{rank}.safetensors")


def state_file(folder: str | Path, rank: int) -> Path:
    return Path(folder, f"dpg_state_{rank}.json")


def advance_prompts(train_dataloader, epochs: int) -> None:
    """
    Draw the orders of the prompts in earlier epochs, so that the next order drawn is that of the current epoch.

    TRL's sampler starts with the first order in each process, in whatever epoch the run goes on.
    """
    sampler = train_dataloader.batch_sampler
    while sampler is not None and not isinstance(sampler, RepeatSampler):
        inner = vars(sampler).get("batch_sampler")  # of the shard of a process
        sampler = vars(sampler).get("sampler") if inner is None else inner
    if sampler is not None and sampler.shuffle:
        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


def _table(logs: dict[str, Any]) -> dict[str, Any]:
    """TRL's table of the completions of the last batch, without images."""
    return {
        name: {key: list(own) for key, own in column.items()} if isinstance(column, dict) else list(column)
        for name, column in logs.items()
        if name != "images"
    }


def _fill_table(logs: dict[str, Any], table: dict[str, Any]) -> None:
    for name, column in table.items():
        if isinstance(column, dict):
            for key, own in column.items():
                logs[name][key].extend(own)
        else:
            logs[name].extend(column)


def _from_batch(batch: ScoredBatch) -> dict[str, Any]:
    own = batch.token_scores
    lists: dict[str, Any] = {"token_scores": own and [scores.tolist() for scores in own]}
    return vars(batch) | {"scores": batch.scores.tolist()} | lists


def _to_batch(figures: dict[str, Any]) -> ScoredBatch:
    own = figures["token_scores"]
    tensors: dict[str, Any] = {
        "scores": torch.tensor(figures["scores"], dtype=torch.float64),
        "token_scores": own and [torch.tensor(scores) for scores in own],
    }
    return ScoredBatch(**figures | tensors)
