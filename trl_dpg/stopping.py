"""Saves and stops a training when the process is told to end."""

import os
import signal
import sys
import threading
import time
from types import FrameType

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 75
"""Exit status of a run that a signal stopped and that can go on (EX_TEMPFAIL: try again later)."""
SAME_SIGNAL = 1.0  # seconds


class StopOnSignal(TrainerCallback):
    """
    Saves a checkpoint and stops at the end of the step in which SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 arrives on any
    process. A second signal ends the process at once, without saving. Signals that follow the first within a second
    are the same one: a launcher passes on what its processes get from the terminal, too.

        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            trainer.train()
        if stop.received is not None:
            sys.exit(STOPPED)

    Outside of a training there is nothing to save: a signal then raises `SystemExit` with the status `STOPPED`.

    Args:
        outside (`str`, *optional*): What is printed if a signal arrives outside of a training.

    Attributes:
        received (`signal.Signals` or `None`): The signal that arrived.
    """

    def __init__(self, outside: str = "Nothing was to be saved."):
        self.outside = outside
        self.received: signal.Signals | None = None
        self._training = False
        self._received_at = 0.0
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():  # the others may not set handlers
            self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at > SAME_SIGNAL:
                os._exit(128 + number)  # as if nothing had caught the signal
            return
        self.received, self._received_at = signal.Signals(number), time.monotonic()
        if not self._training:
            say(f"Stopped by {self.received.name}. {self.outside}")
            sys.exit(STOPPED)
        say(f"{self.received.name}: saving and stopping after this step. A second signal stops at once.")

    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True

    def on_step_end(self, args, state, control, **kwargs):
        first = self.received
        if args.world_size > 1:  # all processes stop after the same step
            first = next((number for number in gather_object([first]) if number is not None), None)
        if first is not None:
            self.received = first
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False


def say(line: str) -> None:
    if PartialState().is_main_process:
        print(line, file=sys.stderr, flush=True)
