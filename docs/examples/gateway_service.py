"""Run a gateway in a program until it is interrupted, or the portal refuses it. It needs root or CAP_NET_ADMIN.

FIREZONE_TOKEN=… python gateway_service.py wss://portal.example/
"""

import os
import sys
from typing import Any

from twisted.internet import task

from firezone_tunnel import ConfigurationError, GatewayService


async def main(reactor: Any, portal: str) -> None:
    token = os.environ.pop("FIREZONE_TOKEN")
    try:
        gateway = GatewayService(reactor, url=portal, token=token, state_directory="state")
    except ConfigurationError as error:
        sys.exit(str(error))
    reactor.addSystemEventTrigger("before", "shutdown", gateway.stopService)
    gateway.ready.addCallback(lambda _: print("the gateway is ready", flush=True))
    gateway.startService()
    sys.exit(str(await gateway.failed))


if __name__ == "__main__":
    task.react(main, sys.argv[1:])
