"""Host and Origin checks: keep pages in a browser from using a server that is meant for others.

A page of another site can send requests to `localhost`, and with a name of its own that resolves
to 127.0.0.1 (DNS rebinding) it could even read the replies. The application installs the
middleware; Server.start() tells the guard where it listens.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from flowprefill.errors import InvalidRequest

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.%]+\]|[^:\s]*)(?::(?P<port>\d{1,5}))?", re.IGNORECASE)
_ONE_WORD = re.compile(r"(?!\d+$)[a-z0-9_-]{1,63}")


class HostNotAllowed(InvalidRequest):
    """The header Host names another machine than the one that the server listens for."""

    status = 403
    code = "host_not_allowed"


class OriginNotAllowed(InvalidRequest):
    """A page of another origin sent what is more than reading."""

    status = 403
    code = "origin_not_allowed"


def is_loopback(host: str) -> bool:
    """Return whether a name or an address means this machine alone; brackets and a dot may stay."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


class Guard:
    """What one server lets pass; on its event loop."""

    def __init__(self, allowed_hosts: Iterable[str], allowed_origins: Iterable[str]) -> None:
        """Take the settings; before `listens_on` nothing is known of the addresses.

        Args:
            allowed_hosts: names and addresses besides the loopback ones, or ``*`` for all.
            allowed_origins: of pages that may send anything, or ``*`` for all.
        """
        self._hosts = {name.lower().strip("[]").rstrip(".") for name in allowed_hosts}
        self._origins = set(allowed_origins)
        self.is_local = False

    def listens_on(self, addresses: Iterable[str]) -> None:
        """Learn the addresses that the server listens on."""
        self.is_local = all(is_loopback(address) for address in addresses)

    @property
    def checks_hosts(self) -> bool:
        """Whether the header Host counts: on loopback, and wherever hosts are named."""
        return "*" not in self._hosts and (self.is_local or bool(self._hosts))

    def check_host(self, host: str | None) -> None:
        """Refuse a Host that may be a stranger's; every browser sends one, others may not.

        A name of one word passes: on the internet it has no owner, so no stranger's page has it.

        Raises:
            HostNotAllowed: it is no loopback name or address, and none of the allowed hosts.
        """
        if host is None or not self.checks_hosts:
            return
        match = _HOST.fullmatch(host.strip())
        name = match["name"].strip("[]").rstrip(".").lower() if match else ""
        if not (_ONE_WORD.fullmatch(name) or is_loopback(name) or name in self._hosts):
            allowed = "localhost, a loopback address, or one of --allowed-hosts"
            raise HostNotAllowed.field("host", host, allowed)

    def check_origin(self, origin: str | None, site: str | None, host: str | None) -> None:
        """Refuse what a page of another origin sends.

        Args:
            origin: the header Origin; None: it is no page, or one that reads its own server.
            site: the header Sec-Fetch-Site, a browser's own verdict, where it sends one.
            host: the header Host.

        Raises:
            OriginNotAllowed: it is another origin, and none of the allowed ones.
        """
        if "*" in self._origins or origin in self._origins:
            return
        if site is not None:
            is_own = site in ("same-origin", "none")
        else:
            # Behind a proxy that changes Host nothing can be compared; there it is the proxy's.
            is_own = origin is None or not self.checks_hosts or _is_same(origin, host)
        if not is_own:
            shown = origin if origin is not None else f"none, sent {site}"
            raise OriginNotAllowed.field(
                "origin", shown, "this server's own, or one of --allowed-origins"
            )


def _is_same(origin: str, host: str | None) -> bool:
    try:
        url = urlsplit(origin)
        port = url.port or DEFAULT_PORTS.get(url.scheme)
    except ValueError:
        return False
    match = _HOST.fullmatch((host or "").strip())
    if match is None or url.hostname is None:
        return False
    host_port = int(match["port"]) if match["port"] else DEFAULT_PORTS.get(url.scheme)
    return (url.hostname, port) == (match["name"].strip("[]").lower(), host_port)


def guarding(guard: Guard) -> Middleware:
    """Return the middleware: checks Host of every request, Origin of those that change something.

    It raises HostNotAllowed and OriginNotAllowed.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = request.headers
        hosts = headers.getall("Host", [])
        for host in hosts:
            guard.check_host(host)
        if request.method not in SAFE_METHODS:
            own = hosts[0] if hosts else None
            guard.check_origin(headers.get("Origin"), headers.get("Sec-Fetch-Site"), own)
        return await handler(request)

    return check
