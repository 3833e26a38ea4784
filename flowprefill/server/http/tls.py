"""TLS: the certificates that the settings name, as what app.py listens with."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn

from flowprefill.errors import ConfigError
from flowprefill.server.options import ServerOptions


class _Encrypted(Exception):
    """The key wants a passphrase, and a server has no one to type it."""


def tls_context(options: ServerOptions) -> ssl.SSLContext | None:
    """Return what the server listens with; None: plain HTTP.

    Raises:
        ConfigError: a file is missing, cannot be read, or is not what it should be; or settings
            are given of which one alone means nothing.
    """
    certificate, key, authorities = options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs
    if not certificate:
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(options, name):
                _refuse(name, getattr(options, name), "ssl_certfile with it")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    for name, path in (("ssl_certfile", certificate), ("ssl_keyfile", key or certificate)):
        _check_readable(name, path)
    _load_chain(context, certificate, key)
    if authorities:
        _check_readable("ssl_ca_certs", authorities)
        try:
            context.load_verify_locations(authorities)
        except ssl.SSLError as error:
            _refuse("ssl_ca_certs", authorities, f"certificates in PEM ({_reason(error)})")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_chain(context: ssl.SSLContext, certificate: str, key: str) -> None:
    def no_passphrase() -> NoReturn:
        raise _Encrypted

    try:
        # OpenSSL says of both files only that something is wrong: first the certificate alone.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificate)
    except ssl.SSLError as error:
        _refuse("ssl_certfile", certificate, f"a certificate chain in PEM ({_reason(error)})")
    name, path = ("ssl_keyfile", key) if key else ("ssl_certfile", certificate)
    try:
        context.load_cert_chain(certificate, key or None, no_passphrase)
    except _Encrypted:
        _refuse(name, path, "a private key without a passphrase")
    except ssl.SSLError as error:
        _refuse(name, path, f"the certificate's private key in PEM ({_reason(error)})")


def _check_readable(name: str, path: str) -> None:
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        _refuse(name, path, f"a file that can be read ({error.strerror})")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


def _refuse(name: str, value: str, allowed: str) -> NoReturn:
    raise ConfigError(f"{name}: got {value!r}, expected {allowed}", param=name) from None
