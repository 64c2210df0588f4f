"""Who may ask a server on this machine: its own page, and no other web site in the same browser."""

from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

HERE = ("127.0.0.1", "localhost")


class OwnPages:
    """ASGI: refuses what was asked by another site's page, or under another site's name.

    A browser lets any page send files and forms to this machine (cross-site request forgery), and
    lets one whose name has come to stand for this machine read the answers, too (DNS rebinding).
    The first gives itself away by its Origin, the second by its Host.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """One request."""
        if scope["type"] == "lifespan" or from_here(dict(scope["headers"])):
            await self._app(scope, receive, send)
            return
        from starlette.responses import PlainTextResponse

        refusal = PlainTextResponse("Only this machine's own page may ask.\n", 403)
        await refusal(scope, receive, send)


def from_here(headers: dict[bytes, bytes]) -> bool:
    """Whether Host is this machine by a name of its own and Origin, where there is one, is it."""
    host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
    try:
        known = urlsplit(f"//{host}").hostname in HERE
    except ValueError:  # as "[" is no address
        return False
    return known and origin in ("", f"http://{host}")
