"""Limits how often a message repeats, so that neither a peer nor the network can fill the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from firezone_tunnel.shell.logs import events as log

INTERVAL = 60.0
MAX_KEYS = 64

_boottime = partial(time.clock_gettime, time.CLOCK_BOOTTIME)  # `reactor.clock` is above this package


class Limiter:
    """Logs a message at most once per interval and key, and the repetitions at DEBUG.

    A message that follows suppressed ones has a field `suppressed`, their number. At most `max_keys` messages are
    logged per interval, however many keys there are.
    """

    def __init__(
        self,
        *,
        interval: float = INTERVAL,
        max_keys: int = MAX_KEYS,
        clock: Callable[[], float] = _boottime,
    ) -> None:
        """`interval` is in seconds on `clock`."""
        self._interval = interval
        self._max_keys = max_keys
        self._clock = clock
        self._logged_at: dict[Hashable, float] = {}  # the oldest first
        self._suppressed: dict[Hashable, int] = {}
        self._suppressed_others = 0  # of keys that found the table full

    def info(self, message_type: str, *, key: Hashable = None, **fields: Any) -> None:
        """`key` distinguishes messages of one type."""
        self._log(log.info, message_type, key, fields)

    def warning(self, message_type: str, *, key: Hashable = None, **fields: Any) -> None:
        """`key` distinguishes messages of one type."""
        self._log(log.warning, message_type, key, fields)

    def admit(self, key: Hashable) -> int | None:
        """The number of messages with this key that were suppressed since the last one; None: suppress this one, too.

        For messages whose fields are costly.
        """
        now = self._clock()
        last = self._logged_at.get(key)
        if last is not None and now < last + self._interval:
            self._suppressed[key] = self._suppressed.get(key, 0) + 1
            return None
        if last is None and len(self._logged_at) >= self._max_keys and not self._forget_oldest(now):
            self._suppressed_others += 1
            return None
        self._logged_at.pop(key, None)
        self._logged_at[key] = now
        suppressed = self._suppressed.pop(key, 0)
        if last is None:
            suppressed, self._suppressed_others = suppressed + self._suppressed_others, 0
        return suppressed

    def _log(self, write: Callable[..., None], message_type: str, key: Hashable, fields: dict[str, Any]) -> None:
        suppressed = self.admit((message_type, key))
        if suppressed is None:
            log.debug(message_type, **fields)
        elif suppressed:
            write(message_type, **fields, suppressed=suppressed)
        else:
            write(message_type, **fields)

    def _forget_oldest(self, now: float) -> bool:
        """False: it was logged less than an interval ago."""
        oldest = next(iter(self._logged_at))
        if now < self._logged_at[oldest] + self._interval:
            return False
        del self._logged_at[oldest]
        self._suppressed_others += self._suppressed.pop(oldest, 0)
        return True
