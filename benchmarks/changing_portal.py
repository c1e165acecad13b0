"""A portal whose clients have many resources, some of which move to another address all the time.

python -m benchmarks.changing_portal HOST PORT RESOURCES CHANGES_PER_SECOND
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall, react

from firezone_tunnel import PortalService
from firezone_tunnel.core.portal.account import PeerRole
from firezone_tunnel.core.portal.devices import DeviceSession
from tests.system.product import SEED

READY = "the portal is ready"
_INTERVAL = 0.01  # seconds


class Changes:
    """Moves the resources of each client, in turn, between two networks."""

    def __init__(self, portal: PortalService, at_once: int) -> None:
        self._portal = portal
        self._at_once = at_once
        self._moving: dict[DeviceSession, list[Mapping[str, Any]]] = {}
        self._next = 0

    def send(self) -> None:
        assert self._portal.hub is not None
        for session in self._portal.hub._state.presence.joined(PeerRole.CLIENT):
            if session not in self._moving:
                resources = session.resources.values()
                self._moving[session] = [one for one in resources if one["name"].startswith("Moving")]
            moving = self._moving[session]
            for number in range(self._next, self._next + self._at_once):
                resource = moving[number % len(moving)]
                network = "10.61." if number // len(moving) % 2 == 0 else "10.60."
                address = network + resource["address"].split(".", 2)[2]
                session.socket.push("resource_created_or_updated", dict(resource) | {"address": address})
        self._next += self._at_once


def seed(resources: int) -> str:
    """The demo's seed with many more resources."""
    return SEED + "".join(
        f'\n[[resources]]\nname = "Moving {number}"\ntype = "cidr"\naddress = "10.60.{number >> 8}.{number & 255}/32"\n'
        f'site = "HQ"\n\n[[policies]]\ngroup = "Everyone"\nresource = "Moving {number}"\n'
        for number in range(resources)
    )


async def main(reactor: Any, host: str, port: str, resources: str, changes_per_second: str) -> None:
    directory = Path(tempfile.mkdtemp())
    seed_path = directory / "portal.toml"
    seed_path.write_text(seed(int(resources)))
    portal = PortalService(
        reactor, listen=(host, int(port)), seed_path=seed_path, database=directory / "portal.sqlite3"
    )
    reactor.addSystemEventTrigger("before", "shutdown", portal.stopService)
    portal.startService()
    await portal.ready
    print(READY, flush=True)
    changes = Changes(portal, round(int(changes_per_second) * _INTERVAL))
    await LoopingCall(changes.send).start(_INTERVAL)
    await Deferred()


if __name__ == "__main__":
    react(main, sys.argv[1:])
