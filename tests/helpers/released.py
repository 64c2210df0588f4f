"""A local server in place of Google Drive, so that no test needs a network."""

import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from util import download


def weights(value=1.0, megabytes=2):
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.full((megabytes << 18,), value)}}, buffer)
    return buffer.getvalue()


CONTENT = weights()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.log.append((self.path, self.headers.get("Range")))
        try:
            self.server.answer(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # gdown asks once for the length alone

    def log_message(self, *_):
        """Log nothing."""

    def send(self, data, code=200, length=None, **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


def whole(request):
    request.send(CONTENT)


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.log, server.answer = [], whole
        server.url = f"http://127.0.0.1:{server.server_port}/{{id}}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def only_here(monkeypatch, tmp_path):
    """Look up no other host than this machine, and give the test its own cache."""
    look_up = socket.getaddrinfo

    def local(host, *more, **options):
        assert host in ("127.0.0.1", "localhost"), f"a test asks for {host}"
        return look_up(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("MAE_SFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "RETRIES", 0)
    monkeypatch.setattr(download, "DRIVE", "http://127.0.0.1:9/{id}")


@pytest.fixture
def address(server, monkeypatch):
    """The server in place of Google Drive."""
    monkeypatch.setattr(download, "DRIVE", server.url)
