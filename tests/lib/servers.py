"""Servers of data for tests: HTTP, Hugging Face hub, Google Cloud Storage and S3 (moto), with faults on request."""

import hashlib
import http.client
import json
import os
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SLOW_S = 3.0
TRICKLE_BYTES, TRICKLE_S = 1 << 16, 1 / 24  # 1.5 MiB/s
REDIRECTS = {"to a file": "file:///etc/hostname", "in a loop": "?again"}  # Location of the answer
RANGES = {"other bytes": "bytes 1-9/*", "other size": "bytes 0-9/10"}  # Content-Range of the answer


@dataclass
class Faults:
    """The faults of a server, which a test chooses in the first four fields. The server fills the other fields.

    A fault is "429", "500", "503" (status codes), "cut" (half of the body), "slow" (SLOW_S seconds late), "trickle"
    (1.5 MiB/s), "endless" (body without end), "packed" (falsely declared as gzip), or a key of REDIRECTS or RANGES.

    Attributes:
        of: by file name, the faults of the next GET requests of the file, in order.
        heads: the same for HEAD requests.
        every: each `every`-th GET request of a byte range gets a fault; 0: none does.
        kinds: the faults for `every`, which take turns.
        asked: names of the files that clients requested by GET.
        injected: number of GET requests that were answered with a fault.
        sent: bytes of "endless" bodies that were sent.
    """

    of: dict[str, list[str]] = field(default_factory=dict)
    heads: dict[str, list[str]] = field(default_factory=dict)
    every: int = 0
    kinds: tuple[str, ...] = ("500", "cut", "503")
    asked: list[str] = field(default_factory=list)
    injected: int = 0
    sent: int = 0
    _ranges: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, path: str, is_range: bool, is_head: bool = False) -> str | None:
        name = path.partition("?")[0].rpartition("/")[2]
        with self._lock:
            if is_head:
                return self.heads[name].pop(0) if self.heads.get(name) else None
            self.asked.append(name)
            kind = self.of[name].pop(0) if self.of.get(name) else None
            self._ranges += is_range
            if kind is None and self.every and is_range and self._ranges % self.every == 0:
                kind = self.kinds[self._ranges // self.every % len(self.kinds)]
            self.injected += kind is not None
        return kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Answer the request with this status, headers and body, or with the fault that is due for it."""
        is_head = self.command == "HEAD"
        fault = self.faults.next(self.path, "Range" in self.headers, is_head) if is_head or self.command == "GET" else None
        if fault is not None and fault.isdigit():
            status, headers, body = int(fault), {"Retry-After": "1"} if fault == "429" else {}, b""
        if fault in REDIRECTS:
            status, headers, body = 302, {"Location": REDIRECTS[fault]}, b""
        if fault in RANGES:
            headers = {**headers, "Content-Range": RANGES[fault]}
        if fault == "packed":
            headers = {**headers, "Content-Encoding": "gzip"}
        if fault == "endless":
            self.answer_endless()
        if fault == "slow":
            time.sleep(SLOW_S)
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "trickle":
            for start in range(0, len(body), TRICKLE_BYTES):
                time.sleep(TRICKLE_S)
                self.wfile.write(body[start : start + TRICKLE_BYTES])
        elif self.command != "HEAD":
            self.wfile.write(body)

    def answer_endless(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        while True:  # until the client closes the connection, which raises here
            self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
            self.faults.sent += 1 << 16

    def answer_json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.answer(200, {"Content-Type": "application/json", "Content-Length": str(len(data))}, data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError


class _Files(_Handler):
    folder: Path
    knows_ranges = True
    marks = True

    def do_GET(self) -> None:
        _send_file(self, self.folder / self.path.partition("?")[0].lstrip("/"), self.knows_ranges, self.marks)


def _send_file(handler: _Handler, path: Path, knows_ranges: bool = True, marks: bool = True) -> None:
    if not path.is_file():
        return handler.answer(404, {}, b"")
    status = path.stat()
    headers = {"Last-Modified": formatdate(status.st_mtime, usegmt=True), "ETag": f'"{status.st_mtime_ns:x}"'}
    headers = headers if marks else {}
    data, code = path.read_bytes(), 200
    if knows_ranges:
        headers["Accept-Ranges"] = "bytes"
        if "Range" in handler.headers:
            first, last = handler.headers["Range"].removeprefix("bytes=").split("-")
            headers["Content-Range"], code = f"bytes {first}-{last}/{len(data)}", 206
            data = data[int(first) : int(last) + 1]
    headers["Content-Length"] = str(len(data))
    return handler.answer(code, headers, data)


class _Hub(_Handler):
    """Answers the requests of the huggingface.co API that are needed to read a data set: its description and its files."""

    folder: Path
    repo: str
    knows_ranges = True

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        api, files = f"/api/datasets/{self.repo}", f"/datasets/{self.repo}/resolve/main/"
        if path.startswith(files):
            return _send_file(self, self.folder / path.removeprefix(files), self.knows_ranges)
        if path == f"{api}/paths-info/main":
            asked = urllib.parse.parse_qs(body.decode())["paths"]
            content: Any = [self.about(self.folder / name) for name in asked if (self.folder / name).is_file()]
        elif path.startswith(f"{api}/tree/main"):
            content = [self.about(file) for file in sorted(self.folder.iterdir())]
        elif path in (api, f"{api}/revision/main"):
            content = {"id": self.repo, "sha": "0" * 40, "private": False, "tags": [], "downloads": 0, "likes": 0}
        else:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"}, b"")
        return self.answer_json(content)

    do_POST = do_GET

    def about(self, path: Path) -> dict[str, Any]:
        digest, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
        lfs = {"oid": digest, "size": size, "pointerSize": 130}
        return {"type": "file", "path": path.name, "size": size, "oid": digest[:40], "lfs": lfs}


class _Bucket(_Handler):
    """Answers the requests of the Google Cloud Storage API that are needed to read a bucket: its list and its objects."""

    folder: Path
    bucket: str

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        objects = f"/storage/v1/b/{self.bucket}/o"
        if path.startswith(f"/download{objects}/"):
            return _send_file(self, self.folder / path.removeprefix(f"/download{objects}/"))
        if path == objects:
            prefix = urllib.parse.parse_qs(self.path.partition("?")[2]).get("prefix", [""])[0]
            content: Any = {"items": [self.about(file) for file in sorted(self.folder.glob(f"{prefix}*"))]}
        elif path.startswith(f"{objects}/") and (self.folder / path.removeprefix(f"{objects}/")).is_file():
            content = self.about(self.folder / path.removeprefix(f"{objects}/"))
        else:
            return self.answer(404, {}, b"")
        return self.answer_json(content)

    def about(self, path: Path) -> dict[str, Any]:
        status = path.stat()
        return {"bucket": self.bucket, "name": path.name, "size": str(status.st_size), "generation": str(status.st_mtime_ns)}


class _Proxy(_Handler):
    upstream: tuple[str, int]
    knows_ranges = True

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        there = http.client.HTTPConnection(*self.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if self.knows_ranges or name != "Range"}
        there.request(self.command, self.path, body, headers)
        reply = there.getresponse()
        self.answer(reply.status, dict(reply.getheaders()), reply.read())
        there.close()

    do_PUT = do_POST = do_DELETE = do_GET


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Print no traceback when a client disconnects."""


@contextmanager
def _serving(handler: type[_Handler], listener: socket.socket | None = None) -> Iterator[int]:
    """Run an HTTP server whose requests `handler` answers; yield its port.

    `listener`: an unbound socket of a simulated node (`Network.socket`), at which the server listens instead of 127.0.0.1.
    """
    server = _Quiet(("127.0.0.1", 0), handler, bind_and_activate=False)
    if listener is not None:
        server.socket.close()
        server.socket, server.server_address = listener, ("0.0.0.0", 0)
    server.server_bind()
    server.server_activate()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def http_files(
    folder: Path,
    faults: Faults | None = None,
    knows_ranges: bool = True,
    marks: bool = True,
    listener: socket.socket | None = None,
) -> Iterator[str]:
    """Serve the files of `folder` over HTTP; yield the address. `listener`: as in `_serving`.

    `knows_ranges`: whether the server supports byte ranges. `marks`: whether it sends ETag and Last-Modified.
    """
    about = {"folder": folder, "faults": faults or Faults(), "knows_ranges": knows_ranges, "marks": marks}
    with _serving(type("Files", (_Files,), about), listener) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def hf_dataset(
    folder: Path, repo: str = "me/pictures", faults: Faults | None = None, knows_ranges: bool = True
) -> Iterator[str]:
    """Serve the files of `folder` as the Hugging Face data set `repo` to clients in this process; yield its hf:// URL."""
    from huggingface_hub import HfFileSystem, constants

    before = constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE  # HF_ENDPOINT, as it was when they were imported
    about = {"folder": folder, "repo": repo, "faults": faults or Faults(), "knows_ranges": knows_ranges}
    with _serving(type("Hub", (_Hub,), about)) as port:
        HfFileSystem.clear_instance_cache()  # an instance keeps the address that it was made with
        constants.ENDPOINT = f"http://127.0.0.1:{port}"
        constants.HUGGINGFACE_CO_URL_TEMPLATE = before[1].replace(before[0], constants.ENDPOINT)
        try:
            yield f"hf://datasets/{repo}"
        finally:
            constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE = before
            HfFileSystem.clear_instance_cache()


@contextmanager
def gcs_bucket(folder: Path, bucket: str = "pictures", faults: Faults | None = None) -> Iterator[str]:
    """Serve the files of `folder` as a Google Cloud Storage bucket to clients in this process; yield its gs:// address."""
    before = dict(os.environ)
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # which asks over gRPC, with TLS, what kind of bucket it is
    from gcsfs import GCSFileSystem

    with _serving(type("Bucket", (_Bucket,), {"folder": folder, "bucket": bucket, "faults": faults or Faults()})) as port:
        GCSFileSystem.clear_instance_cache()
        os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
        try:
            yield f"gs://{bucket}"
        finally:
            os.environ.clear()
            os.environ.update(before)
            GCSFileSystem.clear_instance_cache()


@contextmanager
def s3_bucket(
    files: list[Path],
    bucket: str = "laion",
    faults: Faults | None = None,
    knows_ranges: bool = True,
    listener: socket.socket | None = None,
) -> Iterator[dict[str, str]]:
    """Serve `files` as an S3 bucket; yield the environment variables that clients need. This process gets them, too.

    `knows_ranges`, `listener`: as in `http_files`.
    """
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    environment = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    before = dict(os.environ)
    S3FileSystem.clear_instance_cache()  # an instance keeps the address that it was made with
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(environment)
    try:
        # Its buckets are the process's, not the server's: another test's objects would be listed among these.
        with urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b""):
            pass
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=bucket)
        for path in files:
            client.upload_file(str(path), bucket, path.name)
        about = {"upstream": (host, port), "faults": faults or Faults(), "knows_ranges": knows_ranges}
        with _serving(type("Proxy", (_Proxy,), about), listener) as proxy:
            environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy}"
            os.environ.update(environment)
            yield environment
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()
