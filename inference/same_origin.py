"""Lets only a local server's own page send it requests, not other web sites in the same browser."""

from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

HERE = ("127.0.0.1", "localhost")


class SameOriginOnly:
    """ASGI middleware that refuses requests by other sites' pages, or under other sites' names.

    A browser lets any page send files and forms to this machine (cross-site request forgery), and
    a page whose host name is pointed at this machine also read the answers (DNS rebinding). The
    Origin header gives away the first, the Host header the second.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] == "lifespan" or from_here(dict(scope["headers"])):
            await self._app(scope, receive, send)
            return
        from starlette.responses import PlainTextResponse

        refusal = PlainTextResponse("Only this machine's own page may send requests.\n", 403)
        await refusal(scope, receive, send)


def from_here(headers: dict[bytes, bytes]) -> bool:
    """Whether Host is one of this machine's own names, and Origin, if present, the same site."""
    host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
    try:
        known = urlsplit(f"//{host}").hostname in HERE
    except ValueError:  # a malformed host, such as "["
        return False
    return known and origin in ("", f"http://{host}")
