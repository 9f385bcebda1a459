"""Which ports a server's processes listen on."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

import psutil


@dataclass(frozen=True, order=True)
class Port:
    process: str
    address: str
    number: int

    @property
    def is_local(self) -> bool:
        """Only this host reaches it."""
        return ip_address(self.address).is_loopback

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.number}"


def listening_ports() -> list[Port]:
    """The TCP ports of this process and of all that it has started, in order of their processes."""
    this = psutil.Process()
    found = set()
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found |= {
                Port(process.name(), _address(each.laddr.ip), each.laddr.port)
                for each in process.net_connections("tcp")
                if each.status == psutil.CONN_LISTEN
            }
    return sorted(found)


def by_process(ports: Iterable[Port]) -> str:
    names: dict[str, list[str]] = {}
    for port in ports:
        names.setdefault(port.process, []).append(str(port))
    return "; ".join(f"{name} {', '.join(ports)}" for name, ports in names.items())


def _address(given: str) -> str:
    address = ip_address(given)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)
