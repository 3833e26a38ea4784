"""Tenants: from an API key to who asks and which classes it may use; generation.py asks."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowprefill.errors import ConfigError, InvalidRequest

TENANT_KEYS = ("key", "classes")
BEARER = "bearer "


class Unauthorized(InvalidRequest):
    """The request carries no key, or one that no tenant has."""

    status = 401
    code = "invalid_api_key"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks.

    Attributes:
        name: for its share of the queue; empty where the server knows no tenants.
        classes: the service classes it may use, the first by default; empty: all.
    """

    name: str = ""
    classes: tuple[str, ...] = ()


ONLY_TENANT = Tenant()  # of all clients that are no tenants


class Tenants:
    """The tenants of one server; with none configured, and no key, all clients are one."""

    def __init__(self, specs: Mapping[str, Any], api_key: str = "") -> None:
        """Read the setting ``tenants``; raises ConfigError.

        Args:
            api_key: of clients that are no tenants; empty: they need none where there are none.
        """
        # Keys are compared by their digests: how long that takes tells nothing about a key.
        self._by_digest = {_digest(api_key): ONLY_TENANT} if api_key else {}
        for name, spec in specs.items():
            key, tenant = _read(name, spec)
            if self._by_digest.setdefault(_digest(key), tenant) is not tenant:
                message = f"tenants.{name}.key: it is another tenant's, or api_key"
                raise ConfigError(message, param=f"tenants.{name}")

    def of(self, headers: Mapping[str, str]) -> Tenant:
        """Return whose key the headers carry.

        Raises:
            Unauthorized: the server has keys, and it is none of them.
        """
        if not self._by_digest:
            return ONLY_TENANT
        given = headers.get("Authorization", "")
        if given[: len(BEARER)].lower() != BEARER:
            message = "authorization: missing, expected 'Bearer' and a key of this server"
            raise Unauthorized(message, param="authorization")
        tenant = self._by_digest.get(_digest(given[len(BEARER) :].strip()))
        if tenant is None:
            message = "authorization: the key is none of this server's"
            raise Unauthorized(message, param="authorization")
        return tenant


def network_of(address: str | None) -> str:
    """Return what tells clients without keys apart: the address, of IPv6 its first 64 bits."""
    if address is None or ":" not in address:
        return address or ""
    whole = ipaddress.IPv6Address(address.partition("%")[0])
    return str(whole.ipv4_mapped or whole.exploded[:19])


def _read(name: str, spec: Any) -> tuple[str, Tenant]:
    """Return a tenant and its key; the key itself appears in no error."""
    where = f"tenants.{name}"
    if not name or not isinstance(spec, Mapping) or not set(spec) <= set(TENANT_KEYS):
        message = f"{where}: expected a name and an object with the keys {', '.join(TENANT_KEYS)}"
        raise ConfigError(message, param=where)
    key, classes = spec.get("key"), spec.get("classes", [])
    if not isinstance(key, str) or not key.strip():
        raise ConfigError(f"{where}.key: expected a text that is not empty", param=f"{where}.key")
    is_list = isinstance(classes, (list, tuple)) and all(isinstance(c, str) for c in classes)
    if not is_list:
        message = f"{where}.classes: got {classes!r}, expected a list of service classes"
        raise ConfigError(message, param=f"{where}.classes")
    return key.strip(), Tenant(name, tuple(classes))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
