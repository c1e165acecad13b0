"""The connection of client, gateway and relay to their portal: a service of its own beside the tunnel's.

The public names resolve lazily (PEP 562): `url` is wanted where no reactor is.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "LoginUrl": "firezone_tunnel.portal_connection.url",
    "PortalService": "firezone_tunnel.portal_connection.service",
    "trust_from_file": "firezone_tunnel.portal_connection.service",
}

__all__ = ["LoginUrl", "PortalService", "trust_from_file"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
