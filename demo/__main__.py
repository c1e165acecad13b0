"""Show a tunnel on hosts made of network namespaces: `python -m demo [--keep] [--nat KIND]`, or `make demo`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.system import nat as nats
from tests.system.hosts import Lab, MissingCapability, enter_user_namespace, require_capabilities
from tests.system.network import IPERF_PORT, SERVER, SERVER_IPV6, WEB_PORT, Network
from tests.system.product import Product
from tests.system.programs import NotReady

_DOWNLOAD_BYTES = 50_000_000
_IPERF_SECONDS = 3

_PICTURE = """\
  portal 203.0.113.10 ──┐
  client 203.0.113.20 ──┤ internet ├── 203.0.113.30 gateway ── private network 10.20.0.0/24, fd00:20::/64
                                                               web server and iperf3 server at 10.20.0.100
"""
_PICTURE_WITH_NATS = """\
  portal 203.0.113.10 ──┐            ┌── 203.0.113.40 relay
  client ── {client:<11} ┤  internet  ├ {gateway:>11} ── gateway ── private network 10.20.0.0/24
                                                                  web server and iperf3 server at 10.20.0.100
"""


class DemoFailed(Exception):
    """Something that the demo is there to show did not happen."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--keep", action="store_true", help="leave everything running, in the background")
    kinds = ", ".join((*nats.KINDS, "v6-v4"))
    parser.add_argument(
        "--nat", default="none", help=f"what client and gateway are behind: {kinds}; or one for each, as in cone,none"
    )
    options = parser.parse_args(arguments)
    try:
        nats.Pair.parse(options.nat)
    except ValueError as error:
        parser.error(str(error))
    try:
        if os.geteuid() != 0:
            enter_user_namespace([sys.executable, "-m", "demo", *(arguments or sys.argv[1:])])
        require_capabilities()
        if options.keep:
            _go_to_background_once_shown(options.nat)
        else:
            Demo(options.nat).run()
    except (MissingCapability, DemoFailed, NotReady, OSError, subprocess.SubprocessError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; everything is taken down", file=sys.stderr)
        return 130
    return 0


class Demo:
    """One run: build, show, take down."""

    def __init__(self, nat: str) -> None:
        self._nat = nat
        self._started = time.monotonic()

    def run(self) -> None:
        """Raises: DemoFailed, NotReady."""
        with Lab() as lab:
            product = self.show(lab)
            self._end(product)
        if leftovers := lab.leftovers():
            raise DemoFailed(f"left behind: {', '.join(leftovers)}")
        self._say("clean", "no namespace, process or file is left behind")

    def show(self, lab: Lab) -> Product:
        """Build the hosts, start the product and show everything; returns with the tunnel up."""
        print("Hosts made of network namespaces on this machine:\n")
        network = Network(lab, self._nat)
        has_nats = self._nat != "none"
        print(_PICTURE_WITH_NATS.format(**network.nat._asdict()) if has_nats else _PICTURE, flush=True)
        network.start_servers()
        self._say("hosts", "are up; the web server and the iperf3 server listen")
        self._show_unreachable(network)
        product = Product(network, relays=("relay",) if has_nats else ())
        for name, start in product.starts():
            start()
            self._say(name, "is ready")
        self._show_download(network, SERVER)
        self._show_download(network, f"[{SERVER_IPV6}]")
        self._show_path(network, product)
        self._show_throughput(network)
        return product

    def _show_unreachable(self, network: Network) -> None:
        url = f"http://{SERVER}:{WEB_PORT}/bytes?num=1"
        answer = network.client.run("curl", "--silent", "--show-error", "--max-time", "2", url, check=False)
        if answer.returncode == 0:
            raise DemoFailed(f"{url} is reachable without a tunnel: these hosts are not separate")
        self._say("before", f"client to {SERVER}: {answer.stderr.strip()}")

    def _show_download(self, network: Network, server: str) -> None:
        url = f"http://{server}:{WEB_PORT}/bytes?num={_DOWNLOAD_BYTES}"
        began = time.monotonic()
        answer = network.client.run("sh", "-c", 'curl --silent --show-error --fail --max-time 30 "$0" | sha256sum', url)
        seconds = time.monotonic() - began
        if answer.stdout.split()[0] != hashlib.sha256(bytes(_DOWNLOAD_BYTES)).hexdigest():
            raise DemoFailed(f"the download of {url} is incomplete or damaged: {answer.stderr.strip()}")
        self._say("download", f"{_DOWNLOAD_BYTES / 1e6:.0f} MB from {server} in {seconds:.2f} s, the checksum is right")

    def _show_path(self, network: Network, product: Product) -> None:
        """The path that came up first, and the one that the connection then moved to, if it did."""
        first = product.connection()
        product.wait_path("direct" if network.nat.is_direct else "relayed")
        last = product.path()
        self._say("path", _describe(first))
        if last["path"] != first["path"]:
            self._say("path", f"{last['timestamp'] - first['timestamp']:.2f} s later {_describe(last)}")

    def _show_throughput(self, network: Network) -> None:
        rates = []
        for direction, options in (("up", ()), ("down", ("--reverse",))):
            command = ("iperf3", "--json", "--client", SERVER, "--port", str(IPERF_PORT), "--time", str(_IPERF_SECONDS))
            report = json.loads(network.client.run(*command, *options, check=False).stdout)
            if "error" in report:
                raise DemoFailed(f"iperf3 {direction}: {report['error']}")
            rates.append(f"{report['end']['sum_received']['bits_per_second'] / 1e9:.2f} Gbit/s {direction}")
        self._say("throughput", f"{', '.join(rates)} (one TCP stream, all hosts on this machine's CPUs)")

    def _end(self, product: Product) -> None:
        codes = product.stop()
        if any(codes.values()):
            raise DemoFailed(f"not every process ended in order: {codes}")
        self._say("end", f"{', '.join(codes)} ended with exit code 0")

    def _say(self, what: str, text: str) -> None:
        print(f"  {time.monotonic() - self._started:5.1f} s  {what:<11} {text}", flush=True)


def _describe(path: Mapping[str, Any]) -> str:
    return f"{path['path']}, client {path['local']} to gateway {path['remote']}"


def _go_to_background_once_shown(nat: str) -> None:
    """Run the demo in a child that keeps the hosts; return when it has shown everything.

    Raises: DemoFailed.
    """
    is_up, tell_up = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(is_up)
        os.setsid()
        os._exit(_keep(tell_up, nat))
    os.close(tell_up)
    try:
        if not os.read(is_up, 1):
            raise DemoFailed("see above")
    except KeyboardInterrupt:
        os.kill(keeper, signal.SIGTERM)
        os.waitpid(keeper, 0)
        raise


def _keep(tell_up: int, nat: str) -> int:
    """Show the demo, then hold the hosts until SIGTERM; returns the exit code."""
    try:
        with Lab() as lab:
            product = Demo(nat).show(lab)
            print(_instructions(lab, product), flush=True)
            quiet = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(quiet, descriptor)
            os.write(tell_up, b"1")
            os.close(tell_up)
            while True:
                signal.pause()
    except SystemExit:
        return 0
    except (DemoFailed, NotReady, OSError, subprocess.SubprocessError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def _instructions(lab: Lab, product: Product) -> str:
    # In a user namespace of our own, root is mapped to a single id of the machine's.
    is_own_namespace = Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]
    user = "--user --preserve-credentials " if is_own_namespace else ""
    return f"""
Everything is left running.
  a shell on the client:  nsenter --target {product.client.pid} {user}--mount --net {os.environ.get("SHELL", "sh")}
  there, for example:     curl --silent 'http://{SERVER}/bytes?num=1000000' | wc --bytes
  logs:                   {lab.directory}/*/log/
  to end it:              kill {os.getpid()}
"""


if __name__ == "__main__":
    sys.exit(main())
