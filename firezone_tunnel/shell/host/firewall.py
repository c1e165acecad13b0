"""Set up a gateway's host to forward its clients' packets: forwarding, masquerading, rules in other firewalls."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firezone_tunnel.core.tunnel.prefixes import TUNNEL_IPV4, TUNNEL_IPV6
from firezone_tunnel.errors import PlatformError, one_line
from firezone_tunnel.shell.host import nftables
from firezone_tunnel.shell.host.nftables import OwnTable
from firezone_tunnel.shell.host.parts import Aspect, Change, HostState, Part
from firezone_tunnel.shell.host.sysctl import Sysctls
from firezone_tunnel.shell.logs import events as log


class GatewayFirewall(Part):
    """Forwarding and masquerading for one TUN device.

    The rules are in our own table. An accept there does not override a drop in another table, so two rules are also
    inserted at the top of each forward chain that would drop our packets, such as Docker's, ufw's and firewalld's.
    """

    watches = Aspect.NFTABLES | Aspect.SETTINGS

    def __init__(self, *, interface: str, state_directory: Path) -> None:
        """`state_directory` stores the host's original settings until `remove` restores them."""
        self._interface = interface
        self._sysctls = Sysctls(state_directory / "gateway-sysctls.json")
        self._table = OwnTable(_TABLE, _own_table(interface))
        self._is_installed = False
        self._is_legacy_reported = False
        self._is_ipv6_reported = False

    def needs(self, state: HostState) -> object:
        return None

    def put_right(self, state: HostState, *, is_suspect: bool) -> list[Change]:
        """The first call cleans up after a predecessor that was killed.

        Raises: PlatformError, if IPv4 forwarding can't be enabled or nftables is not available.
        """
        ruleset = nftables.rules()
        if not self._is_installed:
            is_successor = self._sysctls.recover()
            self._is_installed = True
            _delete_foreign_rules(ruleset)
            ruleset = nftables.rules()
            if not is_successor:  # these interfaces and chains existed without forwarding, so they don't need it
                self._sysctls.notes = self._reasons(ruleset)
        changes = self._table.put_right()
        for family, table, chain in _dropping_chains(ruleset):
            if not _is_opened(ruleset, family, table, chain):
                changes.append(self._open(family, table, chain))
        self._warn_of_legacy_iptables()
        return changes + self._forward_ipv4() + self._forward_ipv6()

    def remove(self) -> None:
        """Restore the original state, but leave forwarding enabled if another program may have come to need it."""
        if not self._is_installed:
            return
        self._table.remove()
        ruleset = nftables.rules()
        _delete_foreign_rules(ruleset)
        reasons = [reason for reason in self._reasons(ruleset) if reason not in self._sysctls.notes]
        if reasons and self._sysctls.changed():
            log.info("firewall:forwarding_left_on", because=reasons)
            self._sysctls.forget()
        else:
            self._sysctls.restore()
        self._is_installed = False

    def _reasons(self, ruleset: list[dict[str, Any]]) -> list[str]:
        """Other interfaces, and other programs' forward and postrouting chains: they may need forwarding, too."""
        names = [name for _, name in socket.if_nameindex() if name not in {"lo", self._interface}]
        chains = [
            f"chain {chain['family']} {chain['table']} {chain['name']}"
            for chain in _of_kind(ruleset, "chain")
            if chain.get("hook") in {"forward", "postrouting"} and chain["table"] != _TABLE
        ]
        return [f"interface {name}" for name in names] + chains + [f"iptables {name}" for name in _legacy_iptables()]

    def _open(self, family: str, table: str, chain: str) -> Change:
        item = f"the accepting rules in the chain {family} {table} {chain}"
        try:
            nftables.run(_accepting_rules(family, table, chain, self._interface))
        except PlatformError as error:  # a table with the owner flag can only be changed by its owner
            return Change(item, one_line(error))
        log.info("firewall:chain_opened", family=family, table=table, chain=chain, interface=self._interface)
        return Change(item)

    def _warn_of_legacy_iptables(self) -> None:
        if not self._is_legacy_reported and any(_legacy_iptables()):
            self._is_legacy_reported = True
            reason = "nftables can't see the FORWARD chain of legacy iptables, which may drop packets"
            log.warning("firewall:legacy_iptables_found", reason=reason)

    def _forward_ipv4(self) -> list[Change]:
        if self._sysctls.read(_IPV4_FORWARDING) == "1":
            return []
        # Changing ip_forward also changes these, so they have to be restored after it.
        dependent = self._sysctls.names("net/ipv4/conf/*/forwarding")
        self._sysctls.remember([_IPV4_FORWARDING, *dependent, "net/ipv4/conf/all/accept_redirects"])
        self._sysctls.write(_IPV4_FORWARDING, "1")
        return [Change("net.ipv4.ip_forward = 1")]

    def _forward_ipv6(self) -> list[Change]:
        sysctls = self._sysctls
        if sysctls.read(_IPV6_FORWARDING) != "0":
            return []
        # A router ignores router advertisements and drops the routes learned from them, unless accept_ra is 2.
        advertised = [name for name in sysctls.names("net/ipv6/conf/*/accept_ra") if sysctls.read(name) == "1"]
        sysctls.remember([_IPV6_FORWARDING, *sysctls.names("net/ipv6/conf/*/forwarding"), *advertised])
        try:
            for name in advertised:
                sysctls.write(name, "2")
            sysctls.write(_IPV6_FORWARDING, "1")
        except PlatformError as error:
            if not self._is_ipv6_reported:
                self._is_ipv6_reported = True
                log.warning("firewall:ipv6_not_forwarded", reason=str(error))
            return []
        return [Change("net.ipv6.conf.all.forwarding = 1")]


_TABLE = "firezone_gateway"
_COMMENT = "firezone_tunnel"  # identifies our rules in other programs' chains
_DOCKER_CHAIN = "DOCKER-USER"  # reserved by Docker for its users' rules; Docker jumps to it first
_DIRECTIONS = ("oifname", "iifname")
_LEGACY_TABLES = ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")

_IPV4_FORWARDING = "net/ipv4/ip_forward"
_IPV6_FORWARDING = "net/ipv6/conf/all/forwarding"


def _own_table(interface: str) -> str:
    name = json.dumps(interface)
    return f"""
    chain forward {{
        type filter hook forward priority filter - 10; policy accept;
        iifname {name} accept
        oifname {name} accept
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {TUNNEL_IPV4} oifname != {name} masquerade
        ip6 saddr {TUNNEL_IPV6} oifname != {name} masquerade
    }}
"""


def _accepting_rules(family: str, table: str, chain: str, interface: str) -> str:
    name = json.dumps(interface)
    return "".join(
        f'insert rule {family} {table} {chain} {direction} {name} counter accept comment "{_COMMENT}"\n'
        for direction in _DIRECTIONS
    )


def _delete_foreign_rules(ruleset: list[dict[str, Any]]) -> None:
    """Delete our rules from other programs' chains."""
    ours = [rule for rule in _of_kind(ruleset, "rule") if rule.get("comment") == _COMMENT and rule["table"] != _TABLE]
    script = "".join(
        f"delete rule {rule['family']} {rule['table']} {rule['chain']} handle {rule['handle']}\n" for rule in ours
    )
    if script:
        nftables.run(script)


def _dropping_chains(ruleset: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Family, table and name of each chain that needs our rules: forward chains that drop, or Docker's user chain."""
    chains = list(_of_kind(ruleset, "chain"))
    for chain in chains:
        family, table, name = chain["family"], chain["table"], chain["name"]
        if chain.get("hook") != "forward" or family not in {"ip", "ip6", "inet"} or table == _TABLE:
            continue
        if chain.get("policy") != "drop" and not _ends_in_refusal(ruleset, chain):
            continue
        has_docker = any(
            (other["family"], other["table"], other["name"]) == (family, table, _DOCKER_CHAIN) for other in chains
        )
        yield family, table, _DOCKER_CHAIN if has_docker else name


def _ends_in_refusal(ruleset: list[dict[str, Any]], chain: dict[str, Any]) -> bool:
    """Whether the chain's last rule drops or rejects every remaining packet, as firewalld's does."""
    place = (chain["family"], chain["table"], chain["name"])
    rules = [rule for rule in _of_kind(ruleset, "rule") if (rule["family"], rule["table"], rule["chain"]) == place]
    if not rules:
        return False
    kinds = {kind for expression in rules[-1]["expr"] for kind in expression}
    return bool(kinds & {"drop", "reject"}) and kinds <= {"drop", "reject", "counter", "log"}


def _is_opened(ruleset: list[dict[str, Any]], family: str, table: str, chain: str) -> bool:
    """Whether a chain has our rules for both directions."""
    place = (family, table, chain)
    rules = [rule for rule in _of_kind(ruleset, "rule") if (rule["family"], rule["table"], rule["chain"]) == place]
    return len([rule for rule in rules if rule.get("comment") == _COMMENT]) == len(_DIRECTIONS)


def _legacy_iptables() -> Iterator[str]:
    for file in _LEGACY_TABLES:
        try:
            yield from Path(file).read_text().split()
        except OSError:  # the kernel module is not loaded
            continue


def _of_kind(ruleset: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    return (item[kind] for item in ruleset if kind in item)
