"""An ICE agent of aioice's in a process of its own, which speaks JSON, a line each way at a time.

First it says its credentials and candidates, then it is told ours, then it says "connected" or "failed". After that it
echoes every datagram on the nominated pair, until consent is lost ("closed") or its input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from aioice import ice


async def main(options: dict[str, Any]) -> None:
    # By itself it leaves out 127.0.0.1 and ::1, asks for consent every 5 s, and goes after six questions unanswered.
    ice.get_host_addresses = lambda use_ipv4, use_ipv6: options["addresses"]
    ice.CONSENT_INTERVAL, ice.CONSENT_FAILURES = options["consent_interval"], 3
    connection = ice.Connection(ice_controlling=options["controlling"])
    await connection.gather_candidates()
    candidates = [f"candidate:{candidate.to_sdp()}" for candidate in connection.local_candidates]
    say(username=connection.local_username, password=connection.local_password, candidates=candidates)

    told = json.loads(await asyncio.to_thread(sys.stdin.readline))
    connection.remote_username, connection.remote_password = told["username"], told["password"]
    for candidate in told["candidates"]:
        await connection.add_remote_candidate(ice.Candidate.from_sdp(candidate.removeprefix("candidate:")))
    await connection.add_remote_candidate(None)
    try:
        await connection.connect()
    except ConnectionError as error:
        say(event="failed", reason=str(error))
        return
    (pair,) = connection._nominated.values()
    say(event="connected", local=pair.local_addr, remote=pair.remote_addr)
    echoing = asyncio.create_task(echo(connection))
    await asyncio.to_thread(sys.stdin.readline)
    echoing.cancel()
    await connection.close()


async def echo(connection: ice.Connection) -> None:
    try:
        while True:
            await connection.send(await connection.recv())
    except ConnectionError:
        say(event="closed")


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


asyncio.run(main(json.loads(sys.argv[1])))
