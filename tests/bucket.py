"""A bucket on loopback: `gcp-storage-emulator`, with what Google documents and it leaves out.

It knows no conditions on generations, tells none with an object, returns each listing whole and takes no
empty object; all that is added here, around what it does. It answers one request at a time, so what is looked
at first still holds when it writes.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.storage import Storage

NAME = "bucket"
_PAGE = 1000  # objects in an answer, as Google's
_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)")
_LIST = re.compile(r"/(?:upload/)?storage/v1/b/([^/]+)/o")


class Handler(emulator.RequestHandler):
    """The emulator's, behind conditions and pages."""

    requests: list[str]
    generation = ""  # of the object that is read

    def __init__(self, storage: Storage, requests: list[str], *rest: Any) -> None:
        self.requests = requests
        super().__init__(storage, *rest)

    def handle_one_request(self) -> None:
        """As the base, but a client that has gone away is no error."""
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def do_GET(self) -> None:
        path, words = self._asked()
        listed = _LIST.fullmatch(path)
        if listed:
            self._list(listed[1], words)
        elif self._holds():
            one = _OBJECT.fullmatch(path)
            self.generation = self._generation(one[1], unquote(one[2])) if one else ""
            super().do_GET()

    def end_headers(self) -> None:
        """As the base, with the generation."""
        if self.generation:
            self.send_header("x-goog-generation", self.generation)
        super().end_headers()

    def do_POST(self) -> None:
        if self._holds():
            super().do_POST()

    def do_PUT(self) -> None:
        if self._holds():
            super().do_PUT()

    def do_DELETE(self) -> None:
        if self._holds():
            super().do_DELETE()

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        words = parse_qs(parts.query, keep_blank_values=True)
        return parts.path, {name: values[0] for name, values in words.items()}

    def _holds(self) -> bool:
        """Whether the conditions of a request hold; else it is answered."""
        path, words = self._asked()
        self.requests.append(f"{self.command} {self.path}")
        match, differ = words.get("ifGenerationMatch"), words.get("ifGenerationNotMatch")
        if match is None and differ is None:
            return True
        one = _OBJECT.fullmatch(path)
        if one:
            bucket, name = one[1], unquote(one[2])
        else:
            listed = _LIST.fullmatch(path)
            assert listed is not None, path
            assert "name" in words, f"a condition on an object whose name is in the body: {self.path}"
            bucket, name = listed[1], words["name"]
        there = self._generation(bucket, name)
        if match not in (None, there):
            self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            return False
        if differ == there:
            self._answer(304, None)
            return False
        return True

    def _generation(self, bucket: str, name: str) -> str:
        try:
            return str(self.storage.get_file_obj(bucket, name)["generation"])
        except NotFound:
            return "0"

    def _list(self, bucket: str, words: dict[str, str]) -> None:
        self.requests.append(f"{self.command} {self.path}")
        shown = words.get("prefix"), words.get("delimiter"), words.get("matchGlob")
        try:
            files, prefixes = self.storage.get_file_list(bucket, *shown)
        except NotFound:
            return self._answer(404, {"error": {"code": 404, "message": "no such bucket"}})
        first = int(words.get("pageToken") or 0)
        end = first + min(_PAGE, int(words.get("maxResults") or _PAGE))
        told = {"kind": "storage#objects", "prefixes": prefixes, "items": files[first:end]}
        return self._answer(200, told | ({"nextPageToken": str(end)} if end < len(files) else {}))

    def _answer(self, code: int, told: Any) -> None:
        # What the client sends is read first: closing before it is would break its writing.
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b"" if told is None else json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _read_data(handler: Any, query: Any, read: Any = emulator._read_data) -> Any:
    """What a request carries: of an empty object no bytes, not nothing."""
    found = read(handler, query)
    return b"" if found is None and query.get("uploadType") == ["media"] else found


class Server(HTTPServer):
    """Many may ask at once; they wait in line."""

    request_queue_size = 256


@contextmanager
def serve() -> Iterator[list[str]]:
    """Serve a bucket while the block runs, and set the environment for it; what was requested, as a list."""
    emulator._read_data = _read_data
    storage, requests = Storage(use_memory_fs=True), list[str]()
    storage._write_config_to_file = lambda: None  # all it knows, at each write: slow with a thousand objects
    create_bucket(NAME, storage)
    server = Server(("127.0.0.1", 0), partial(Handler, storage, requests))
    place = f"http://127.0.0.1:{server.server_port}"
    os.environ |= {
        "STORAGE_EMULATOR_HOST": place,
        "TENSORSTORE_GCS_HTTP_URL": place,
        "FSSPEC_GS_TOKEN": "anon",
        "FSSPEC_GCS_TOKEN": "anon",
        "GCE_METADATA_ROOT": "127.0.0.1:1",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks Google of what kind the bucket is
    }
    thread = threading.Thread(target=server.serve_forever, name="bucket", daemon=True)
    thread.start()
    try:
        yield requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
