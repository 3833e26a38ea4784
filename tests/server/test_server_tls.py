"""TLS: real handshakes with certificates made here, deadlines, and what is wrong with a file."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from fake_engine import FakeEngine
from running_server import WAIT_S, StartServer

from flowprefill import cli
from flowprefill.errors import ConfigError
from flowprefill.server.http.tls import tls_context
from flowprefill.server.options import ServerOptions

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="there is no openssl to make certificates")


@dataclass(frozen=True)
class Pair:
    """A self-signed certificate and its key."""

    cert: str
    key: str


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


def make_pair(folder: Path) -> Pair:
    made = Pair(str(folder / "cert.pem"), str(folder / "key.pem"))
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ["-subj", "/CN=test", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    openssl(*words, *names, "-days", "2", "-keyout", made.key, "-out", made.cert)
    return made


def openssl(*words: str) -> None:
    assert OPENSSL is not None
    subprocess.run([OPENSSL, *words], check=True, capture_output=True)


def trusting(pair: Pair, client: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pair.cert)
    if client is not None:
        context.load_cert_chain(client.cert, client.key)
    return context


def options_of(pair: Pair) -> dict[str, str]:
    return {"ssl_certfile": pair.cert, "ssl_keyfile": pair.key}


def test_openai_client_talks_over_tls(
    engine: FakeEngine, start_server: StartServer, pair: Pair
) -> None:
    server = start_server(engine, **options_of(pair))

    def client(trusted: ssl.SSLContext) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(verify=trusted)
        url = f"{server.url}/v1"
        return openai.OpenAI(base_url=url, api_key="none", http_client=http, max_retries=0)

    with client(trusting(pair)) as known:
        assert known.completions.create(model="fake-model", prompt="a").choices[0].text
        stream = known.chat.completions.create(
            model="fake-model", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        assert "".join(one.choices[0].delta.content or "" for one in stream) == "Hello world"
    stranger = client(ssl.create_default_context())
    with stranger, pytest.raises(openai.APIConnectionError):
        stranger.completions.create(model="fake-model", prompt="a")
    assert len(engine.submitted) == 2


def test_a_pages_origin_has_the_port_of_its_scheme(
    engine: FakeEngine, start_server: StartServer, pair: Pair
) -> None:
    server = start_server(engine, **options_of(pair))
    server.tls = trusting(pair)
    for origin, host, status in (
        (server.url, f"127.0.0.1:{server.port}", 200),
        ("https://localhost", "localhost", 200),
        ("https://localhost", "localhost:443", 200),
        ("http://localhost", "localhost:443", 403),
        (f"https://localhost:{server.port}", "localhost", 403),
    ):
        reply = server.post("/tokenize", {"prompt": "a"}, {"Origin": origin, "Host": host})
        assert reply.status == status, (origin, host)


def test_explain_trusts_what_the_environment_names(
    engine: FakeEngine, start_server: StartServer, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(engine, **options_of(pair))
    command = ["explain", "--json", "--url", f"https://127.0.0.1:{server.port}"]
    assert cli.main(command) == 1
    monkeypatch.setenv("SSL_CERT_FILE", pair.cert)
    assert cli.main(command) == 0


def test_clients_show_a_certificate_where_that_is_wanted(
    engine: FakeEngine, start_server: StartServer, pair: Pair, tmp_path: Path
) -> None:
    known = make_pair(tmp_path)
    server = start_server(engine, **options_of(pair), ssl_ca_certs=known.cert)
    server.tls = trusting(pair, known)
    assert server.get("/health").status == 200
    for wrong in (None, pair):
        server.tls = trusting(pair, wrong)
        # TLS 1.3: the client learns of the refusal when it reads, or as it writes.
        with pytest.raises((ssl.SSLError, ConnectionError)):
            server.post("/v1/completions", {"prompt": "a"})
    assert engine.submitted == []


def test_a_handshake_has_a_deadline_and_plain_http_gets_nothing(
    engine: FakeEngine, start_server: StartServer, pair: Pair
) -> None:
    server = start_server(engine, **options_of(pair), header_timeout_s=0.3)
    for said in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
            connection.sendall(said)
            received = connection.recv(4096)
            assert not received.startswith(b"HTTP")
            while received:
                received = connection.recv(4096)
    server.tls = trusting(pair)
    assert server.get_again("/health").status == 200


def test_what_is_wrong_with_a_file_is_said(pair: Pair, tmp_path: Path) -> None:
    def refused(**options: str) -> str:
        with pytest.raises(ConfigError) as caught:
            tls_context(ServerOptions(**options))  # type: ignore[arg-type]
        return caught.value.message

    missing, text = str(tmp_path / "none.pem"), str(tmp_path / "text.pem")
    Path(text).write_text("not a certificate")
    other = make_pair(tmp_path)
    locked = str(tmp_path / "locked.pem")
    openssl("ec", "-aes256", "-passout", "pass:secret", "-in", pair.key, "-out", locked)
    cert, key = pair.cert, pair.key
    for options, words in (
        ({"ssl_certfile": missing}, ("ssl_certfile", missing, "No such file")),
        ({"ssl_certfile": str(tmp_path)}, ("ssl_certfile", "Is a directory")),
        ({"ssl_certfile": text}, ("ssl_certfile", text, "a certificate chain in PEM")),
        ({"ssl_certfile": cert}, ("ssl_certfile", "the certificate's private key")),
        ({"ssl_certfile": cert, "ssl_keyfile": missing}, ("ssl_keyfile", missing, "No such file")),
        ({"ssl_certfile": cert, "ssl_keyfile": text}, ("ssl_keyfile", text, "private key in PEM")),
        ({"ssl_certfile": cert, "ssl_keyfile": other.key}, ("ssl_keyfile", "key values mismatch")),
        ({"ssl_certfile": cert, "ssl_keyfile": locked}, ("ssl_keyfile", "without a passphrase")),
        ({"ssl_keyfile": key}, ("ssl_keyfile", "ssl_certfile with it")),
        ({"ssl_ca_certs": cert}, ("ssl_ca_certs", "ssl_certfile with it")),
        ({**options_of(pair), "ssl_ca_certs": text}, ("ssl_ca_certs", "certificates in PEM")),
    ):
        message = refused(**options)
        assert all(word in message for word in words), message
    both = tmp_path / "both.pem"
    both.write_text(Path(cert).read_text() + Path(key).read_text())
    assert tls_context(ServerOptions(ssl_certfile=str(both))) is not None
    assert tls_context(ServerOptions()) is None


def test_a_wrong_file_stops_the_start_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["serve", "no-such-model", "--ssl-certfile", "/no/such.pem"]) == 2
    said = capsys.readouterr().err
    assert "ssl_certfile: got '/no/such.pem', expected a file that can be read" in said
    assert "no-such-model" not in said
