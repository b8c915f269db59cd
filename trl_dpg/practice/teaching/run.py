"""Asks a teacher for all samples that are missing, many at a time."""

import asyncio
import contextlib
import datetime
import heapq
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...metagradients.config import SettingsError
from .answers import Answer
from .client import Client, Messages
from .display import Display
from .errors import Disturbed, Refused, Rejected, TeacherError, Unanswered, Unreachable, WrongRequest
from .journal import Journal
from .throttle import Throttle, Ticket


NUM_TRIES = 3
"""Connections that fail before the first answer until the address counts as wrong."""
GRACE = 30.0
"""Seconds, at most, for the answers on their way when the server has been away for too long."""


@dataclass
class Limits:
    """
    How much is asked, and how fast.

    Args:
        max_concurrency (`int`, *optional*, defaults to `64`):
            Requests at once, at most. A lower limit of the server is found.
        max_requests_per_minute (`float`, *optional*):
            Requests that may start in a minute.
        max_tokens_per_minute (`float`, *optional*):
            Tokens, of prompts and answers, in a minute.
        max_cost (`float`, *optional*):
            Dollars, of all samples in the folder. No request starts if it and those on their way could cost more, each
            counted like the dearest sample so far.
        max_wait (`float`, *optional*, defaults to `300.0`):
            Seconds that the server may be away, or refuse everything. After them, the run stops.
        max_retries (`int`, *optional*, defaults to `6`):
            How often a request is sent again after a server's error, a broken connection or half an answer.
        max_failed_share (`float`, *optional*, defaults to `0.5`):
            The run stops if this share of its requests has failed, and at least 10.

    Raises:
        `ValueError`: If a limit cannot be right.
    """

    max_concurrency: int = 64
    max_requests_per_minute: float | None = None
    max_tokens_per_minute: float | None = None
    max_cost: float | None = None
    max_wait: float = 300.0
    max_retries: int = 6
    max_failed_share: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.max_concurrency <= 1000:
            raise SettingsError(f"`max_concurrency` must be between 1 and 1000, got {self.max_concurrency}.")
        for name in ("max_requests_per_minute", "max_tokens_per_minute", "max_cost"):
            if vars(self)[name] is not None and vars(self)[name] <= 0:
                raise SettingsError(f"`{name}` must be positive, got {vars(self)[name]}.")
        if self.max_wait < 0:
            raise SettingsError(f"`max_wait` must be at least 0 seconds, got {self.max_wait}.")
        if self.max_retries < 0:
            raise SettingsError(f"`max_retries` must be at least 0, got {self.max_retries}.")
        if not 0 < self.max_failed_share <= 1:
            raise SettingsError(f"`max_failed_share` is a share, above 0 and at most 1, got {self.max_failed_share}.")


@dataclass
class Request:
    """
    One sample of one prompt that is to be asked for.

    Attributes:
        prompt (`str` or `list[dict]`): The prompt as the dataset has it.
        messages (`list[dict]`): What is sent.
        row (`int`), sample (`int`): The prompt's row, and the number of the sample.
        key (`str`): See `sample_key`.
        columns (`dict[str, Any]`): Further columns of the sample.
        attempts (`int`): Attempts that were disturbed.
    """

    prompt: str | Messages
    messages: Messages
    row: int
    sample: int
    key: str
    columns: dict[str, Any]
    attempts: int = 0


class Run:
    """
    Sends the requests, stores the answers, and stops when all is there or nothing more can be done.

    Args:
        client ([`Client`]): The teacher's client.
        journal ([`Journal`]): The open journal.
        requests (`Iterator[Request]`): The missing samples.
        limits ([`Limits`]): How much is asked, and how fast.
        display ([`Display`]): What is shown meanwhile.

    Attributes:
        accepted (`int`), failed (`int`): Requests of this run that were answered, and that were given up.
        stopped (`str` or `None`): Why the run stopped before all was there.
        broken (`bool`): Whether it stopped because the server is away, refuses everything, or fails too often.
        error (`TeacherError` or `None`): Set if the teacher cannot be used as it is.
    """

    def __init__(
        self, client: Client, journal: Journal, requests: Iterator[Request], limits: Limits, display: Display
    ):
        self.client, self.journal, self.limits, self.display = client, journal, limits, display
        self.accepted = self.failed = 0
        self.stopped: str | None = None
        self.broken = False
        self.error: TeacherError | None = None
        self.throttle = Throttle(limits.max_concurrency, limits.max_requests_per_minute, limits.max_tokens_per_minute)
        self._new = requests
        self._again: list[tuple[float, int, Request]] = []  # requests that are sent again, by time
        self._next: Request | None = None
        self._tasks: dict[asyncio.Task, Ticket] = {}
        self._changed = asyncio.Event()
        self._unreachable = 0  # connections that failed before the first answer
        self._away = ""  # what the last attempt to connect said
        self._missed_at = -math.inf  # when it failed
        self._give_up_at = math.inf  # when answers on their way are not waited for any more

    async def go(self) -> None:
        """
        Run to the end. Answers that are on their way when it stops are stored. If it stops because the server is
        away, they are waited for `GRACE` seconds at most.
        """
        with self._interruptible():
            while True:
                self._check_away()
                seconds = self._start_all() if self.stopped is None else None
                self.display.show(self)
                if seconds is None and not self._tasks:
                    break
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(seconds or 1.0, 1.0))

    def stop(self, reason: str, broken: bool = False) -> None:
        """Start nothing more. Answers that are on their way are still stored, see [`Run.go`]."""
        if self.stopped is None:
            self.stopped, self.broken = reason, broken
        self._changed.set()

    def _check_away(self) -> None:
        """Stop if the server has been away for too long, and some time later give up what is on its way."""
        since, most, now = self.throttle.away_since, self.limits.max_wait, time.monotonic()
        # A request that was sent after the last failed attempt is connected, or will fail soon
        connected = any(ticket.time > self._missed_at for ticket in self._tasks.values())
        if self.stopped is None and since is not None and now - since >= most and not connected:
            self.stop(f"the server does not answer any more: {self._away}, for {most:g} s", broken=True)
            self._give_up_at = now + GRACE
            if self._tasks:
                self.display.say(f"Waiting for {len(self._tasks)} answers on their way, for {GRACE:g} s at most.")
        if now >= self._give_up_at:
            for task in self._tasks:
                task.cancel()

    def _start_all(self) -> float | None:
        """Start what may start now. Returns the seconds until more may, or `None` if nothing more is to be asked."""
        while True:
            request, seconds = self._first()
            if request is None:
                return seconds
            wait = self.throttle.wait(expected := self.journal.tally.expected_tokens(request.messages))
            if wait > 0:
                return wait
            if not self._can_pay():
                if not self._tasks:
                    self.stop(f"max_cost is reached: ${self.journal.tally.cost:.4f} spent")
                return None if not self._tasks else 1.0
            self._take(request)
            ticket = self.throttle.start(expected)
            task = asyncio.create_task(self._send(request, ticket))
            self._tasks[task] = ticket
            task.add_done_callback(self._ended)

    def _first(self) -> tuple[Request | None, float | None]:
        """The request whose turn it is, or the seconds until there is one."""
        if self._again and self._again[0][0] <= time.monotonic():
            return self._again[0][2], None
        if self._next is None:
            self._next = next(self._new, None)
        if self._next is None and self._again:
            return None, self._again[0][0] - time.monotonic()
        return self._next, 1.0 if self._tasks else None

    def _take(self, request: Request) -> None:
        if request is self._next:
            self._next = None
        else:
            heapq.heappop(self._again)

    def _can_pay(self) -> bool:
        """Whether one more request fits into `max_cost`."""
        most, tally = self.limits.max_cost, self.journal.tally
        if most is None:
            return True
        if not tally.dearest:  # the first answer shows the price
            return not self._tasks
        return tally.cost + (len(self._tasks) + 1) * tally.dearest <= most

    def _ended(self, task: asyncio.Task) -> None:
        del self._tasks[task]
        self._changed.set()
        if not task.cancelled() and task.exception() is not None:  # an error of our own, such as a full disk
            self.stop(f"{task.exception()!r}")
            self.error = self.error or TeacherError(f"An answer could not be stored: {task.exception()!r}")

    async def _send(self, request: Request, ticket: Ticket) -> None:
        """One attempt, and what follows from it."""
        began = time.monotonic()
        try:
            answer = await self.client.ask(request.messages, request.sample)
        except Refused as error:
            self._refuse(request, error, self.throttle.refused(ticket, error.retry_after))
        except Unreachable as error:
            self._miss(request, ticket, error)
        except Disturbed as error:
            request.attempts += 1
            delay = self.throttle.failed(ticket, request.attempts, answered=not isinstance(error, Unanswered))
            if request.attempts > self.limits.max_retries:
                self._give_up(request, str(error), final=False)
            else:
                self._later(request, delay)
        except WrongRequest as error:
            self.throttle.failed(ticket, 0)
            cause = await self.client.explained(error) if not self.accepted else error
            if isinstance(cause, TeacherError):
                self._fail_all(cause)
            else:
                self._give_up(request, str(error), final=True)
        except Rejected as error:
            self.throttle.accepted(ticket)
            self._give_up(request, str(error), final=True)
        except TeacherError as error:
            self.throttle.failed(ticket, 0)
            self._fail_all(error)
        else:
            self.journal.store(_record(request, answer, time.monotonic() - began))
            self.accepted += 1
            usage = answer.usage
            self.throttle.accepted(ticket, (usage["prompt_tokens"] or 0) + (usage["completion_tokens"] or 0))

    def _miss(self, request: Request, ticket: Ticket, error: Unreachable) -> None:
        """There is no server. The request waits for it, and this is no attempt of its own."""
        pauses = self.throttle.pauses
        delay = self.throttle.unreachable(ticket)
        self._away, self._missed_at = str(error), time.monotonic()
        self._unreachable += not self.accepted
        if self._unreachable >= NUM_TRIES:
            self._fail_all(TeacherError(f"The server cannot be reached: {error}. Is `base_url` right?"))
        elif self.throttle.pauses > pauses:
            left = self.limits.max_wait - (time.monotonic() - (self.throttle.away_since or 0.0))
            self.display.say(
                f"The server does not answer ({error}). Next attempt in {min(delay, max(left, 0.0)):.0f} s. "
                f"If it stays away, this stops in {max(left, 0.0):.0f} s."
            )
        self._later(request, delay)

    def _refuse(self, request: Request, error: Refused, delay: float) -> None:
        asked, most = error.retry_after or 0.0, self.limits.max_wait
        since = self.throttle.refused_since
        refuses_all = since is not None and time.monotonic() - since > most and not self.throttle.in_flight
        if refuses_all or asked > most:
            when = f"asks to wait {asked:.0f} s" if asked > most else f"refuses all for {most:g} s"
            self.stop(f"the server {when} ({error})", broken=True)
        self._later(request, delay)

    def _later(self, request: Request, delay: float) -> None:
        heapq.heappush(self._again, (time.monotonic() + delay, id(request), request))

    def _fail_all(self, error: TeacherError) -> None:
        self.error = self.error or error
        self.stop(str(error))

    def _give_up(self, request: Request, reason: str, final: bool) -> None:
        self.failed += 1
        self.journal.fail(
            {
                "prompt": request.prompt,
                "reason": reason,
                "final": final,
                "attempts": request.attempts or 1,
                "row": request.row,
                "sample": request.sample,
                "created": now_utc(),
                "key": request.key,
            }
        )
        if self.failed >= 10 and self.failed >= self.limits.max_failed_share * (self.failed + self.accepted):
            self.stop(
                f"{self.failed} of {self.failed + self.accepted} requests have failed, the last one with: {reason}",
                broken=True,
            )

    @contextlib.contextmanager
    def _interruptible(self):
        """The first Ctrl-C waits for the answers that are on their way, the second one does not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def interrupt():
            loop.remove_signal_handler(signal.SIGINT)
            self.stop("interrupted")
            self.display.say(f"Waiting for {len(self._tasks)} answers on their way. Ctrl-C again ends at once.")

        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)


def now_utc() -> str:
    """The date and time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _record(request: Request, answer: Answer, seconds: float) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "completion": answer.completion,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "usage": answer.usage,
        "correct": None,
        "row": request.row,
        "sample": request.sample,
        "model": answer.model,
        "seconds": round(seconds, 3),
        "created": now_utc(),
        "key": request.key,
        **request.columns,
    }
