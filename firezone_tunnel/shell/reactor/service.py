"""Twisted's services with types: Twisted has no annotations on what subclasses call by `super()`."""

from __future__ import annotations

from typing import Any

from twisted.application import service
from twisted.internet.defer import Deferred


class Service(service.Service):
    """A service whose subclasses may call every method by `super()` under mypy --strict."""

    def setServiceParent(self, parent: Any) -> None:
        super().setServiceParent(parent)  # type: ignore[no-untyped-call]  # Twisted has no types here

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]  # Twisted has no types here

    def stopService(self) -> Deferred[Any] | None:
        super().stopService()  # type: ignore[no-untyped-call]  # Twisted has no types here
        return None


class MultiService(service.MultiService):
    """The same for a service with children, which start in order and stop concurrently."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Twisted has no types here

    def setServiceParent(self, parent: Any) -> None:
        super().setServiceParent(parent)  # type: ignore[no-untyped-call]  # Twisted has no types here

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]  # Twisted has no types here

    def stopService(self) -> Deferred[Any] | None:
        stopped: Deferred[Any] = super().stopService()  # type: ignore[no-untyped-call]  # Twisted has no types here
        return stopped
