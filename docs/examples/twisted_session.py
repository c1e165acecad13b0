"""Connect, and print each event until the tunnel is up.

FIREZONE_TOKEN=… python twisted_session.py wss://portal.example/
"""

import os
import sys
from typing import Any

from twisted.internet import task

from firezone_tunnel import Disconnected, Session, TunInterfaceUpdated


async def main(reactor: Any, portal: str) -> None:
    token = os.environ.pop("FIREZONE_TOKEN")
    session, events = Session.connect(url=portal, token=token, state_directory="state")
    async for event in events:
        print(type(event).__name__)
        if isinstance(event, TunInterfaceUpdated):
            print("the tunnel is up, our address is", event.ipv4)
            break
        if isinstance(event, Disconnected):
            sys.exit(str(event.error))
    await session.close()


if __name__ == "__main__":
    task.react(main, sys.argv[1:])
