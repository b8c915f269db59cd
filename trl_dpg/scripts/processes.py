"""Waits for the processes of a launched command: passes signals on to them, and ends with their exit status."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from subprocess import CalledProcessError

import psutil
from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..stopping import SAME_SIGNAL, SIGNALS, STOPPED


def start_and_wait(arguments, prog: str, further: str = "") -> None:
    """
    Start the processes of a command with accelerate, and wait for them. If one fails, this process ends, too.

    Args:
        arguments (`argparse.Namespace`): Arguments of `accelerate launch`.
        prog (`str`): The command, for messages.
        further (`str`, *optional*): What the command needs in addition to go on.

    Raises:
        `SystemExit`: With the exit status of the process that failed first. It is 128 plus the number of a signal that
            ended it, but `STOPPED` if this signal came through this process.
    """
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"  # torch would give processes 30 s for the others; ours may save
    with _passing_signals_on() as received:
        try:
            launch.launch_command(arguments)
        except CalledProcessError as error:  # of one process
            rank, status = 0, error.returncode
        except ChildFailedError as error:  # of several processes
            rank, status = first_failure(error.failures)
        else:
            return
    if status >= 0:  # the process has said why
        sys.exit(status)
    if -status in received:
        sys.exit(STOPPED)  # before it could catch the signal
    cause = ", as the system does when memory is short" if status == -signal.SIGKILL else ""
    print(
        f"{prog}: error: The process of rank {rank} was ended by {signal.Signals(-status).name}{cause}. The other "
        f"processes were stopped. Go on with the same command{further}.",
        file=sys.stderr,
    )
    sys.exit(128 - status)


def first_failure(failures: dict) -> tuple[int, int]:
    """
    The rank and the exit status of the process that failed first, of `ProcessFailure`s by their ranks.

    Within a second, the times do not tell. A process that a signal ended is then before those that lost it, and those
    that were only stopped, by SIGTERM, come last.
    """

    def order(rank: int) -> tuple:
        status = failures[rank].exitcode
        stopped = status in (-signal.SIGTERM, 128 + signal.SIGTERM)
        return failures[rank].timestamp, stopped, status > 0, -abs(status)

    first = min(failures, key=order)
    return first, failures[first].exitcode


@contextmanager
def _passing_signals_on() -> Iterator[list[int]]:
    """
    Pass the signals that stop a training on to its processes, which save and end. A second one ends all at once.

    Yields:
        `list[int]`: The signals that arrived.
    """
    received: list[int] = []
    first = 0.0

    def receive(number, frame):
        nonlocal first
        children = psutil.Process().children(recursive=bool(received))
        if not children:
            sys.exit(STOPPED)
        again = bool(received) and time.monotonic() - first > SAME_SIGNAL
        first = first or time.monotonic()
        received.append(number)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL if again else number)
        if again:
            os._exit(128 + number)

    handlers = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
