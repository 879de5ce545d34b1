"""Stand-ins for the hub, for an HTTPS server and for Google's storage, with faults on demand.

pytest's ``pythonpath`` holds this folder: ``from stand_ins import HttpsServer``.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Asked:
    """A request.

    path:    without the query.
    query:   the query's first value of each key.
    headers: as they came.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: dict[str, str]


@dataclass
class Answer:
    """What a server sends.

    cut:   the connection ends after so many bytes of the body.
    stall: after them, it first stays open and nothing comes.
    drip:  seconds after each byte.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    stall: bool = False
    drip: float = 0.0


Fault = Callable[[Asked, Answer], Answer]


class Server:
    """A server with files in memory, on a port of its own.

    files: content by path.
    asked: the requests so far.
    fault: changes an answer before it is sent; none by default.
    conditional: whether it knows ``If-Match``.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[Asked] = []
        self.fault: Fault = lambda asked, answer: answer
        self.released = threading.Event()
        self.conditional = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                split = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(split.query).items()}
                asked = Asked(self.command, unquote(split.path), query, dict(self.headers.items()))
                if not server.conditional:
                    asked.headers.pop("If-Match", None)
                server.asked.append(asked)
                answer = server.fault(asked, server.answer(asked))
                self.send_response(answer.status)
                for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                for part in [answer.body[: answer.cut]] if not answer.drip else map(bytes, zip(answer.body)):
                    self.wfile.write(part)
                    self.wfile.flush()
                    server.released.wait(answer.drip)
                if answer.stall:
                    server.released.wait(60)
                if answer.cut is not None:
                    self.close_connection = True

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that give up

        self._httpd = Quiet(("127.0.0.1", 0), Handler)
        if context is not None:
            self._httpd.socket = context.wrap_socket(self._httpd.socket, server_side=True)
        self.host = f"localhost:{self._httpd.server_address[1]}"
        threading.Thread(target=self._httpd.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, place: str, folder: Path) -> None:
        """Serve the files of a folder below a path."""
        self.files |= {f"{place}/{file.name}": file.read_bytes() for file in folder.iterdir()}

    def asked_for(self, end: str, method: str = "GET") -> list[Asked]:
        """The requests so far for a path that ends like this."""
        return [asked for asked in self.asked if asked.path.endswith(end) and asked.method == method]

    def answer(self, asked: Asked) -> Answer:
        """The answer to a request for a file, or for a part of it."""
        return ranged(asked, self.files.get(asked.path))

    def close(self) -> None:
        """Stop, and end what stalls."""
        self.released.set()
        self._httpd.shutdown()
        self._httpd.server_close()


def ranged(asked: Asked, body: bytes | None) -> Answer:
    """A file, or the part of it that a request asks for, as RFC 9110 has it."""
    if body is None:
        return Answer(404)
    tag = f'"{hashlib.md5(body).hexdigest()}"'
    if asked.headers.get("If-Match", tag) != tag:
        return Answer(412)
    start, _, end = asked.headers.get("Range", "").removeprefix("bytes=").partition("-")
    if not start:
        return Answer(200, {"ETag": tag}, body)
    if int(start) >= len(body):
        return Answer(416)
    part = body[int(start) : int(end) + 1 if end else None]
    told = f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}"
    return Answer(206, {"ETag": tag, "Content-Range": told}, part)


class Hub(Server):
    """The part of the hub's protocol that huggingface_hub speaks to download files.

    Files are at ``/org/repo/FILE``.

    commit:   of all branches.
    refusals: status and code of an error by repository.
    names:    by which repositories are called that were renamed.
    sizes:    that are stated of files instead of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.url = f"http://{self.host}"
        self.commit = COMMIT
        self.refusals: dict[str, tuple[int, str]] = {}
        self.names: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def answer(self, asked: Asked) -> Answer:
        parts = asked.path.strip("/").split("/")
        listed = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if listed else parts[:2])
        files = {p.removeprefix(f"/{repo}/"): b for p, b in self.files.items() if p.startswith(f"/{repo}/")}
        if repo in self.refusals or not files:
            status, code = self.refusals.get(repo, (401, "RepoNotFound"))
            return Answer(status, {"X-Error-Code": code})
        if (parts[5:6] if listed else parts[3:4]) not in ([], ["main"], ["v1"], [self.commit]):
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        if listed:
            siblings = [self._sibling(f"/{repo}/{name}", name, body) for name, body in files.items()]
            found = {"id": self.names.get(repo, repo), "sha": self.commit, "siblings": siblings}
            return Answer(200, {"Content-Type": "application/json"}, json.dumps(found).encode())
        name = "/".join(parts[4:])
        if name not in files:
            return Answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit})
        answer = ranged(asked, files[name])
        answer.headers["X-Repo-Commit"] = self.commit
        if asked.method == "HEAD" and asked.path in self.sizes:
            answer.headers["Content-Length"] = str(self.sizes[asked.path])
        if name.endswith(".safetensors"):
            answer.headers["ETag"] = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        return answer

    def _sibling(self, path: str, name: str, body: bytes) -> dict[str, object]:
        found: dict[str, object] = {"rfilename": name, "size": self.sizes.get(path, len(body))}
        found["blobId"] = hashlib.sha1(body).hexdigest()
        if name.endswith(".safetensors"):
            found["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        return found


class GoogleStorage(Server):
    """The part of Google's JSON interface that gcsfs speaks to read objects, which are at ``/BUCKET/KEY``."""

    def __init__(self) -> None:
        super().__init__()
        self.url = f"http://{self.host}"

    def answer(self, asked: Asked) -> Answer:
        found = asked.path.partition("/b/")[2]
        bucket, _, key = found.partition("/o")
        body = self.files.get(f"/{bucket}{key}")
        if not key:
            return Answer(200, {}, b'{"items": []}')
        if body is None or asked.query.get("generation") not in (None, generation(body)):
            return Answer(404)
        if asked.query.get("alt") == "media" or "/download/" in asked.path:
            return ranged(asked, body)
        told = {"bucket": bucket, "name": key[1:], "size": str(len(body)), "generation": generation(body)}
        told["md5Hash"] = b64encode(hashlib.md5(body).digest()).decode()
        told |= {"updated": "2026-01-01T00:00:00Z", "timeCreated": "2026-01-01T00:00:00Z"}
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(told).encode())


def generation(body: bytes) -> str:
    """A number that changes with the content."""
    return str(int.from_bytes(hashlib.md5(body).digest()[:6], "big"))


@contextmanager
def closed_after(server: Server) -> Iterator[Any]:
    """The server, which is closed at the end."""
    try:
        yield server
    finally:
        server.close()


def certified(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """How a server proves to be ``localhost``, and the certificate of who says so, made for the occasion."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "merged-lora tests")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / "ca.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    return context, certificate
