"""Network addresses as written in a configuration: ``host:port`` or ``[ipv6]:port``."""

import ipaddress
import re
from collections.abc import Mapping

from splitfed.errors import ConfigError

_ADDRESS = re.compile(r"(?:\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>[0-9]{1,5})")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?")


def parse_address(address: str) -> tuple[str, int]:
    """Split an address into host and port.

    Args:
        address: ``name:port``, ``1.2.3.4:port`` or ``[::1]:port``.

    Returns:
        The host without brackets, and the port from 0 to 65535.

    Raises:
        ValueError: If the address has another form.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"is {address!r}; write host:port, such as 127.0.0.1:50151 or [::1]:50151")
    host, port = match["ipv6"] or match["host"], int(match["port"])
    if port > 65535:
        raise ValueError(f"is {address!r}; a port lies between 0 and 65535")
    if match["ipv6"]:
        try:
            ipaddress.IPv6Address(host)
        except ValueError as error:
            raise ValueError(f"is {address!r}; only an IPv6 address goes between brackets") from error
    elif not _HOST_NAME.fullmatch(host):
        raise ValueError(f"is {address!r}; {host!r} is not a host name or an IP address")
    return host, port


def is_loopback(address: str) -> bool:
    """Say whether an address stays on this machine, so that plain text over it is not seen by others.

    A name other than ``localhost`` counts as not loopback: what it resolves to can change.

    Raises:
        ValueError: If the address is not ``host:port``.
    """
    host, _ = parse_address(address)
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_plain_text(addresses: Mapping[str, str | None], *, has_tls: bool, insecure: bool) -> None:
    """Stop a daemon that would speak plain text beyond this machine.

    Args:
        addresses: Address by its dotted key in the configuration; None where it is not set.
        has_tls: Whether the configuration has a ``[tls]`` section.
        insecure: Whether the user asked for plain text with ``--insecure``.

    Raises:
        ConfigError: If an address is not loopback and there is neither TLS nor ``--insecure``.
    """
    if has_tls or insecure:
        return
    for key, address in addresses.items():
        if address is not None and not is_loopback(address):
            raise ConfigError(
                f"{key} is {address!r}, which is not on this machine, and there is no [tls] section: "
                "add one with certificate, key and authority, or pass --insecure to send plain text"
            )
