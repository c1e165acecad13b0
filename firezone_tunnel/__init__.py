"""A Firezone-compatible zero-trust tunnel: client, gateway, relay and portal.

The public names resolve lazily (PEP 562): importing this package loads neither a reactor nor an
application. `firezone_tunnel.aio` has the same names as coroutines, for asyncio programs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "EventStream": "firezone_tunnel.client.session",
    "Session": "firezone_tunnel.client.session",
    "SessionClosed": "firezone_tunnel.errors",
    "FirezoneError": "firezone_tunnel.errors",
}

__all__ = ["EventStream", "FirezoneError", "Session", "SessionClosed", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
