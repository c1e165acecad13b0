"""Connect, wait for the tunnel, fetch something through it.

FIREZONE_TOKEN=… python asyncio_session.py wss://portal.example/ http://10.20.0.100/
"""

import asyncio
import os
import sys
import urllib.request

from firezone_tunnel import aio


async def main(portal: str, url: str) -> None:
    token = os.environ.pop("FIREZONE_TOKEN")
    async with aio.Session.connect(url=portal, token=token, state_directory="state") as (_, events):
        async for event in events:
            match event:
                case aio.ResourcesUpdated(resources):
                    print("resources:", ", ".join(resource.name for resource in resources))
                case aio.TunInterfaceUpdated(ipv4=address):
                    print("the tunnel is up, our address is", address)
                    break
                case aio.Disconnected(error):
                    sys.exit(str(error))
        body = await asyncio.to_thread(fetch, url)
        print(len(body), "bytes")


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        body: bytes = answer.read()
    return body


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
