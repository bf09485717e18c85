"""Stands before a real S3 or SFTP server, and makes the k-th request fail, once or from then on."""

import os
import re
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.servers import Listener

TRIES = 8  # more than s3fs and botocore make of one request
# What each kind of request is answered with.
S3_HOWS = {
    "PUT": ("500", "503", "reset", "lost"),
    "POST": ("500", "503", "reset", "lost"),
    "DELETE": ("500", "503", "lost"),
    "GET": ("500", "503", "lost", "cut", "short"),
    "HEAD": ("500", "503", "lost"),
    "LIST": ("500", "503", "cut", "stale new", "stale old"),
}
ERRORS = {"500": ("InternalError", "We encountered an internal error"), "503": ("SlowDown", "Reduce your request rate")}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One request that fails.

    Attributes:
        kind: of the request.
        at: its number among those of its kind, from 1.
        how: 500, 503; reset: the connection in the middle of the request; lost: the request was served, and the
            connection is reset in the middle of the answer; cut: the answer ends in the middle; short: so it does, and
            says that this is all; stale new, stale old: a listing without what was written last, or with what was
            removed. With * so does the same request when it is sent again, TRIES times in all; with + every later request
        of this kind.
        path: what it was counted on.
    """

    kind: str
    at: int
    how: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.at} {self.how} {self.path}"


class Judge:
    """Counts requests, and says which of them fail."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.begin(None)

    def begin(self, fault: Fault | None) -> None:
        """Count anew."""
        with self.lock:
            self.fault, self.calls, self.made, self.path = fault, list[tuple[str, int, str]](), 0, ""

    def __call__(self, kind: str, path: str) -> str:
        """Return how a request fails; empty if it does not."""
        with self.lock:
            number = 1 + sum(each == kind for each, _, _ in self.calls)
            self.calls.append((kind, number, path))
            fault = self.fault
            if fault is None or fault.kind != kind or number < fault.at:
                return ""
            if number == fault.at:
                self.path = path
            elif not fault.how.endswith("+") and not (
                fault.how.endswith("*") and path == self.path and self.made < TRIES
            ):
                return ""
            self.made += 1
            return fault.how.rstrip("+*")


class BadS3:
    """An HTTP proxy before an S3 server at a port of this machine."""

    def __init__(self, port: int) -> None:
        self.target, self.judge = port, Judge()
        self.sizes: dict[str, int] = {}  # of all keys that were written, in that order; -1: removed since
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (_Handler,), {"store": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def begin(self, fault: Fault | None) -> None:
        self.sizes.clear()
        self.judge.begin(fault)

    def record(self, method: str, kind: str, url: str, body: bytes) -> None:
        """Remember what was written and removed."""
        key = unquote(urlsplit(url).path).partition("/")[2].partition("/")[2]
        if method == "PUT" and "uploadId" not in url:
            self.sizes.pop(key, None)
            self.sizes[key] = len(body)
        elif kind == "DELETE":
            removed = [key] if method == "DELETE" else re.findall(r"<Key>(.*?)</Key>", body.decode())
            self.sizes |= {each: -len(each) for each in removed}

    def stale(self, data: bytes, prefix: str, how: str) -> bytes:
        """Return a listing as it was some requests ago."""
        text = data.decode()
        if how == "stale new":  # all that this start has written
            for key in [key for key, size in self.sizes.items() if size >= 0]:
                text = re.sub(
                    rf"<Contents>(?:(?!</Contents>).)*<Key>{re.escape(escape(key))}</Key>.*?</Contents>", "", text
                )
            return text.encode()
        old = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;0"
            f"&quot;</ETag><Size>1000</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key, size in self.sizes.items()
            if size < 0 and key.startswith(prefix) and f"<Key>{escape(key)}</Key>" not in text
        ]
        return text.replace("</ListBucketResult>", f"{''.join(old)}</ListBucketResult>").encode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Passes one request on."""

    protocol_version = "HTTP/1.1"
    store: BadS3

    def serve(self) -> None:
        url = urlsplit(self.path)
        kind = self.command
        if kind == "GET" and re.search(r"(^|&)(list-type|prefix|uploads|delimiter)\b", url.query):
            kind = "LIST"
        elif kind == "POST" and re.search(r"(^|&)delete\b", url.query):
            kind = "DELETE"
        assert "Transfer-Encoding" not in self.headers, "chunked requests are not implemented"
        length = int(self.headers.get("Content-Length") or 0)
        how = self.store.judge(kind, unquote(self.path))
        body = self.rfile.read(length // 2 if how == "reset" else length)
        if how == "reset":
            self.reset()
        elif how in ERRORS:
            code, text = ERRORS[how]
            found = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
            self.answer(int(how), [("Content-Type", "application/xml")], b"" if kind == "HEAD" else found, len(found))
        else:
            answer, data = self.passed_on(body)
            if answer.status < 300:
                self.store.record(self.command, kind, self.path, body)
            if how.startswith("stale"):
                found_prefix = re.search(r"(?:^|&)prefix=([^&]*)", url.query)
                data = self.store.stale(data, unquote(found_prefix[1]) if found_prefix else "", how)
            self.finish_with(how, answer, data)

    def passed_on(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        """Return the server's answer."""
        server = HTTPConnection("127.0.0.1", self.store.target, timeout=60)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                server.putheader(name, value)
        server.endheaders(body)
        answer = server.getresponse()
        data = answer.read()
        server.close()
        return answer, data

    def finish_with(self, how: str, answer: HTTPResponse, data: bytes) -> None:
        headers = [(name, value) for name, value in answer.getheaders()
                   if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server")]  # fmt: skip
        length = int(answer.headers.get("Content-Length") or 0) if self.command == "HEAD" else len(data)
        half = data[: len(data) // 2]
        if how == "lost":
            if half:
                self.answer(answer.status, headers, half, length)
            self.reset()
        elif how == "cut":
            self.answer(answer.status, headers, half, length)
            self.close_connection = True
        elif how == "short":
            self.answer(answer.status, headers, half, len(half))
        else:
            self.answer(answer.status, headers, data, length)

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int) -> None:
        with suppress(OSError):
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(data)

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.close_connection = True
        reset(self.connection)

    def log_message(self, *_: object) -> None:
        pass

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve  # noqa: N815


def reset(connection: socket.socket) -> None:
    """Close a connection with a TCP reset."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(connection.detach())


class BadSFTP(Listener):
    """A TCP proxy before an SFTP server, which counts what the client sends, packet by packet.

    A fault is of kind PACKET. How: reset, before the packet is passed on; lost: it is passed on, and the server's answer
    to it is not.
    """

    def __init__(self, port: int) -> None:
        self.target, self.judge = port, Judge()
        super().__init__()

    def begin(self, fault: Fault | None) -> None:
        self.judge.begin(fault)

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self.target))
        lost = threading.Event()

        def upwards(data: bytes) -> bool:
            how = self.judge("PACKET", "")
            if how == "lost":
                lost.set()
            return not how or how == "lost"

        back = threading.Thread(target=_pass, args=(server, client, lambda _: not lost.is_set()), daemon=True)
        back.start()
        _pass(client, server, upwards)


def _pass(source: socket.socket, sink: socket.socket, wanted: Callable[[bytes], bool]) -> None:
    """Pass on what comes, until something is not wanted: then both connections end."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if not wanted(data):
                break
            sink.sendall(data)
    for each in (source, sink):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
