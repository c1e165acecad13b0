"""The resources of a client in its log: a list when the tunnel is ready, then each change; and their names."""

from __future__ import annotations

from typing import Any

from firezone_tunnel.core.messages.client import (
    FromPortal,
    Init,
    InternetResource,
    Resource,
    ResourceChanged,
    ResourceDeleted,
)
from firezone_tunnel.core.messages.common import describe_filters
from firezone_tunnel.shell.logs import events as log
from firezone_tunnel.shell.reactor.clock import BoottimeTimer, boottime

MAX_LISTED = 20
GATHERING_TIME = 1.0  # seconds: changes within it are logged together


class ResourceLog:
    """Follows the portal's messages. A message in the log lists at most `MAX_LISTED` resources and counts all."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._resources: dict[str, Resource] = {}
        self._before: dict[str, Resource | None] = {}  # of the resources that have changed: what is in the log
        self._timer: BoottimeTimer | None = None

    def handle_message(self, message: FromPortal) -> None:
        """The portal's messages that are not about resources are ignored."""
        match message:
            case Init(resources=resources):
                listed = {resource.id: resource for resource in resources}
                for rid in [rid for rid in self._resources if rid not in listed]:
                    self._set(rid, None)
                for rid, resource in listed.items():
                    self._set(rid, resource)
            case ResourceChanged(resource=resource):
                self._set(resource.id, resource)
            case ResourceDeleted(id=rid):
                self._set(rid, None)

    def ready(self) -> None:
        """Log the list, and changes from now on."""
        self._timer = BoottimeTimer(self._reactor, self._write)
        self._before.clear()
        entries = list(self._resources.values())
        log.info("client:resources_listed", count=len(entries), resources=_described(entries))

    def close(self) -> None:
        """May be called more than once."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def fields(self, rid: str) -> dict[str, Any]:
        """The log fields of a resource: its id, and its name if it is known."""
        resource = self._resources.get(rid)
        return {"rid": rid} if resource is None else {"rid": rid, "resource": resource.name}

    def site(self, rid: str) -> str:
        """The names of the sites that a resource belongs to."""
        resource = self._resources.get(rid)
        return "" if resource is None else _sites(resource)

    def site_name(self, site_id: str, rid: str) -> str | None:
        """The name of one of the sites that a resource belongs to."""
        resource = self._resources.get(rid)
        sites = [] if resource is None else resource.gateway_groups
        return next((site.name for site in sites if site.id == site_id), None)

    def allows(self, rid: str) -> str:
        """The traffic that a resource's filters allow."""
        resource = self._resources.get(rid)
        return "" if resource is None else _allows(resource)

    def _set(self, rid: str, resource: Resource | None) -> None:
        old = self._resources.get(rid)
        if old == resource:
            return
        self._before.setdefault(rid, old)
        if resource is None:
            del self._resources[rid]
        else:
            self._resources[rid] = resource
        if self._timer is not None and self._timer.deadline is None:
            self._timer.set(boottime() + GATHERING_TIME)

    def _write(self) -> None:
        before, self._before = self._before, {}
        changes: dict[str, list[Resource]] = {"added": [], "removed": [], "changed": []}
        for rid, old in before.items():
            new = self._resources.get(rid)
            if new is not None and new != old:
                changes["added" if old is None else "changed"].append(new)
            elif new is None and old is not None:
                changes["removed"].append(old)
        counts = {kind: len(resources) for kind, resources in changes.items() if resources}
        if counts:
            lists = {kind: _described(changes[kind]) for kind in counts}
            log.info("client:resources_changed", count=sum(counts.values()), **lists)


def _described(resources: list[Resource]) -> list[dict[str, str]]:
    return [_entry(resource) for resource in resources[:MAX_LISTED]]


def _entry(resource: Resource) -> dict[str, str]:
    entry = {"rid": resource.id, "resource": resource.name, "site": _sites(resource), "allows": _allows(resource)}
    return entry if isinstance(resource, InternetResource) else {**entry, "address": resource.address}


def _sites(resource: Resource) -> str:
    return ", ".join(site.name for site in resource.gateway_groups)


def _allows(resource: Resource) -> str:
    return describe_filters([] if isinstance(resource, InternetResource) else resource.filters)
