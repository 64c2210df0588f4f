"""Floods of requests to the page: memory and disk stay bounded, and the page goes on working."""

import asyncio
import http.client
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import app
from inference import upload_limits
from inference.upload_limits import MOST_AT_ONCE, UploadLimits
from runs import ROOT, free_port, start

EDGE = b"x" * 20
MULTIPART = f"multipart/form-data; boundary={EDGE.decode()}"
UPLOAD = "/gradio_api/upload"


def form(content, name="files", filename="a.jpg"):
    """A form with one field, as a browser sends it."""
    file = f'; filename="{filename}"' if filename else ""
    head = f'Content-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return b"--%s\r\n%s%s\r\n--%s--\r\n" % (EDGE, head.encode(), content, EDGE)


class Page:
    """The running program, and what it takes."""

    def __init__(self, process, port, folder):
        self.process, self.port, self.folder = process, port, folder

    def post(self, path, content, kind=MULTIPART, sent=1.0):
        """The status of the answer; None if only a part is `sent` before the connection closes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", kind)
        connection.putheader("Content-Length", str(len(content)))
        connection.endheaders()
        connection.send(content[: int(sent * len(content))])
        status = connection.getresponse().status if sent == 1 else None
        connection.close()
        return status

    def megabytes(self):
        """The most memory so far."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@pytest.fixture(scope="module")
def page(pretrained, tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("temporary"), free_port()
    options = ["--checkpoints", pretrained["vit"].parent, "--detector", "none", "--port", port]
    process = start([sys.executable, ROOT / "app.py", *map(str, options)], TMPDIR=str(folder))
    assert "http" in process.stdout.readline()
    # Otherwise the program would wait for someone to read what it prints.
    threading.Thread(target=process.stdout.read, daemon=True).start()
    yield Page(process, port, folder)
    process.terminate()
    process.wait()
    assert not [path for path in folder.rglob("*") if path.is_file()], "pictures are left"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
def test_memory_stays_bounded(page):
    picture = form(b"x" * 1000)
    assert page.post(UPLOAD, picture) == 200
    before = page.megabytes()
    assert page.post(UPLOAD, form(bytes(40 * 2**20), filename=None)) == 413
    assert page.post(UPLOAD, form(bytes(15 * 2**20)) + form(bytes(15 * 2**20))) == 413
    question = json.dumps({"data": ["x" * 2**25]}).encode()
    assert page.post("/gradio_api/call/judge", question, "application/json") == 413
    large = form(bytes(15 * 2**20))
    with ThreadPoolExecutor(12) as pool:
        for k in range(24):  # every other one is interrupted
            pool.submit(page.post, UPLOAD, large, MULTIPART, 1 if k % 2 else 0.5)
    assert page.megabytes() - before < 60
    assert page.post(UPLOAD, picture) == 200  # the page still works


def test_more_questions_than_can_wait_are_refused(page):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=60)
    connection.request("GET", "/config")
    functions = json.load(connection.getresponse())["dependencies"]
    draw = next(one["id"] for one in functions if one["api_name"] == "draw")
    (face,) = page.folder.glob("mae-sfer-*/face-1.png")

    def ask(seed):
        data = [{"path": str(face)}, False, "checkpoint-last.pth", 0.5, seed]
        question = json.dumps({"data": data, "fn_index": draw, "session_hash": "s"}).encode()
        return page.post("/gradio_api/queue/join", question, "application/json")

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(ask, range(4 * app.MOST_VISITORS))) == {200, 503}


# The limits themselves, with an app that only receives.


class Receiver:
    """An ASGI app; counts what it receives, at how many places at once."""

    def __init__(self):
        self.bytes, self.now, self.most = 0, 0, 0

    async def __call__(self, scope, receive, send):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0.01)
            while (message := await receive())["more_body"]:
                self.bytes += len(message["body"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
        finally:
            self.now -= 1


async def request(limits, size, path="/upload", headers=None, stall=0.0):
    """The status of the answer to a request of `size` bytes; None without an answer."""
    given = [(b"content-length", str(size).encode())] if headers is None else headers
    parts, answers = [1000] * (size // 1000), []

    async def receive():
        await asyncio.sleep(stall)
        body = bytes(parts.pop()) if parts else b""
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    async def send(message):
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": given}
    await limits(scope, receive, send)
    return answers[0]["status"] if answers else None


def limits_of(receiver, tmp_path, kept_for=60.0):
    return UploadLimits(receiver, str(tmp_path), most_bytes=10**6, kept_for=kept_for)


def test_few_requests_are_received_at_once_and_the_others_wait(tmp_path):
    async def flood():
        limits = limits_of(receiver, tmp_path)
        return await asyncio.gather(*(request(limits, 3000) for _ in range(20)))

    receiver = Receiver()
    assert asyncio.run(flood()) == [200] * 20
    assert receiver.most == MOST_AT_ONCE


def test_requests_of_unknown_or_excessive_length_are_refused(tmp_path):
    receiver = Receiver()
    limits = limits_of(receiver, tmp_path)
    both = [(b"content-length", b"5"), (b"transfer-encoding", b"chunked")]
    for headers in ([], both, [(b"content-length", b"-1")]):
        assert asyncio.run(request(limits, 0, headers=headers)) == 411
    assert asyncio.run(request(limits, 2 * 10**6)) == 413
    assert asyncio.run(request(limits, 2 * 10**6, "/queue/join")) == 413
    assert receiver.bytes == 0


def test_pictures_beyond_the_limit_are_refused_until_older_ones_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(upload_limits, "MOST_KEPT", 5000)

    async def flood():
        limits = limits_of(Receiver(), tmp_path, kept_for=0.3)
        first = [await request(limits, 2000) for _ in range(4)]
        assert await request(limits, 2000, "/queue/join") == 200
        await asyncio.sleep(0.4)
        return [*first, await request(limits, 2000)]

    assert asyncio.run(flood()) == [200, 200, 503, 503, 200]


def test_a_sender_that_stalls_gives_up_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(upload_limits, "MOST_SECONDS", 0.2)

    async def flood():
        limits = limits_of(Receiver(), tmp_path)
        stalled = (request(limits, 2000, stall=60) for _ in range(MOST_AT_ONCE))
        return await asyncio.gather(*stalled, request(limits, 2000))

    assert asyncio.run(flood()) == [None] * MOST_AT_ONCE + [200]


def test_files_of_interrupted_uploads_are_deleted_after_some_time(tmp_path):
    old, new, kept = (tmp_path / name for name in ("tmpold", "tmpnew", "face-1.png"))
    for path in (old, new, kept):
        path.write_bytes(b"x")
    for path in (old, kept):
        os.utime(path, (time.time() - 90, time.time() - 90))
    assert asyncio.run(request(limits_of(Receiver(), tmp_path), 1000)) == 200
    assert not old.exists()
    assert new.exists()
    assert kept.exists()
