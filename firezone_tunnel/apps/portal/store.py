"""The persistent store: devices, relays, granted flows and the portal's own secrets.

SQLAlchemy Core in one thread, so transactions run in the order of the calls. Every call that
returns has committed: WAL with synchronous=FULL, so that neither a kill nor a power cut takes it back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.dialects.sqlite import insert
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

from firezone_tunnel.core.portal.account import PeerRole
from firezone_tunnel.core.portal.admission import AdmittedDevice, AdmittedRelay
from firezone_tunnel.core.portal.changes import StoredFlow
from firezone_tunnel.core.portal.devices import Device, Identity, new_id
from firezone_tunnel.core.portal.flows import Flow
from firezone_tunnel.core.portal.tunnel_addresses import allocate
from firezone_tunnel.core.sansio import Entropy
from firezone_tunnel.core.tunnel.prefixes import TUNNEL_IPV4, TUNNEL_IPV6
from firezone_tunnel.errors import InUseError, PlatformError

_MIGRATIONS = Path(__file__).with_name("migrations")
_SECRET_BYTES = 32
_T = TypeVar("_T")

_METADATA = sa.MetaData()
_SECRETS = sa.Table(
    "secrets", _METADATA, sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.LargeBinary)
)
_DEVICES = sa.Table(
    "devices",
    _METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("role", sa.String),
    sa.Column("owner", sa.String),
    sa.Column("external_id", sa.String),
    sa.Column("name", sa.String),
    sa.Column("public_key", sa.String),
    sa.Column("psk_base", sa.LargeBinary),
    sa.Column("ipv4", sa.String),
    sa.Column("ipv6", sa.String),
    sa.Column("remote_ip", sa.String),
    sa.Column("user_agent", sa.String),
    sa.Column("last_seen_at", sa.BigInteger),
)
_RELAYS = sa.Table(
    "relays",
    _METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("host", sa.String),
    sa.Column("port", sa.Integer),
    sa.Column("last_seen_at", sa.BigInteger),
)
_FLOWS = sa.Table(
    "flows",
    _METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("client_id", sa.String),
    sa.Column("gateway_id", sa.String),
    sa.Column("resource_id", sa.String),
    sa.Column("policy_id", sa.String),
    sa.Column("token_hash", sa.String),
    sa.Column("reach", sa.String),
    sa.Column("created_at", sa.BigInteger),
    sa.Column("expires_at", sa.BigInteger),
)


class Store:
    """One SQLite file. Every method but `close` runs in the store's thread and returns a Deferred.

    Raises, from each of them: PlatformError, in one sentence.
    """

    def __init__(self, reactor: IReactorFromThreads, path: str, entropy: Entropy) -> None:
        self._reactor = reactor
        self._path = path
        self._entropy = entropy
        self._pool = ThreadPool(minthreads=1, maxthreads=1, name="portal-store")
        self._lock = -1
        self._engine: sa.Engine | None = None

    def open(self) -> Deferred[None]:
        """Create or migrate the file.

        Raises: PlatformError; InUseError, where another portal has it open.
        """
        self._pool.start()
        return self._in_thread(self._open)

    async def close(self) -> None:
        """Finish pending work and release the file."""
        if not self._pool.started:
            return
        await self._in_thread(self._close)
        self._pool.stop()

    def secret(self, name: str) -> Deferred[bytes]:
        """A random key of this portal, created on first use."""

        def work(connection: sa.Connection) -> bytes:
            found = connection.execute(sa.select(_SECRETS.c.value).where(_SECRETS.c.name == name)).scalar()
            if found is None:
                found = self._entropy(_SECRET_BYTES)
                connection.execute(sa.insert(_SECRETS).values(name=name, value=found))
            return bytes(found)

        return self._transact(work)

    def upsert_device(self, admitted: AdmittedDevice, utc_now: float) -> Deferred[Device]:
        """The device with this identity, created or updated."""
        return self._transact(lambda connection: self._upsert_device(connection, admitted, utc_now))

    def upsert_relay(self, admitted: AdmittedRelay, utc_now: float) -> Deferred[str]:
        """The id of the relay at this address and port."""

        def work(connection: sa.Connection) -> str:
            address = admitted.addresses[0]
            statement = (
                insert(_RELAYS)
                .values(id=new_id(self._entropy), host=address.host, port=address.port, last_seen_at=int(utc_now))
                .on_conflict_do_update(index_elements=["host", "port"], set_={"last_seen_at": int(utc_now)})
                .returning(_RELAYS.c.id)
            )
            return str(connection.execute(statement).scalar_one())

        return self._transact(work)

    def put_flow(self, flow: Flow) -> Deferred[None]:
        """Store a flow, replacing an earlier one for the same client, gateway and resource."""

        def work(connection: sa.Connection) -> None:
            values = {column.name: getattr(flow, column.name) for column in _FLOWS.columns}
            key = ["client_id", "gateway_id", "resource_id"]
            changed = {name: value for name, value in values.items() if name not in key}
            connection.execute(insert(_FLOWS).values(values).on_conflict_do_update(index_elements=key, set_=changed))

        return self._transact(work)

    def update_flow(self, flow: Flow) -> Deferred[None]:
        """Change the policy and the end of a stored flow, unless another has replaced it."""

        def work(connection: sa.Connection) -> None:
            values = {"policy_id": flow.policy_id, "expires_at": flow.expires_at}
            connection.execute(sa.update(_FLOWS).where(_FLOWS.c.id == flow.id).values(values))

        return self._transact(work)

    def drop_flows(self, ids: Sequence[str]) -> Deferred[None]:
        def work(connection: sa.Connection) -> None:
            for id_ in ids:
                connection.execute(sa.delete(_FLOWS).where(_FLOWS.c.id == id_))

        return self._transact(work)

    def drop_expired_flows(self, utc_now: float) -> Deferred[None]:
        def work(connection: sa.Connection) -> None:
            connection.execute(sa.delete(_FLOWS).where(_FLOWS.c.expires_at <= int(utc_now)))

        return self._transact(work)

    def flows_of_gateway(self, gateway_id: str, utc_now: float) -> Deferred[list[Flow]]:
        """The gateway's flows that have not expired, oldest first."""
        alive = sa.or_(_FLOWS.c.expires_at.is_(None), _FLOWS.c.expires_at > int(utc_now))
        statement = sa.select(_FLOWS).where(_FLOWS.c.gateway_id == gateway_id, alive).order_by(_FLOWS.c.created_at)
        return self._transact(lambda connection: [_flow(row) for row in connection.execute(statement)])

    def flows(self) -> Deferred[list[StoredFlow]]:
        """All of them, with their ends."""
        clients, gateways = _DEVICES.alias("clients"), _DEVICES.alias("gateways")
        statement = (
            sa.select(_FLOWS, clients.c.owner.label("actor"), clients.c.remote_ip, gateways.c.owner.label("site"))
            .join_from(_FLOWS, clients, _FLOWS.c.client_id == clients.c.id)
            .join(gateways, _FLOWS.c.gateway_id == gateways.c.id)
        )
        return self._transact(
            lambda connection: [
                StoredFlow(_flow(row), row.actor, row.remote_ip, row.site) for row in connection.execute(statement)
            ]
        )

    def _upsert_device(self, connection: sa.Connection, admitted: AdmittedDevice, utc_now: float) -> Device:
        identity = admitted.identity
        current = {
            "public_key": admitted.public_key,
            "remote_ip": admitted.remote_ip,
            "user_agent": admitted.user_agent,
            "last_seen_at": int(utc_now),
        }
        if admitted.name is not None:
            current["name"] = admitted.name
        key = (
            _DEVICES.c.role == identity.role.value,
            _DEVICES.c.owner == identity.owner,
            _DEVICES.c.external_id == identity.external_id,
        )
        row = connection.execute(sa.update(_DEVICES).where(*key).values(current).returning(_DEVICES)).one_or_none()
        if row is None:
            new = {
                "id": new_id(self._entropy),
                "role": identity.role.value,
                "owner": identity.owner,
                "external_id": identity.external_id,
                "name": f"{identity.role.value}-{self._entropy(4).hex()}",
                "psk_base": self._entropy(_SECRET_BYTES),
                "ipv4": self._free_address(connection, _DEVICES.c.ipv4),
                "ipv6": self._free_address(connection, _DEVICES.c.ipv6),
            }
            row = connection.execute(sa.insert(_DEVICES).values(new | current).returning(_DEVICES)).one()
        return _device(row)

    def _free_address(self, connection: sa.Connection, column: sa.Column[str]) -> str:
        taken = set(connection.execute(sa.select(column)).scalars())
        network = TUNNEL_IPV4 if column.name == "ipv4" else TUNNEL_IPV6
        address = allocate(network, taken, self._entropy)
        if address is None:
            raise PlatformError(f"all addresses of {network} are assigned: remove devices that are no longer used")
        return str(address)

    def _transact(self, work: Callable[[sa.Connection], _T]) -> Deferred[_T]:
        def run() -> _T:
            if self._engine is None:
                raise PlatformError(f"the database {self._path} is closed")
            with self._engine.begin() as connection:
                return work(connection)

        return self._in_thread(run)

    def _in_thread(self, work: Callable[[], _T]) -> Deferred[_T]:
        def run() -> _T:
            try:
                return work()
            except (sa.exc.DBAPIError, sqlite3.Error, CommandError, OSError) as error:
                raise _explain(self._path, error) from error

        return deferToThreadPool(self._reactor, self._pool, run)

    def _open(self) -> None:
        self._lock = _lock(self._path)
        # One thread: one connection, kept. SQLite's own driver would begin transactions late: the events below begin
        # each one at once.
        engine = sa.create_engine(sa.URL.create("sqlite", database=self._path), poolclass=sa.pool.StaticPool)
        sa.event.listen(engine, "connect", _configure)
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        self._engine = engine
        with engine.begin() as connection:
            config = Config()
            config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
        if self._lock != -1:
            os.close(self._lock)
            self._lock = -1


def _lock(path: str) -> int:
    """Create the file, readable only by its owner, and lock it: presence is in one process's memory."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise InUseError(f"another portal uses the database {path}: stop it, or give this one its own") from None
    return fd


def _configure(connection: Any, record: object) -> None:
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


_SENTENCES = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database: restore it from a backup, or move it away to start afresh",
    sqlite3.SQLITE_CORRUPT: "is damaged: restore it from a backup, or move it away to start afresh",
    sqlite3.SQLITE_FULL: "can't grow, the disk is full: free some space",
    sqlite3.SQLITE_READONLY: "is not writable: give the portal's user write access to it and to its directory",
    sqlite3.SQLITE_CANTOPEN: "can't be opened: give the portal's user write access to it and to its directory",
    sqlite3.SQLITE_BUSY: "is locked by another program: stop that program",
    sqlite3.SQLITE_IOERR: "can't be read or written, the disk reports an error: see the kernel's log",
}


def _explain(path: str, error: Exception) -> PlatformError:
    """One sentence: what is wrong with the database, and how to fix it."""
    if isinstance(error, OSError):
        advice = (
            "free some space" if error.errno == errno.ENOSPC else "choose another --database, or change its permissions"
        )
        return PlatformError(f"the database {path} can't be opened, {error.strerror}: {advice}")
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # the primary code, https://www.sqlite.org/rescode.html
    if code in _SENTENCES:
        return PlatformError(f"the database {path} {_SENTENCES[code]}")
    if isinstance(error, CommandError):
        return PlatformError(f"the database {path} is from a newer version of this program: upgrade the program")
    return PlatformError(f"the database {path} can't be used: {cause}")


def _device(row: Any) -> Device:
    return Device(
        id=row.id,
        identity=Identity(PeerRole(row.role), row.owner, row.external_id),
        name=row.name,
        public_key=row.public_key,
        psk_base=row.psk_base,
        ipv4=row.ipv4,
        ipv6=row.ipv6,
        remote_ip=row.remote_ip,
        user_agent=row.user_agent,
    )


def _flow(row: Any) -> Flow:
    return Flow(**{column.name: getattr(row, column.name) for column in _FLOWS.columns})
