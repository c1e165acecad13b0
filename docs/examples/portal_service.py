"""Serve a portal from a program until it is interrupted.

python portal_service.py portal.toml 127.0.0.1 8081
"""

import sys
from typing import Any

from twisted.internet import task
from twisted.internet.defer import Deferred

from firezone_tunnel import FirezoneError, PortalService


async def main(reactor: Any, seed: str, host: str, port: str) -> None:
    portal = PortalService(reactor, listen=(host, int(port)), seed_path=seed, database="portal.sqlite3")
    reactor.addSystemEventTrigger("before", "shutdown", portal.stopService)
    portal.startService()
    try:
        await portal.ready
    except FirezoneError as error:
        sys.exit(str(error))
    print("the portal is ready", flush=True)
    await Deferred()


if __name__ == "__main__":
    task.react(main, sys.argv[1:])
