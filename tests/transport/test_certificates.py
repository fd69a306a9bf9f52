"""Certificate files that cannot work are named before a port or a channel is opened with them."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from splitfed.config import TlsSection
from splitfed.errors import ConfigError
from splitfed.transport.certificates import read_certificates
from tests.service.certificates import Authority


@pytest.fixture
def tls(tmp_path: Path) -> TlsSection:
    return Authority(tmp_path).issue("server")


def test_files_that_belong_together_are_read_as_they_are(tls: TlsSection) -> None:
    read = read_certificates(tls)
    assert (read.key, read.chain, read.authority) == tuple(
        path.read_bytes() for path in (tls.key, tls.certificate, tls.authority)
    )


def test_a_certificate_may_be_followed_by_those_that_signed_it(tls: TlsSection) -> None:
    tls.certificate.write_bytes(tls.certificate.read_bytes() + tls.authority.read_bytes())
    assert read_certificates(tls).chain == tls.certificate.read_bytes()


@pytest.mark.parametrize("which", ["key", "certificate", "authority"])
def test_a_missing_file_is_named(tls: TlsSection, which: str) -> None:
    path = getattr(tls, which)
    path.unlink()
    with pytest.raises(ConfigError, match=f"{path} cannot be read .*No such file"):
        read_certificates(tls)


@pytest.mark.parametrize("which", ["key", "certificate", "authority"])
@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_file_of_another_kind_is_named(tls: TlsSection, which: str, content: bytes) -> None:
    path = getattr(tls, which)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{path} holds no PEM"):
        read_certificates(tls)


def test_key_and_certificate_that_were_exchanged_are_named(tls: TlsSection) -> None:
    exchanged = tls.model_copy(update={"key": tls.certificate, "certificate": tls.key})
    with pytest.raises(ConfigError, match=f"{tls.key} holds no PEM certificate"):
        read_certificates(exchanged)


def test_a_key_with_a_password_is_refused(tls: TlsSection) -> None:
    tls.key.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="without a password"):
        read_certificates(tls)


def test_a_key_of_another_certificate_is_refused(tls: TlsSection, tmp_path: Path) -> None:
    mixed = tls.model_copy(update={"key": Authority(tmp_path, "other").issue("other").key})
    with pytest.raises(ConfigError, match=r"other-other\.key is not that of .*authority-server\.pem"):
        read_certificates(mixed)
