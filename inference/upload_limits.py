"""Bounds what requests to the page can take: memory as they arrive, disk for uploaded pictures."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

MOST_AT_ONCE = 4  # requests with content that are received; further ones wait
MOST_SECONDS = 300  # for one to arrive, also through a slow tunnel
MOST_OTHER = 2**20  # bytes of a request that uploads nothing
MOST_KEPT = 2**29  # bytes of the pictures uploaded in the time for which they are kept


class UploadLimits:
    """ASGI middleware that refuses requests which are too large or too many, and delays others.

    Gradio itself limits the size of each file, but not the number of files, nor other content.
    """

    def __init__(
        self, app: Callable[..., Awaitable[None]], folder: str, most_bytes: int, kept_for: float
    ) -> None:
        """`folder` holds uploads for up to `kept_for` seconds; `most_bytes`: of one picture."""
        self._app, self._folder, self._kept_for = app, Path(folder), kept_for
        self._most_upload = most_bytes + 2**16  # what surrounds the picture
        self._places = asyncio.Semaphore(MOST_AT_ONCE)
        self._uploads: deque[tuple[float, int]] = deque()  # when, bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        async with self._places:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._handle(scope, receive, send), MOST_SECONDS)

    async def _handle(self, scope: dict, receive: Callable, send: Callable) -> None:
        refusal = self._refusal(scope["path"], dict(scope["headers"]))
        if not refusal:
            await self._app(scope, receive, send)
            return
        from starlette.responses import PlainTextResponse

        left = 2 * self._most_upload  # most clients read an answer only when all is sent
        while left > 0 and (message := await receive()).get("more_body"):
            left -= len(message["body"])
        status, text = refusal
        await PlainTextResponse(f"{text}\n", status)(scope, receive, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Why a request is refused, as status and text; None for one that is not, which counts."""
        size = headers.get(b"content-length", b"")
        if not size.isdigit() or b"transfer-encoding" in headers:
            return 411, "The request does not say how long it is."
        upload = path.endswith("/upload")
        most = self._most_upload if upload else MOST_OTHER
        if int(size) > most:
            return 413, f"The request has more than {most:,} bytes."
        if upload and not self._has_room(int(size)):
            return 503, "There are too many pictures; try again in twenty minutes."
        return None

    def _has_room(self, size: int) -> bool:
        now = time.monotonic()
        while self._uploads and self._uploads[0][0] < now - self._kept_for:
            self._uploads.popleft()
        if size + sum(size for _, size in self._uploads) > MOST_KEPT:
            return False
        self._uploads.append((now, size))
        self._remove_leftovers()
        return True

    def _remove_leftovers(self) -> None:
        """Delete what gradio has forgotten: files of uploads that were interrupted, or unusual."""
        for file in self._folder.glob("tmp*"):
            with suppress(OSError):
                if file.is_file() and file.stat().st_mtime < time.time() - self._kept_for:
                    file.unlink()
