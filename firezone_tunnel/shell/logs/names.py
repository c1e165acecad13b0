"""The names that the portal gave to ids, for log messages."""

from __future__ import annotations

CAPACITY = 1024


class Names:
    """Names by id. Beyond the capacity the oldest are forgotten."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self.get = self._names.get
        """The name of an id, or None."""

    def learn(self, id_: str, name: str | None) -> None:
        """None and "" are no names."""
        if not name:
            return
        self._names.pop(id_, None)
        self._names[id_] = name
        if len(self._names) > CAPACITY:
            del self._names[next(iter(self._names))]
