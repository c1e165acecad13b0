"""Run a tunnel on hosts made of network namespaces: `python -m demo [--keep] [--nat KIND]`, or `make demo`."""

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

_DIAGRAM = """\
  portal 203.0.113.10 ──┐
  client 203.0.113.20 ──┤ internet ├── 203.0.113.30 gateway ── private network 10.20.0.0/24, fd00:20::/64
                                                               web server and iperf3 server at 10.20.0.100
"""
_DIAGRAM_WITH_NATS = """\
  portal 203.0.113.10 ──┐            ┌── 203.0.113.40 relay
  client ── {client:<11} ┤  internet  ├ {gateway:>11} ── gateway ── private network 10.20.0.0/24
                                                                  web server and iperf3 server at 10.20.0.100
"""


class DemoFailed(Exception):
    """A step of the demo failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--keep", action="store_true", help="leave everything running in the background")
    kinds = ", ".join((*nats.KINDS, "v6-v4"))
    parser.add_argument(
        "--nat", default="none", help=f"NAT of client and gateway: {kinds}; or one for each, such as cone,none"
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
            _run_in_background(options.nat)
        else:
            Demo(options.nat).run()
    except (MissingCapability, DemoFailed, NotReady, OSError, subprocess.SubprocessError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted: all hosts and programs have been removed.", file=sys.stderr)
        return 130
    return 0


class Demo:
    """One run of the demo: build the hosts, run all steps, remove everything."""

    def __init__(self, nat: str) -> None:
        self._nat = nat
        self._started = time.monotonic()

    def run(self) -> None:
        """Raises: DemoFailed, NotReady."""
        with Lab() as lab:
            product = self.show(lab)
            self._end(product)
        if leftovers := lab.leftovers():
            raise DemoFailed(f"the clean-up left {', '.join(leftovers)} behind")
        self._say("clean", "no namespaces, processes or files are left behind")

    def show(self, lab: Lab) -> Product:
        """Build the hosts, start the programs and run all steps. Returns with the tunnel up."""
        print("Hosts made of network namespaces on this machine:\n")
        network = Network(lab, self._nat)
        has_nats = self._nat != "none"
        print(_DIAGRAM_WITH_NATS.format(**network.nat._asdict()) if has_nats else _DIAGRAM, flush=True)
        network.start_servers()
        self._say("hosts", "are up; the web server and the iperf3 server are listening")
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
            raise DemoFailed(f"{url} is reachable without a tunnel: the hosts are not isolated")
        self._say("before", f"client to {SERVER}: {answer.stderr.strip()}")

    def _show_download(self, network: Network, server: str) -> None:
        url = f"http://{server}:{WEB_PORT}/bytes?num={_DOWNLOAD_BYTES}"
        began = time.monotonic()
        answer = network.client.run("sh", "-c", 'curl --silent --show-error --fail --max-time 30 "$0" | sha256sum', url)
        seconds = time.monotonic() - began
        if answer.stdout.split()[0] != hashlib.sha256(bytes(_DOWNLOAD_BYTES)).hexdigest():
            raise DemoFailed(f"the download of {url} is incomplete or corrupt: {answer.stderr.strip()}")
        self._say("download", f"{_DOWNLOAD_BYTES / 1e6:.0f} MB from {server} in {seconds:.2f} s, checksum verified")

    def _show_path(self, network: Network, product: Product) -> None:
        """Print the initial path, and the path that the connection switched to, if any."""
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
        self._say("throughput", f"{', '.join(rates)} (one TCP stream; all hosts share this machine's CPUs)")

    def _end(self, product: Product) -> None:
        codes = product.stop()
        if any(codes.values()):
            raise DemoFailed(f"some programs did not exit with code 0: {codes}")
        self._say("end", f"{', '.join(codes)} exited with code 0")

    def _say(self, what: str, text: str) -> None:
        print(f"  {time.monotonic() - self._started:5.1f} s  {what:<11} {text}", flush=True)


def _describe(path: Mapping[str, Any]) -> str:
    return f"{path['path']}, client {path['local']} to gateway {path['remote']}"


def _run_in_background(nat: str) -> None:
    """Run the demo in a child process that keeps the hosts. Returns when all steps are done.

    Raises: DemoFailed.
    """
    ready_reader, ready_writer = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(ready_reader)
        os.setsid()
        os._exit(_keep(ready_writer, nat))
    os.close(ready_writer)
    try:
        if not os.read(ready_reader, 1):
            raise DemoFailed("see above")
    except KeyboardInterrupt:
        os.kill(keeper, signal.SIGTERM)
        os.waitpid(keeper, 0)
        raise


def _keep(ready_writer: int, nat: str) -> int:
    """Run the demo, then keep the hosts until SIGTERM. Returns the exit code."""
    try:
        with Lab() as lab:
            product = Demo(nat).show(lab)
            print(_instructions(lab, product), flush=True)
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            os.write(ready_writer, b"1")
            os.close(ready_writer)
            while True:
                signal.pause()
    except SystemExit:
        return 0
    except (DemoFailed, NotReady, OSError, subprocess.SubprocessError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def _instructions(lab: Lab, product: Product) -> str:
    # In a user namespace created by the demo, root is mapped to a single user id.
    is_own_namespace = Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]
    user = "--user --preserve-credentials " if is_own_namespace else ""
    return f"""
Everything is still running.
  a shell on the client:  nsenter --target {product.client.pid} {user}--mount --net {os.environ.get("SHELL", "sh")}
  for example, in it:     curl --silent 'http://{SERVER}/bytes?num=1000000' | wc --bytes
  logs:                   {lab.directory}/*/log/
  to stop the demo:       kill {os.getpid()}
"""


if __name__ == "__main__":
    sys.exit(main())
