"""The database: acknowledged changes survive any end of the process, and every error is a single sentence."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.error import ConnectError
from twisted.internet.task import deferLater

from firezone_tunnel.apps.portal.store import Store
from firezone_tunnel.core.sansio import SocketAddress
from firezone_tunnel.errors import InUseError, PlatformError
from tests.service.portal_peers import CLIENT_TOKEN, LAB_ID, SEED, Clock, Portal, key, start_portal, stop_portal

_ROOT = Path(__file__).parents[2]
_KILLS = 12
_RUN = """
import sys
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.error import ConnectError
from twisted.internet.task import deferLater
from firezone_tunnel.apps.portal.service import PortalService
from firezone_tunnel.core.sansio import SocketAddress
seed, database = sys.argv[1:]
service = PortalService(reactor, listen=SocketAddress("127.0.0.1", 0), seed_path=seed, database=database)
service.ready.addCallback(lambda port: print(port.getHost().port, flush=True))
service.ready.addErrback(lambda failure: (print(failure.value, flush=True), reactor.stop()))
reactor.callWhenRunning(service.startService)
reactor.run()
"""


@pytest_twisted.ensureDeferred
async def test_acknowledged_changes_survive_a_kill_at_any_moment(tmp_path: Path) -> None:
    known: dict[str, Any] = {}
    for attempt in range(_KILLS):
        with _Process(tmp_path) as process:
            portal = process.portal
            gateway = await portal.join("gateway")
            assert known.setdefault("gateway", gateway.init["interface"]) == gateway.init["interface"]
            granted = {
                (authorization["client_id"], authorization["resource_id"])
                for authorization in gateway.init["authorizations"]
            }
            assert known.setdefault("flows", set()) <= granted
            for name in [*known.get("clients", []), f"new-{attempt}"]:
                client = await portal.join("client", external_id=name, public_key=key(attempt))
                assert known.setdefault(name, client.init["interface"]) == client.init["interface"]
                known.setdefault("clients", {})[name] = None
            client.send("create_flow", {"resource_id": LAB_ID, "connected_gateway_ids": []})
            known["flows"].add(((await gateway.receive("authorize_flow"))["client"]["id"], LAB_ID))
            # The process dies during a change, which may be lost or kept but must not damage anything.
            unfinished = [
                Deferred.fromCoroutine(_connect_unfinished(portal, f"{attempt}-{number}"))
                for number in range(attempt * 2)
            ]
            client.send("create_flow", {"resource_id": LAB_ID, "connected_gateway_ids": []})
            await deferLater(reactor, attempt * 0.003, lambda: None)
            process.kill()
            await DeferredList(unfinished)

    assert len({interface["ipv4"] for name, interface in known.items() if name not in {"flows", "clients"}}) == (
        _KILLS + 1
    )
    assert sqlite3.connect(tmp_path / "portal.sqlite3").execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest_twisted.ensureDeferred
async def test_a_file_that_is_not_a_database_is_reported_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "portal.sqlite3"
    path.write_bytes(b"not a database" * 1000)

    assert await _open_error(path) == (
        f"the database {path} is not an SQLite database: restore it from a backup, or move it away to start afresh"
    )


@pytest_twisted.ensureDeferred
async def test_a_damaged_database_is_reported_in_one_sentence(tmp_path: Path) -> None:
    portal = await start_portal(tmp_path)
    for number in range(50):
        await portal.join("client", external_id=f"{number}")
    await stop_portal(portal)
    path = tmp_path / "portal.sqlite3"
    damaged = bytearray(path.read_bytes())
    for offset in range(4096, len(damaged)):
        damaged[offset] = 0x5A
    path.write_bytes(damaged)

    assert f"the database {path} is damaged: restore it" in await _open_error(path)


@pytest_twisted.ensureDeferred
async def test_a_directory_that_is_missing_is_reported_in_one_sentence(tmp_path: Path) -> None:
    error = await _open_error(tmp_path / "nowhere/portal.sqlite3")

    assert error == (
        f"the database {tmp_path}/nowhere/portal.sqlite3 can't be opened, No such file or directory: "
        "choose another --database, or change its permissions"
    )


@pytest_twisted.ensureDeferred
async def test_a_database_of_a_newer_version_is_reported_in_one_sentence(tmp_path: Path) -> None:
    await stop_portal(await start_portal(tmp_path))
    path = tmp_path / "portal.sqlite3"
    connection = sqlite3.connect(path)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()

    assert (
        await _open_error(path) == f"the database {path} is from a newer version of this program: upgrade the program"
    )


@pytest_twisted.ensureDeferred
async def test_a_second_portal_on_one_database_is_refused(tmp_path: Path) -> None:
    portal = await start_portal(tmp_path)

    store = Store(reactor, str(tmp_path / "portal.sqlite3"), os.urandom)
    with pytest.raises(InUseError, match="another portal uses the database"):
        await store.open()

    await store.close()
    await stop_portal(portal)


@pytest_twisted.ensureDeferred
async def test_the_database_is_readable_to_its_owner_only(tmp_path: Path) -> None:
    portal = await start_portal(tmp_path)
    await portal.join("client")

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("portal.sqlite3*")}

    assert "portal.sqlite3" in modes
    assert set(modes.values()) == {0o600}
    await stop_portal(portal)


@pytest_twisted.ensureDeferred
async def test_a_commit_reaches_the_disk(tmp_path: Path) -> None:
    store = Store(reactor, str(tmp_path / "portal.sqlite3"), os.urandom)
    await store.open()

    settings = await store._transact(
        lambda connection: [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    )

    assert settings == ["wal", 2, 1]  # 2 is FULL
    await store.close()


async def _connect_unfinished(portal: Portal, name: str) -> None:
    path = f"/client/websocket?token={CLIENT_TOKEN}&external_id=unfinished-{name}&public_key={quote(key(1), safe='')}"
    with contextlib.suppress(ConnectionError, ConnectError):
        await portal.connect(path, "connlib/1.5.3")


async def _open_error(path: Path) -> str:
    store = Store(reactor, str(path), os.urandom)
    with pytest.raises(PlatformError) as raised:
        await store.open()
        await store.flows()
    await store.close()
    return str(raised.value)


class _Process:
    """A portal in its own process."""

    def __init__(self, directory: Path) -> None:
        seed = directory / "portal.toml"
        seed.write_text(SEED)
        command = [sys.executable, "-c", _RUN, str(seed), str(directory / "portal.sqlite3")]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
        assert self.popen.stdout is not None
        said = self.popen.stdout.readline().strip()
        assert re.fullmatch(r"\d+", said), said
        service: Any = None
        self.portal = Portal(service, directory, SocketAddress("127.0.0.1", int(said)), Clock())

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for peer in self.portal.peers:
            peer.abort()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()
        if self.popen.stdout is not None:
            self.popen.stdout.close()
