"""Why a server hangs up: gRPC words a wrong ``[tls]`` like a server that is just going away."""

import socket
import ssl

from splitfed.config import TlsSection
from splitfed.config.address import parse_address

_PATIENCE_S = 5.0


def explain_hang_up(address: str, tls: TlsSection | None) -> str | None:
    """Shake hands once more, without gRPC, and tell whether a certificate is what the server misses.

    Args:
        address: ``host:port`` of a server that a gRPC call did not reach.
        tls: Certificates that the call showed; none: it was in plain text.

    Returns:
        One sentence; None if certificates are not the reason, or nobody can tell.

    Guarantees:
        * A server that is down, silent, or gone before the handshake is over is never taken for one that refuses a
          certificate.
    """
    host, port = parse_address(address)
    try:
        with (
            socket.create_connection((host, port), _PATIENCE_S) as connection,
            _context(tls).wrap_socket(connection, server_hostname=host) as secured,
        ):
            if tls is None:
                return (
                    f"The server at {address} takes no plain text; give this agent a [tls] section with a certificate "
                    "of the server's authority."
                )
            if _hangs_up(secured):
                return (
                    f"The server at {address} does not accept this agent's certificate {tls.certificate}; the "
                    "authority in the server's [tls] must be the one that signed it, and it must not have expired."
                )
    except OSError:  # as are the errors of ssl: gRPC has already said what there is to say
        pass
    return None


def _context(tls: TlsSection | None) -> ssl.SSLContext:
    """Give what a handshake needs: without certificates of our own, the other side's is not looked at."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if tls is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(tls.authority)
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _hangs_up(secured: ssl.SSLSocket) -> bool:
    """Say whether a server that has shaken hands goes without a word; one that takes the certificate greets first."""
    try:
        return not secured.recv(1)
    except TimeoutError:
        return False
    except (ssl.SSLError, ConnectionError):
        return True
