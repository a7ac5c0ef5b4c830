"""Connections to the page, of which nobody may hold many, or one for long without a request."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 100
"""Number of connections that are kept open. A browser opens about six."""
PATIENCE = 10.0
"""Seconds in which a request must have come whole, and in which a client must read on."""
PERIOD = 1.0
"""Seconds between two looks at a connection."""


class ImpatientProtocol(H11Protocol):
    """HTTP with limits on the time that a client may take and on the number of connections.

    If there are too many, the one that has waited longest without a whole request is closed, so
    that a new one is always answered.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, in place of an idle one if need be."""
        super().connection_made(transport)
        self.since = self.loop.time()
        """When the request began that is waited for, or the client has last read."""
        self.unread = 0
        self.look = self.loop.call_later(PERIOD, self._look)

        if len(self.connections) > MAX_CONNECTIONS:
            others: list[Any] = [other for other in self.connections if other is not self]
            waiting = [other for other in others if other.is_waiting()]
            longest = min(waiting, key=lambda other: other.since, default=self)
            longest.transport.abort()
            # It counts no more, although the end of a connection is told a little later.
            self.connections.discard(longest)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection that has ended."""
        self.look.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.since = self.loop.time()
        super().on_response_complete()

    def is_waiting(self) -> bool:
        """Tell whether no whole request has come since the last answer."""
        cycle: Any = self.cycle  # None before the first request
        return cycle is None or cycle.response_complete or cycle.more_body

    def _look(self) -> None:
        """Close the connection if the client is too slow."""
        now = self.loop.time()
        unread = self.transport.get_write_buffer_size()
        has_read = unread != self.unread or not unread
        if has_read and not self.is_waiting():
            # The answer is being computed, or the client reads it.
            self.since = now
        self.unread = unread

        if now - self.since > PATIENCE:
            self.transport.abort()
        else:
            self.look = self.loop.call_later(PERIOD, self._look)
