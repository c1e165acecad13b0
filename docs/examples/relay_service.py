"""Run a relay in a program until it is interrupted, or the portal refuses it.

FIREZONE_TOKEN=… python relay_service.py wss://portal.example/ 203.0.113.7 3478
"""

import os
import sys
from typing import Any

from twisted.internet import task

from firezone_tunnel import ConfigurationError, PlatformError, RelayService


async def main(reactor: Any, portal: str, public_ipv4: str, port: str) -> None:
    token = os.environ.pop("FIREZONE_TOKEN")
    try:
        relay = RelayService(reactor, url=portal, token=token, public_ipv4=public_ipv4, listen_port=int(port))
        relay.startService()
    except (ConfigurationError, PlatformError) as error:
        sys.exit(str(error))
    reactor.addSystemEventTrigger("before", "shutdown", relay.stopService)
    relay.ready.addCallback(lambda _: print("the relay is ready", flush=True))
    sys.exit(str(await relay.failed))


if __name__ == "__main__":
    task.react(main, sys.argv[1:])
