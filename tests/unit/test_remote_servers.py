"""Servers that fail, send wrong or too many bytes, or stall: which requests are repeated, and which errors result."""

from __future__ import annotations

import functools
import gzip
import http.server
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

from pipeline.plan import ShardRequest
from pipeline.storage.files import Interrupted
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import SampleReader
from pipeline.storage.remote import client as remote
from pipeline.storage.remote import shard_set as remote_set
from pipeline.storage.remote.client import Remote
from pipeline.storage.remote.errors import NoRanges, RemoteError, ServerFailed
from pipeline.storage.remote.shard_set import GIB, open_set
from pipeline.storage.remote.url import check_url, warn_without_tls
from shards.errors import UserError
from shards.format.dataset import ShardSet
from tests.support.serving import Site, serve

FILE, SIZE = "data.tar", 3_000_000
CONTENT = np.random.default_rng(0).bytes(SIZE)
START, STOP = 1_000_000, 2_000_000

Answer = Callable[[BaseHTTPRequestHandler, int, int, bytes], None]
"""Handler, start and stop of the requested range, and the content of the file."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


@pytest.fixture
def gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the retries, only for servers that never recover: a slow machine needs time for a second request."""
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.1)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / FILE).write_bytes(CONTENT)
    with serve(tmp_path / "served") as site:
        yield site


def respond(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {
        "Content-Length": str(len(body)),
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    try:
        handler.wfile.write(body)
    except OSError:
        handler.close_connection = True


def span(start: int, stop: int, size: int = SIZE) -> str:
    return f"bytes {start}-{stop - 1}/{size}"


def answers(site: Site, answer: Answer, times: int = 10**6) -> list[str]:
    """Answer the next requests with `answer`; return a list to which their Range headers will be appended."""
    requested: list[str] = []

    def instead(handler: BaseHTTPRequestHandler, name: str, content: bytes) -> bool:
        if len(requested) >= times:
            return False
        requested.append(handler.headers.get("Range", ""))
        start, stop = (requested[-1].removeprefix("bytes=") or f"0-{SIZE - 1}").split("-")
        answer(handler, int(start), int(stop) + 1, content)
        return True

    site.instead = instead
    return requested


def cut(handler: BaseHTTPRequestHandler, start: int, stop: int, content: bytes) -> None:
    """Close the connection after 100 bytes."""
    respond(
        handler, 206, content[start : start + 100], Content_Length=str(stop - start), Content_Range=span(start, stop)
    )
    handler.close_connection = True


TRANSIENT: dict[str, tuple[Answer, str]] = {
    "status 500": (lambda h, a, b, c: respond(h, 500, b""), "status 500"),
    "status 503 with a page": (lambda h, a, b, c: respond(h, 503, b"<html>maintenance</html>"), "status 503"),
    "a page with status 200": (lambda h, a, b, c: respond(h, 200, b"<html>maintenance</html>"), "a web page instead"),
    "a long page": (lambda h, a, b, c: respond(h, 200, b"\n<!DOCTYPE html>" + b" " * SIZE), "a web page instead"),
    "a short file": (lambda h, a, b, c: respond(h, 200, c[:1000]), "a file of 1,000 bytes"),
    "no body": (lambda h, a, b, c: respond(h, 206, b"", Content_Range=span(a, b)), "ends at byte 1,000,000"),
    "another range": (lambda h, a, b, c: respond(h, 206, c[: b - a], Content_Range=span(0, b - a)), "bytes 0-999999/"),
    "no range": (lambda h, a, b, c: respond(h, 206, c[a:b]), "bytes from 1,000,000, got Content-Range: none"),
    "status 416": (lambda h, a, b, c: respond(h, 416, b""), "status 416"),
    "no such compression": (
        lambda h, a, b, c: respond(h, 206, c[a:b], Content_Range=span(a, b), Content_Encoding="gzip"),
        "ClientPayloadError",
    ),
    "a broken connection": (cut, "ClientPayloadError"),
    "a redirect to itself": (lambda h, a, b, c: respond(h, 302, b"", Location=h.path), "TooManyRedirects"),
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_request_that_fails_temporarily_is_repeated(site: Site, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    # A redirect loop is one failure of the client, but 11 requests.
    requested = answers(site, TRANSIENT[fault][0], times=11 if "redirect" in fault else 2)
    with caplog.at_level(logging.WARNING):
        assert Remote(site.url).read(FILE, START, STOP) == CONTENT[START:STOP]
    assert set(requested) == {f"bytes={START}-{STOP - 1}"}
    (line,) = caplog.messages
    assert line.startswith(f"{site.url}/{FILE}: ")
    assert TRANSIENT[fault][1] in line
    assert "retrying for up to 60 s" in line


@pytest.mark.usefixtures("gives_up")
@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_request_that_keeps_failing_is_a_failure_of_the_server(site: Site, fault: str) -> None:
    answers(site, TRANSIENT[fault][0])
    message = rf"{FILE}: the request failed \d+ times in \d+ s, last error: .*{TRANSIENT[fault][1]}"
    with pytest.raises(ServerFailed, match=message) as raised:
        Remote(site.url).read(FILE, START, STOP)
    assert raised.value.exit_code == 1


PERMANENT: dict[str, tuple[Answer, str]] = {
    "status 403": (lambda h, a, b, c: respond(h, 403, b""), "access denied.*403.*AWS_.*netrc"),
    "status 404": (lambda h, a, b, c: respond(h, 404, b""), "not found on the server.*404"),
    "status 400": (lambda h, a, b, c: respond(h, 400, b""), "status 400"),
    "a shorter file": (
        lambda h, a, b, c: respond(h, 206, c[a : a + 10], Content_Range=span(a, a + 10, a + 10)),
        "truncated on the server: it has 1,000,010 bytes, but the manifest requires at least 2,000,000",
    ),
    "a file that ends before the range": (
        lambda h, a, b, c: respond(h, 416, b"", Content_Range="bytes */999"),
        "truncated on the server: it has 999 bytes, but the manifest requires at least 2,000,000",
    ),
    "a redirect to a file": (
        lambda h, a, b, c: respond(h, 302, b"", Location="file:///etc/passwd"),
        r"redirects to a URL that is not http\(s\)://",
    ),
}


@pytest.mark.parametrize("fault", PERMANENT)
def test_a_permanent_failure_is_reported_after_one_request(site: Site, fault: str) -> None:
    requested = answers(site, PERMANENT[fault][0])
    with pytest.raises(RemoteError, match=f"{FILE}: .*{PERMANENT[fault][1]}") as raised:
        Remote(site.url).read(FILE, START, STOP)
    assert raised.value.exit_code == 2
    assert len(requested) == 1


def test_a_compressed_response_is_decompressed(site: Site) -> None:
    def compressed(handler: BaseHTTPRequestHandler, start: int, stop: int, content: bytes) -> None:
        assert handler.headers["Accept-Encoding"] == "identity"
        respond(
            handler, 206, gzip.compress(content[start:stop]), Content_Range=span(start, stop), Content_Encoding="gzip"
        )

    answers(site, compressed)
    assert Remote(site.url).read(FILE, START, STOP) == CONTENT[START:STOP]


def send_for_ever(site: Site, handler: BaseHTTPRequestHandler) -> None:
    """Send chunks of zeros until the client closes the connection, at most 1 GiB."""
    try:
        for _ in range(1 << 14):
            site.sent += handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
    except OSError:
        handler.close_connection = True


def test_only_requested_bytes_are_read(site: Site) -> None:
    def endless(handler: BaseHTTPRequestHandler, start: int, stop: int, content: bytes) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", span(start, stop))
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%b\r\n" % (stop - start, content[start:stop]))
        send_for_ever(site, handler)

    answers(site, endless)
    assert Remote(site.url).read(FILE, START, STOP) == CONTENT[START:STOP]
    assert site.sent < 20 << 20


def test_an_interrupted_transfer_is_resumed_after_the_received_bytes(site: Site) -> None:
    def half(handler: BaseHTTPRequestHandler, start: int, stop: int, content: bytes) -> None:
        middle = (start + stop) // 2
        respond(handler, 206, content[start:middle], Content_Length=str(stop - start), Content_Range=span(start, stop))
        handler.close_connection = True

    requested = answers(site, half, times=3)
    assert Remote(site.url).read(FILE, START, STOP) == CONTENT[START:STOP]
    starts = [int(text.removeprefix("bytes=").split("-")[0]) for text in requested]
    assert starts == [START, START + 500_000, START + 750_000]


def drip(handler: BaseHTTPRequestHandler, start: int, stop: int, content: bytes) -> None:
    """Send 50 bytes per second."""
    handler.send_response(206)
    handler.send_header("Content-Length", str(stop - start))
    handler.send_header("Content-Range", span(start, stop))
    handler.end_headers()
    try:
        for at in range(start, stop):
            handler.wfile.write(content[at : at + 1])
            handler.wfile.flush()
            time.sleep(0.02)
    except OSError:
        handler.close_connection = True


@pytest.mark.usefixtures("gives_up")
def test_a_stalled_transfer_is_logged_and_ended(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.2)
    answers(site, drip)
    with caplog.at_level(logging.WARNING), pytest.raises(ServerFailed, match=r"stalled: \d+ bytes in \d+ s"):
        Remote(site.url).read(FILE, START, STOP)
    assert sum("slow transfer" in line for line in caplog.messages) == 1


def test_a_slow_transfer_that_makes_progress_is_not_ended(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 1.5)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)

    def slow(handler: BaseHTTPRequestHandler, start: int, stop: int, content: bytes) -> None:
        handler.send_response(206)
        handler.send_header("Content-Length", str(stop - start))
        handler.send_header("Content-Range", span(start, stop))
        handler.end_headers()
        for at in range(start, stop, 100_000):
            handler.wfile.write(content[at : min(at + 100_000, stop)])
            time.sleep(0.2)

    answers(site, slow)
    assert Remote(site.url).read(FILE, START, STOP) == CONTENT[START:STOP]


def test_an_interrupt_ends_a_stalled_transfer(site: Site) -> None:
    answers(site, drip)
    client = Remote(site.url)
    threading.Timer(0.3, client.interrupt).start()
    with pytest.raises(Interrupted):
        client.read(FILE, START, STOP)


def test_a_blocking_file_system_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/somewhere/data.tar", CONTENT)
    client, done = Remote("memory://somewhere"), threading.Event()
    monkeypatch.setattr(type(memory), "cat_file", lambda *_, **__: done.wait(30))
    threading.Timer(0.2, client.interrupt).start()
    with pytest.raises(Interrupted):
        client.read(FILE, START, STOP)
    done.set()


def test_a_truncated_file_of_any_file_system_is_reported() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/short/data.tar", CONTENT[:1000])
    message = r"data.tar: truncated on the server: it has 1,000 bytes, but the manifest requires at least 2,000,000"
    with pytest.raises(RemoteError, match=message):
        Remote("memory://short").read(FILE, START, STOP)


def test_the_size_of_a_manifest_is_limited(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_set, "MAX_MANIFEST_BYTES", 1 << 20)

    def endless(handler: BaseHTTPRequestHandler, name: str, content: bytes) -> bool:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        send_for_ever(site, handler)
        return True

    with serve(photos, instead=endless) as site:
        with pytest.raises(RemoteError, match=r"dataset.json: larger than the 1,048,576 bytes that are allowed"):
            open_set(site.url, cache=tmp_path / "cache")
        assert site.sent < 20 << 20


# Servers without support for range requests.


class Counting(http.server.SimpleHTTPRequestHandler):
    """The server of `python -m http.server`, with a count of the bytes that it has sent."""

    sent = 0

    def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def]
        while chunk := source.read(1 << 16):
            outputfile.write(chunk)
            Counting.sent += len(chunk)

    def handle(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def plain_server(photos: Path) -> Iterator[str]:
    Counting.sent = 0
    handler = functools.partial(Counting, directory=str(photos))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_without_ranges_each_file_is_downloaded_once(plain_server: str, photos: Path, tmp_path: Path) -> None:
    dataset = open_set(plain_server, cache=tmp_path)
    local = ShardSet(photos)
    ids = np.random.default_rng(0).permutation(local.split("train").samples)
    with SampleReader(open_storage(dataset, "train")) as reader, SampleReader(open_storage(local, "train")) as expected:
        assert not reader.random_access()
        for some in np.array_split(ids, 8):
            found, wanted = reader.read(some).checked(), expected.read(some).checked()
            assert all(map(np.array_equal, found.images, wanted.images))
    size = sum(shard.bytes for shard in local.split("train").shards)
    assert Counting.sent < 1.5 * size


def test_without_ranges_a_file_must_fit_into_the_cache(plain_server: str, photos: Path, tmp_path: Path) -> None:
    shards = ShardSet(photos).split("train").shards
    room = min(shard.bytes for shard in shards) // 2
    dataset = open_set(plain_server, cache=tmp_path, cache_gib=room / GIB)
    with (
        SampleReader(open_storage(dataset, "train"), threads=4) as reader,
        pytest.raises(NoRanges, match=r"ignores HTTP range requests.*--cache-size.*nginx") as raised,
    ):
        reader.read(np.arange(20))
    assert raised.value.exit_code == 2
    assert Counting.sent < sum(shard.bytes for shard in shards) / 2


def test_without_ranges_all_shards_of_a_batch_must_fit_into_the_cache(
    plain_server: str, photos: Path, tmp_path: Path
) -> None:
    shards = ShardSet(photos).split("train").shards
    room = sum(shard.bytes for shard in shards) - 1
    dataset = open_set(plain_server, cache=tmp_path, cache_gib=room / GIB)
    with SampleReader(open_storage(dataset, "train")) as reader:
        reader.random_access()
        reader.prefetch(iter([ShardRequest(0, 9, list(range(len(shards))))]))
        with pytest.raises(NoRanges, match=rf"have {room + 1:,} bytes, the cache is limited to {room:,} bytes"):
            reader.read(np.arange(20))
    assert Counting.sent < sum(shard.bytes for shard in shards) / 2


# Certificates, credentials, digests.


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Create a self-signed certificate for 127.0.0.1 and its key."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths[1].write_bytes(key.private_bytes(*form))
    return paths


OPEN = """
import sys
from pathlib import Path
from pipeline.storage.remote.shard_set import open_set
from shards.errors import UserError
try:
    print(open_set(sys.argv[1], cache=Path(sys.argv[2])).split("train").samples)
except UserError as error:
    print(f"exit {error.exit_code}: {error}")
"""


def open_elsewhere(url: str, cache: Path, **environment: str) -> str:
    """Open a set in a new process, because SSL_CERT_FILE and NETRC are read only once per process."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("SSL_CERT_FILE", "NETRC")}
    command = [sys.executable, "-c", OPEN, url, str(cache)]
    done = subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_a_trusted_certificate_is_accepted(photos: Path, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    samples = str(ShardSet(photos).split("train").samples)
    with serve(photos, tls=context) as site, serve(photos) as other:
        assert site.url.startswith("https://")
        message = open_elsewhere(site.url, tmp_path / "refused")
        assert message.startswith("exit 2: https://127.0.0.1:")
        assert "the server's TLS certificate is not trusted (self-signed certificate" in message
        assert "SSL_CERT_FILE" in message
        assert open_elsewhere(site.url, tmp_path / "accepted", SSL_CERT_FILE=str(certificate)) == samples

        def elsewhere(handler: BaseHTTPRequestHandler, name: str, content: bytes) -> bool:
            respond(handler, 302, b"", Location=f"{other.url}/{name}")
            return True

        site.instead = elsewhere
        message = open_elsewhere(site.url, tmp_path / "redirected", SSL_CERT_FILE=str(certificate))
        assert message.startswith("exit 2: ")
        assert "redirects from https:// to http://" in message


def test_credentials_of_netrc_are_used(photos: Path, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")

    def guarded(handler: BaseHTTPRequestHandler, name: str, content: bytes) -> bool:
        allowed = handler.headers.get("Authorization") == "Basic bWU6c2VjcmV0"
        if not allowed:
            respond(handler, 401, b"")
        return not allowed

    with serve(photos, instead=guarded) as site:
        message = open_elsewhere(site.url, tmp_path / "refused", NETRC=str(tmp_path / "none"))
        assert "exit 2" in message
        assert "access denied (PermissionError: status 401" in message
        assert open_elsewhere(site.url, tmp_path / "accepted", NETRC=str(netrc)).isdecimal()


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@host/set",
        "https://secret@host/set",
        "s3://key:secret@bucket/set",
        "https://host/set?X-Amz-Signature=secret",
        "simplecache::https://me:secret@host/set",
        "https://host/set#secret",
    ],
)
def test_credentials_in_a_url_are_rejected_and_not_shown(url: str, tmp_path: Path) -> None:
    from launch.config.data import DataConfig

    for reject in (check_url, functools.partial(open_set, cache=tmp_path), lambda url: DataConfig(data=url)):
        with pytest.raises(UserError, match=r"AWS_\*.*fsspec.*netrc") as raised:
            reject(url)
        assert "secret" not in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["https://host:8080/a/set", "s3://bucket/set", "abfs://container@account.dfs.core.windows.net/set"]
)
def test_urls_without_credentials_are_accepted(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://host/set", True),
        ("http://10.0.0.1/set", True),
        ("https://host/set", False),
        ("s3://bucket/set", False),
        ("http://localhost:80/set", False),
        ("http://127.0.0.1:80/set", False),
        ("http://[::1]/set", False),
    ],
)
def test_a_url_without_tls_causes_a_warning(url: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_without_tls(url)
    assert [("http:// is not encrypted" in line) for line in caplog.messages] == [True] * warned
