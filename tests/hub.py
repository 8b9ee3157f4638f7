"""A Hugging Face Hub of our own, on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = hashlib.sha1(b"revision").hexdigest()
BLOCK = 1 << 14


@dataclass
class Hub:
    """Models by name, as their files by name."""

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    url: str = ""
    asked: list[str] = field(default_factory=list)
    """Files that were sent."""
    pause: float = 0.0
    """Seconds between two blocks."""
    gated: dict[str, int] = field(default_factory=dict)
    """Models that are refused, with this status: 401 without a token, 403 with that of a user who has no access."""
    cut: int | None = None
    """Bytes of a file after which the connection breaks."""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            if self.path == "/":
                self._head(200, {})
                return
            if any(self.path.startswith(f"/api/models/{model}/tree/main/") for model in hub.models):
                self._head(404, {"X-Error-Code": "EntryNotFound"})  # no folders are listed
                return
            model, _, rest = self.path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            if model in hub.gated:
                self._head(hub.gated[model], {"X-Error-Code": "GatedRepo"})
            elif model not in hub.models or revision not in ("main", COMMIT):
                self._head(404, {"X-Error-Code": "RepoNotFound"})
            elif file not in hub.models[model]:
                self._head(404, {"X-Error-Code": "EntryNotFound"})
            else:
                self._send(hub.models[model][file], body)

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def _send(self, data: bytes, body: bool) -> None:
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            self._head(200, {"Content-Length": str(len(data)), "ETag": tag, "X-Repo-Commit": COMMIT})
            if not body:
                return
            hub.asked.append(self.path.rsplit("/", 1)[1])
            with contextlib.suppress(OSError):  # the other side has gone
                for at in range(0, len(data) if hub.cut is None else min(hub.cut, len(data)), BLOCK):
                    self.wfile.write(data[at : at + BLOCK])
                    time.sleep(hub.pause)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serve(hub: Hub, port: int = 0) -> Iterator[Hub]:
    """While open, it answers at `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def ask(url: str, cache: str, patch: pytest.MonkeyPatch) -> None:
    """huggingface_hub asks the Hub at this address, and has another cache."""
    from huggingface_hub import constants, file_download

    told = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": cache,
        "HUGGINGFACE_HUB_CACHE": cache,
    }
    for module in (constants, file_download):
        for name, value in told.items():
            if hasattr(module, name):
                patch.setattr(module, name, value)
