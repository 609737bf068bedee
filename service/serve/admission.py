"""Admission: a fixed number of permits, taken without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Overloaded
from service.metrics import IN_FLIGHT, REJECTED


class Admission:
    """Counts requests in flight and turns away what exceeds `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0

    @contextmanager
    def permit(self) -> Iterator[None]:
        """Hold one permit.

        Raises:
            Overloaded: all permits are taken (429).
        """
        if self.in_flight >= self.limit:
            REJECTED.labels("overloaded").inc()
            raise Overloaded(f"{self.in_flight} requests are in flight and the limit is {self.limit}", retry_after=1)
        self.in_flight += 1
        IN_FLIGHT.set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            IN_FLIGHT.set(self.in_flight)
