"""Throw-away certificates and keys, to try Flower's deployment engine with TLS and authenticated SuperNodes.

`python -m fedtap.scenarios.certificates DIR --nodes 4 --host server.example` leaves in DIR what the commands of
`docs/tls.md` name: `ca.crt`, by which SuperNodes and `flwr` know the SuperLink; `server.crt` and
`server.key`, the SuperLink's; and for each SuperNode K a key pair, `supernode-K` and `supernode-K.pub`, by which the
SuperLink knows it. The authority's own key is never written, so nothing else can be signed with it. These are for
trials: a federation that lasts takes its certificates from its organisation's authority, and lets each SuperNode make
its key itself (`ssh-keygen -t ecdsa -b 384`).
"""

from __future__ import annotations

import datetime
import ipaddress
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtap.simulator.errors import FedtapError, short

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names and addresses that every server certificate holds."""


@dataclass(frozen=True)
class Certificates:
    """A folder of certificates and keys, as `make_certificates` leaves it."""

    folder: Path
    """Where they lie."""

    @property
    def authority(self) -> Path:
        """The certificate of the authority, PEM: `--ssl-ca-certfile`, `--root-certificates`."""
        return self.folder / "ca.crt"

    @property
    def server(self) -> Path:
        """The SuperLink's certificate, PEM: `--ssl-certfile`."""
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        """Its private key, PEM: `--ssl-keyfile`."""
        return self.folder / "server.key"

    def supernode(self, number: int) -> Path:
        """A SuperNode's private key, in OpenSSH's format: `--auth-supernode-private-key`."""
        return self.folder / f"supernode-{number}"

    def supernode_public(self, number: int) -> Path:
        """Its public key, in OpenSSH's format: `flwr supernode register`."""
        return self.folder / f"supernode-{number}.pub"


def make_certificates(folder: Path, nodes: int, hosts: Sequence[str] = (), days: int = 30) -> Certificates:
    """A new authority, a server certificate for the loopback and `hosts`, and a key pair for each SuperNode.

    Private keys are readable by their owner alone.

    Args:
        folder: made where it does not exist.
        nodes: SuperNodes.
        hosts: DNS names and IP addresses by which SuperNodes reach the SuperLink.
        days: for which the certificates hold, from now.

    Raises:
        FedtapError: a host is no name, or the folder holds files already or cannot be written.
    """
    made = Certificates(folder)
    names = [_general_name(host) for host in dict.fromkeys([*LOOPBACK, *hosts])]
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)  # clocks differ between hosts
    end = begin + datetime.timedelta(days=days)
    # TLS and SSH take both curves; Flower wants a NIST curve for SuperNodes
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority_name, server_name = _named("fedtap throw-away authority"), _named("fedtap SuperLink")

    def builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(authority_name, subject, key.public_key(), x509.random_serial_number(), begin, end)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
            .add_extension(_usage(signs_certificates=authority), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )

    server = (
        builder(server_name, server_key, authority=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    public = {
        made.authority: builder(authority_name, authority_key, authority=True),
        made.server: server,
    }
    files = {path: one.sign(authority_key, hashes.SHA256()).public_bytes(Encoding.PEM) for path, one in public.items()}
    private = {made.server_key: server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())}
    for number in range(nodes):
        key = ec.generate_private_key(ec.SECP384R1())
        private[made.supernode(number)] = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        files[made.supernode_public(number)] = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FedtapError(
                f"{short(folder)} holds files already, and new keys would not fit old certificates: name a new folder."
            )
        for path, content in private.items():
            path.touch(mode=0o600, exist_ok=False)  # before there is anything in it to be read
            path.write_bytes(content)
        for path, content in files.items():
            path.write_bytes(content)
    except OSError as error:
        raise FedtapError(f"{short(folder)} cannot be written ({error.strerror}): name another folder.") from error
    return made


def _general_name(host: str) -> x509.GeneralName:
    """A host as a certificate names it: an address, or a DNS name in ASCII."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removesuffix(".").split(".")
    if not all(label and label.isascii() and label.replace("-", "").isalnum() for label in labels):
        raise FedtapError(
            f"{short(host)!r} is neither a DNS name nor an IP address, so no certificate can name it: "
            "give the host alone, without port or scheme, as in --host server.example."
        )
    return x509.DNSName(host)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """An authority's key signs certificates, and a server's key signs the handshake."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def main(
    folder: Annotated[Path, typer.Argument(help="A new folder for certificates and keys.")],
    nodes: Annotated[int, typer.Option(min=1, max=10_000, help="SuperNodes, a key pair for each.")] = 5,
    host: Annotated[
        list[str] | None, typer.Option(help="A name or address of the SuperLink beside localhost; may be repeated.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="Days for which the certificates hold.")] = 30,
) -> None:
    """Make throw-away certificates for a SuperLink, and keys for its SuperNodes."""
    made = make_certificates(folder, nodes, host or (), days)
    print(f"{made.authority}, {made.server}, {made.server_key}")
    print(f"{made.supernode(0)} to {made.supernode(nodes - 1).name}, each with its .pub")


if __name__ == "__main__":
    try:
        typer.run(main)
    except FedtapError as error:
        print(f"fedtap: {error}", file=sys.stderr)
        raise SystemExit(2) from None
