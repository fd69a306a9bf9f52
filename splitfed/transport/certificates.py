"""Certificates for mutual TLS, checked when they are read: gRPC itself says nothing of use about a wrong file."""

from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates

from splitfed.config import TlsSection
from splitfed.errors import ConfigError


@dataclass(frozen=True)
class Certificates:
    """What one side of mutual TLS shows and trusts, as PEM.

    Attributes:
        key: Private key.
        chain: Its certificate, with the intermediate ones after it.
        authority: Certificate of the authority that signed the other side's.
    """

    key: bytes
    chain: bytes
    authority: bytes


def read_certificates(tls: TlsSection) -> Certificates:
    """Read the files that a configuration names.

    Raises:
        ConfigError: If one cannot be read or is of another kind, or the key is not the certificate's.
    """
    key, chain, authority = (_read(path) for path in (tls.key, tls.certificate, tls.authority))
    for path, content in ((tls.certificate, chain), (tls.authority, authority)):
        try:
            load_pem_x509_certificates(content)
        except ValueError as error:
            raise ConfigError(f"The file {path} holds no PEM certificate; check [tls].") from error
    try:
        public_key = load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"The file {tls.key} holds no PEM private key without a password; check [tls].") from error
    if load_pem_x509_certificates(chain)[0].public_key() != public_key:
        raise ConfigError(f"The private key in {tls.key} is not that of {tls.certificate}; check [tls].")
    return Certificates(key, chain, authority)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The certificate file {path} cannot be read ({error.strerror}); check [tls].") from error
