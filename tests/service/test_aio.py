"""The asyncio API: real asyncio programs, each in its own process."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import firezone_tunnel
from firezone_tunnel import Session, aio
from tests.polling import PATIENCE
from tests.system.hosts import Lab
from tests.system.network import PORTAL, SERVER, Network
from tests.system.product import CLIENT_TOKEN, PORTAL_PORT, Product
from tests.system.programs import Program

_ROOT = Path(__file__).parents[2]
_EXAMPLES = _ROOT / "docs/examples"
_URL = f"ws://{PORTAL}:{PORTAL_PORT}/"


@pytest.fixture
def product(lab: Lab) -> Iterator[Product]:
    """A portal and a gateway. The test runs the client."""
    network = Network(lab)
    network.start_servers()
    product = Product(network)
    product.start_portal()
    product.start_gateway()
    yield product
    product.stop()


@pytest.mark.namespaces
def test_the_example_fetches_through_the_tunnel(lab: Lab, product: Product) -> None:
    before = _host_state(lab)

    program = _spawn(lab, str(_EXAMPLES / "asyncio_session.py"), _URL, f"http://{SERVER}/bytes?num=3000000")

    assert program.wait_exit() == 0, program.output()
    assert "3000000 bytes" in program.output()
    assert "resources: Private network, Private network, IPv6" in program.output()
    assert _host_state(lab) == before


@pytest.mark.namespaces
def test_the_twisted_example_comes_up(lab: Lab, product: Product) -> None:
    before = _host_state(lab)

    program = _spawn(lab, str(_EXAMPLES / "twisted_session.py"), _URL)

    assert program.wait_exit() == 0, program.output()
    assert "the tunnel is up, our address is 100." in program.output()
    assert _host_state(lab) == before


@pytest.mark.namespaces
def test_a_program_may_connect_again_and_wait_as_long_as_it_likes(lab: Lab, product: Product) -> None:
    program = _spawn_script(
        lab,
        """
        async def main():
            for _ in range(2):
                session, events = connect()
                kinds = []
                while aio.TunInterfaceUpdated not in kinds or aio.ResourcesUpdated not in kinds:
                    try:
                        kinds.append(type(await asyncio.wait_for(events.next(), 0.001)))
                    except TimeoutError:
                        continue
                session.reset("for a test")
                await session.close()
                await session.close()
                assert await events.next() is None
                try:
                    session.reset("too late")
                except aio.SessionClosed as error:
                    print(error)
        """,
    )

    assert program.wait_exit() == 0, program.output()
    assert program.output().count("The session is closed: connect a new one") == 2


@pytest.mark.namespaces
def test_a_session_left_open_is_closed_by_the_end_of_the_loop(lab: Lab, product: Product) -> None:
    before = _host_state(lab)
    program = _spawn_script(
        lab,
        """
        async def main():
            _, events = connect()
            async for event in events:
                if isinstance(event, aio.TunInterfaceUpdated):
                    print("up")
                    return
        """,
    )

    assert program.wait_exit() == 0, program.output()
    assert "up" in program.output()
    assert _host_state(lab) == before


@pytest.mark.namespaces
def test_an_interrupted_program_leaves_the_host_as_it_was(lab: Lab, product: Product) -> None:
    before = _host_state(lab)
    program = _spawn_script(
        lab,
        """
        async def main():
            async with connect() as (_, events):
                async for event in events:
                    if isinstance(event, aio.TunInterfaceUpdated):
                        print("up", flush=True)
        """,
    )
    program.wait_until(lambda: "up" in program.output(), "saying that it is up")
    assert _host_state(lab) != before

    program.send_signal(signal.SIGINT)

    program.wait_exit()
    assert "KeyboardInterrupt" in program.output()
    assert _host_state(lab) == before


@pytest.mark.namespaces
def test_a_wrong_token_is_the_last_event(lab: Lab, product: Product) -> None:
    program = _spawn_script(
        lab,
        """
        async def main():
            async with connect(token="n.wrong") as (_, events):
                async for event in events:
                    print(type(event).__name__, event.requires_sign_in, event.error)
        """,
    )

    assert program.wait_exit() == 0, program.output()
    (line,) = program.output().splitlines()
    assert line.startswith("Disconnected True ")
    assert "n.wrong" not in line


@pytest.mark.namespaces
def test_a_name_that_is_being_resolved_does_not_keep_the_program_from_ending(lab: Lab) -> None:
    host = lab.host("client")
    host.resolv_conf.write_text("nameserver 192.0.2.1\noptions timeout:30 attempts:5\n")  # which never answers
    program = _spawn_script(
        lab,
        """
        async def main():
            async with connect(url="ws://portal.example:1/") as (_, events):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(events.next(), 0.5)
            print("closed")
        """,
    )

    assert program.wait_exit() == 0, program.output()
    assert program.output() == "closed\n"


def test_without_the_capability_it_is_one_clear_sentence() -> None:
    """Run without the capability: as root in a network namespace of its own, otherwise as the current user."""
    command = ["unshare", "--net", "setpriv", "--bounding-set=-net_admin", "--"] if os.geteuid() == 0 else []
    done = _run(
        """
        async def main():
            async with connect() as (_, events):
                async for event in events:
                    print(type(event).__name__, event.requires_sign_in, event.error)
        """,
        *command,
    )

    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("Disconnected False ")
    assert "CAP_NET_ADMIN" in line
    assert done.stderr == ""


def test_another_reactor_in_the_way_is_an_error_that_says_so() -> None:
    done = _run(
        """
        async def main():
            from twisted.internet import reactor
            try:
                connect()
            except aio.FirezoneError as error:
                print(error)
        """
    )

    assert done.returncode == 0, done.stderr
    assert "is already installed and does not run on asyncio: connect before anything imports" in done.stdout


def test_a_second_event_loop_is_an_error_that_says_so() -> None:
    done = _run(
        """
        async def main():
            assert aio.install_reactor() is aio.install_reactor()

        async def again():
            try:
                connect()
            except aio.FirezoneError as error:
                print(error)

        asyncio.run(main())
        main = again
        """
    )

    assert done.returncode == 0, done.stderr
    assert "runs on another event loop, and a process has only one" in done.stdout


def test_nothing_is_connected_outside_an_event_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        aio.Session.connect(url="wss://portal.example/", token="x", device_id="x")


def test_both_apis_take_the_same_arguments() -> None:
    ours, theirs = (inspect.signature(session.connect).parameters for session in (aio.Session, Session))

    assert [*ours, "reactor"] == list(theirs)
    assert [(parameter.name, parameter.default, parameter.annotation) for parameter in ours.values()] == [
        (parameter.name, parameter.default, parameter.annotation)
        for parameter in theirs.values()
        if parameter.name != "reactor"
    ]


def test_both_apis_have_the_same_names() -> None:
    services = {"GatewayService", "PortalService", "RelayService", "__version__"}
    assert set(aio.__all__) - {"install_reactor"} == set(firezone_tunnel.__all__) - services
    assert [name for name in aio.__all__ if not hasattr(aio, name)] == []
    assert [name for name in firezone_tunnel.__all__ if not hasattr(firezone_tunnel, name)] == []


_PREAMBLE = f"""
import asyncio, contextlib, pathlib
from firezone_tunnel import aio

def connect(url="{_URL}", token="{CLIENT_TOKEN}"):
    return aio.Session.connect(url=url, token=token, device_id="a test", state_directory=pathlib.Path("state"))
"""


def _script(text: str) -> str:
    return f"{_PREAMBLE}\n{inspect.cleandoc(text)}\nasyncio.run(main())"


def _spawn(lab: Lab, *arguments: str) -> Program:
    environment = {"PYTHONPATH": str(_ROOT), "FIREZONE_TOKEN": CLIENT_TOKEN}
    return lab.hosts["client"].spawn("program", sys.executable, *arguments, environment=environment)


def _spawn_script(lab: Lab, text: str) -> Program:
    return _spawn(lab, "-c", _script(text))


def _run(text: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", _script(text)]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)


def _host_state(lab: Lab) -> list[str]:
    commands = "ip -brief link; ip -4 -brief address; ip route show table all; ip rule; ip -6 rule; nft list ruleset"
    lines = lab.hosts["client"].run("sh", "-c", commands).stdout.splitlines()
    return [line for line in lines if "fe80" not in line]  # which the kernel adds a moment after an interface came up
