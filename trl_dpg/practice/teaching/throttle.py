"""How many requests a server gets at once, and when: a limit that is found, and budgets that are given."""

import math
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


FIRST_LIMIT = 4
"""Requests at once in the beginning."""
CUT = 0.75
"""The limit is multiplied by this number when the load is refused."""
EVIDENCE = 6.0
"""Log-likelihood ratio from which refusals count as an effect of the load; and for a wall, 1.5 times as much."""
WALL = 0.3
"""How much larger the share of refused requests is, at and above a level that is beyond the server's limit."""
MARGIN = 2.0
"""A server's limit is taken to be below the highest level whose evidence is less than the best one's by at most this
number: a limit that is found too high is soon found out, one that is found too low is not."""
MEMORY = 0.98
"""Weight of an earlier request at a level, after a further one."""
PROBE_AFTER = 600.0
"""Seconds after which one request more is tried than the server's limit was found to be."""
ROUND = 8
"""Errors in a row that count as one round, or as many as there are requests at once."""
FIRST_DELAY, LONGEST_DELAY = 0.1, 60.0
"""Seconds before a request is sent again."""
FIRST_PAUSE = 1.0
"""Seconds before the next attempt to connect to a server that is away."""


@dataclass(eq=False)
class Ticket:
    """
    A request on its way.

    Attributes:
        number (`int`): Requests that were started before it.
        level (`int`): Requests that were on their way when it started, itself included.
        full (`bool`): Whether it was the last one that the limit allowed.
        time (`float`): When it started.
        tokens (`float`): Its tokens: expected ones at first, counted ones when the answer is there.
    """

    number: int
    level: int
    full: bool
    time: float
    tokens: float


class Throttle:
    """
    Decides when a request may start. It holds no request itself: ask `wait`, call `start`, and report how it ended.

    The limit of requests at once starts at 4 and grows by one with each accepted request. It is multiplied by 0.75
    when requests are refused *because of the load*; from then on it grows by one in each round of accepted requests
    (additive increase, multiplicative decrease). Some servers refuse requests at any load. So the refusals at each
    level (the number of requests at once) are counted. A level is too high if a model with two rates of refusal, one
    below the level and one from it on, is much more likely than a model with one. If the second rate is much larger,
    the server has a limit below this level, or below a higher one that is nearly as likely. It is not exceeded again,
    except for a test every 10 minutes.

    If a whole round of requests goes wrong, nothing is started for a time that doubles with each further round. Nor is
    anything while the server is away, that is, cannot be connected to.

    Args:
        max_concurrency (`int`): Requests at once, at most.
        requests_per_minute (`float`, *optional*): Requests that may start in a minute. They are spread evenly.
        tokens_per_minute (`float`, *optional*): Tokens, of prompts and answers, of the requests of any minute.
        clock (`Callable`, *optional*): Seconds.

    Attributes:
        away_since (`float` or `None`): When the server could not be connected to for the first time since it last
            answered. `None` while it answers.
        pauses (`int`): Attempts to connect since then.
        refused_since (`float` or `None`): When a request was refused for the first time since one ended in another
            way.
    """

    def __init__(
        self,
        max_concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_concurrency = max_concurrency
        self.ceiling = max_concurrency  # what the server was found to allow
        self.in_flight = 0
        self._size = float(min(FIRST_LIMIT, max_concurrency))
        self._has_been_cut = False
        self._spacing = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_budget = tokens_per_minute
        self._clock = clock
        self._next_start = self._pause_until = clock()
        self._probe_at = math.inf
        self._recent: deque[Ticket] = deque()
        # By level: not refused (yet), and refused. Refusals come sooner than answers, so what is on its way counts too
        self._counts: dict[int, list[float]] = {}
        self._started = self._first_after_cut = self._errors_in_a_row = self.pauses = 0
        self.away_since: float | None = None
        self.refused_since: float | None = None

    @property
    def limit(self) -> int:
        """Requests that may be on their way at once."""
        return max(1, int(self._size))

    def wait(self, tokens: float = 0.0) -> float:
        """Seconds until a request with this number of expected tokens may start. Infinite until another one ends."""
        now = self._clock()
        if now >= self._probe_at:
            self.ceiling, self._probe_at = min(self.ceiling + 1, self.max_concurrency), math.inf
        if self.in_flight >= self.limit:
            return math.inf
        return max(0.0, self._pause_until - now, self._next_start - now, self._token_wait(tokens, now))

    def _token_wait(self, tokens: float, now: float) -> float:
        if self._token_budget is None:
            return 0.0
        while self._recent and self._recent[0].time <= now - 60:
            self._recent.popleft()
        excess = sum(ticket.tokens for ticket in self._recent) + tokens - self._token_budget
        for ticket in self._recent:  # a request larger than the whole budget waits for an empty minute
            if excess <= 0:
                return 0.0
            excess -= ticket.tokens
            if excess <= 0 or ticket is self._recent[-1]:
                return ticket.time + 60 - now
        return 0.0

    def start(self, tokens: float = 0.0) -> Ticket:
        """Count a request that starts now."""
        now = self._clock()
        self._next_start = max(self._next_start, now) + self._spacing
        self.in_flight += 1
        ticket = Ticket(self._started, self.in_flight, self.in_flight >= self.limit, now, tokens)
        self._started += 1
        counts = self._counts.setdefault(ticket.level, [0.0, 0.0])
        counts[:] = MEMORY * counts[0] + 1, MEMORY * counts[1]
        if self._token_budget is not None:
            self._recent.append(ticket)
        return ticket

    def accepted(self, ticket: Ticket, tokens: float = 0.0) -> None:
        """A request was answered, with this number of tokens."""
        self._ended(ticket, tokens)
        self.refused_since = None
        self._errors_in_a_row = 0
        if ticket.full:
            self._size = min(self._size + (1 / self._size if self._has_been_cut else 1), self.ceiling)

    def failed(self, ticket: Ticket, attempts: int, answered: bool = True) -> float:
        """
        A request failed for another reason than its rate. Without an answer, a server that is away still counts as
        away. Returns the seconds before its next attempt.
        """
        self._ended(ticket, answered=answered)
        self.refused_since = None
        return self._delay(attempts)

    def unreachable(self, ticket: Ticket) -> float:
        """A request found no server. Nothing starts for a time that doubles with each attempt. Returns its seconds."""
        self.in_flight -= 1
        ticket.tokens = 0.0
        self.refused_since = None
        now = self._clock()
        self.away_since = now if self.away_since is None else self.away_since
        if ticket.time >= self._pause_until:  # those that were on their way together are one attempt
            self._pause_until = now + min(FIRST_PAUSE * 2.0**self.pauses, LONGEST_DELAY)
            self.pauses += 1
        return max(self._pause_until - now, 0.0)

    def _ended(self, ticket: Ticket, tokens: float = 0.0, answered: bool = True) -> None:
        """The server has taken the request, and answered it or not."""
        self.in_flight -= 1
        ticket.tokens = tokens
        if answered:
            self.away_since, self.pauses = None, 0

    def refused(self, ticket: Ticket, retry_after: float | None = None) -> float:
        """A request was refused because of its rate. Returns the seconds before its next attempt."""
        self._ended(ticket)
        self.refused_since = self._clock() if self.refused_since is None else self.refused_since
        if ticket.level in self._counts:
            counts = self._counts[ticket.level]
            counts[:] = counts[0] - min(counts[0], 1), counts[1] + min(counts[0], 1)
        delay = max(self._delay(0), (retry_after or 0.0) * random.uniform(1.0, 1.05))
        if self._is_round() and self.in_flight < self.limit / 2:  # nothing is accepted any more
            self._pause_until = max(self._pause_until, self._clock() + delay)
            self._cut()
        elif ticket.number < self._first_after_cut:
            pass  # it was sent before the last cut, and says nothing of the limit since then
        elif self._errors_in_a_row >= 2 * max(ROUND, self.limit):  # the refused ones hide the load that is refused
            self._cut()
        else:
            level, evidence, excess, highest = loaded_level(self._counts)
            if ticket.level >= level and evidence >= EVIDENCE:
                if excess >= WALL and evidence >= 1.5 * EVIDENCE:
                    self._set_ceiling(highest - 1)
                if excess < WALL or self.ceiling < highest:
                    self._cut()
        return delay

    def _delay(self, attempts: int) -> float:
        self._errors_in_a_row += 1
        rounds = self._errors_in_a_row // max(ROUND, self.limit) if self.in_flight < self.limit / 2 else 0
        if rounds and self._is_round():
            self._pause_until = max(self._pause_until, self._clock() + FIRST_DELAY * 2.0 ** min(rounds, 10))
        return min(FIRST_DELAY * 2.0 ** min(rounds + attempts, 20), LONGEST_DELAY) * random.uniform(0.5, 1.0)

    def _is_round(self) -> bool:
        return self._errors_in_a_row % max(ROUND, self.limit) == 0

    def _cut(self) -> None:
        self._size = max(1.0, CUT * min(self._size, self.ceiling))
        self._has_been_cut = True
        self._first_after_cut = self._started

    def _set_ceiling(self, level: int) -> None:
        self.ceiling = level
        self._probe_at = self._clock() + PROBE_AFTER
        self._counts = {key: counts for key, counts in self._counts.items() if key <= level}


def loaded_level(counts: dict[int, list[float]]) -> tuple[int, float, float, int]:
    """
    The level from which requests are refused more often than below it.

    Args:
        counts (`dict[int, list[float]]`): Accepted and refused requests by level.

    Returns:
        The level; the log-likelihood ratio of two rates of refusal, one below the level and one from it on, against a
        single rate; the difference of the two rates; the highest level that is nearly as likely. `(0, 0.0, 0.0, 0)` if
        no level has more.
    """
    found = [(0, 0.0, 0.0)]
    accepted, refused = (sum(count[kind] for count in counts.values()) for kind in (0, 1))
    one_rate = _log_likelihood(accepted, refused)
    accepted_below = refused_below = 0.0
    for level in sorted(counts):
        accepted_above, refused_above = accepted - accepted_below, refused - refused_below
        if accepted_below and refused_above * accepted_below > refused_below * accepted_above:
            two_rates = _log_likelihood(accepted_below, refused_below) + _log_likelihood(accepted_above, refused_above)
            share_above = refused_above / (accepted_above + refused_above)
            share_below = refused_below / (accepted_below + refused_below)
            found.append((level, two_rates - one_rate, share_above - share_below))
        accepted_below += counts[level][0]
        refused_below += counts[level][1]
    best = max(found, key=lambda level: level[1])
    return *best, max(level for level, evidence, _ in found if evidence >= best[1] - MARGIN)


def _log_likelihood(accepted: float, refused: float) -> float:
    """Of these outcomes, at their own rate."""
    total = accepted + refused
    return sum(count * math.log(count / total) for count in (accepted, refused) if count > 0)
