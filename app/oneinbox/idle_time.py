"""How long a server keeps an idle connection: what it says, what was seen, and a careful beginning."""

import random

from app.oneinbox.http1 import Connection

FIRST_SECONDS = 15.0
"""Assumed until something is known: few servers close sooner."""
LONGEST_SECONDS = 300.0
"""No idle connection is used after this long: NATs and load balancers drop theirs silently, from 350 s on."""
LEAD_SECONDS = 5.0
"""A connection is safe while one that is this much older is still open."""
RELEARN_SECONDS = 3600.0
"""What was learnt is tried again this long after."""
TIMER_SECONDS = 0.5
"""A server's timer may be early by this much."""
MARGIN, JITTER = 0.05, 0.03
"""Shares of the idle time: kept clear of its end; and varied, so that processes do not renew together."""


class IdleTime:
    """The idle time of one kind of connection: of those that have carried a request, or of those that have not.

    A connection that is retired may stay open, unused, as the leader. While the server keeps it, younger ones are safe;
    when the server closes it, its age is the answer. So learning costs no request and no handshake, and a wrong answer
    (a restarted server looks like a short idle time) is corrected by the next leader.
    """

    def __init__(self) -> None:
        self._closes_after: float | None = None
        self._longest = LONGEST_SECONDS
        self._leader: Connection | None = None
        self._lead_from = float("-inf")
        self._spread = random.random()  # noqa: S311 - no secret
        self.connect_seconds = 0.0
        """Of the last connect: the server's timer began somewhere in it."""

    def usable(self, now: float) -> float:
        """Return the age in seconds up to which an idle connection may be used. `now`: the event loop's time."""
        known = self._closes_after
        age = FIRST_SECONDS if known is None else known - max(TIMER_SECONDS + self.connect_seconds, MARGIN * known)
        if self._leader is not None:
            age = max(age, now - self._leader.idle_since - LEAD_SECONDS)
        return min(age, self._longest)

    def renewal(self, now: float) -> float:
        """Return the age in seconds at which to replace a connection, so that the next is ready in time."""
        usable = self.usable(now)
        return usable - min(2 * self.connect_seconds, usable / 4) - JITTER * usable * self._spread

    def hint(self, seconds: float) -> None:
        """Note how long the server says it keeps them (`Keep-Alive: timeout=`)."""
        self._longest = min(LONGEST_SECONDS, seconds - max(TIMER_SECONDS + self.connect_seconds, MARGIN * seconds))

    def closed(self, age: float, now: float) -> None:
        """Note that the server closed an idle connection of this age in seconds."""
        self._closes_after, self._lead_from = age, now

    def lead(self, connection: Connection, now: float) -> bool:
        """Keep a retired connection as the leader, if one is wanted. Return whether it was."""
        if self._leader is not None or now < self._lead_from or not connection.is_reusable:
            return False
        self._leader = connection
        connection.on_lost = self._leader_lost
        left = connection.idle_since + self._longest + LEAD_SECONDS - now
        connection.loop.call_later(max(0.0, left), self._led_to_the_end, connection)
        return True

    def close(self) -> None:
        """Close the leader."""
        if self._leader is not None:
            self._leader.on_lost = None
            self._leader.abort()
            self._leader = None

    def _leader_lost(self, leader: Connection) -> None:
        now = leader.loop.time()
        self._learn(now - leader.idle_since, now)

    def _led_to_the_end(self, leader: Connection) -> None:
        if self._leader is leader:
            self.close()
            self._learn(LONGEST_SECONDS / (1 - MARGIN), leader.loop.time())

    def _learn(self, age: float, now: float) -> None:
        self._closes_after, self._lead_from, self._leader = age, now + RELEARN_SECONDS, None
        self._spread = random.random()  # noqa: S311 - no secret
