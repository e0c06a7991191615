"""What a browser on another origin needs to hear."""

from aiohttp import hdrs, web

_METHODS = "GET, POST, DELETE, OPTIONS"


def headers(request: web.Request) -> dict[str, str]:
    """Word the answer's CORS headers.

    The official client sends credentials by default, and a browser then refuses a wildcard: the
    origin is echoed.
    """
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None:
        return {hdrs.VARY: hdrs.ORIGIN}
    return {
        hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin,
        hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS: "true",
        hdrs.VARY: hdrs.ORIGIN,
    }


def preflight(request: web.Request) -> web.Response:
    """Allow what the browser asks for."""
    allowed = headers(request)
    allowed[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = _METHODS
    allowed[hdrs.ACCESS_CONTROL_MAX_AGE] = "600"
    asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS)
    if asked:
        allowed[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = asked
    return web.Response(status=204, headers=allowed)
