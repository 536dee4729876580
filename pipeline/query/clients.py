"""Clients as limits tell them apart: by access token, or without one by address."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address
from typing import Any

from pipeline.core.grants import Grant


def address_group(host: str) -> str:
    """Return what connections from `host` count for: its address, or its IPv6 network of 64 bits, which one client has."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or IPv6Address(int(address) >> 64 << 64))
    return str(address)


def client_of(scope: Mapping[str, Any]) -> str:
    """Return the client of a request: its access token, or without one its address."""
    grant: Grant = scope["grant"]
    if grant.name:
        return f"token {grant.name}"
    host, _ = scope.get("client") or ("", 0)
    return f"address {address_group(host)}"
