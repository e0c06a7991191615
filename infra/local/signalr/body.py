"""Reading what was posted, with Azure's limit on it."""

from aiohttp import web

from infra.local.signalr.refusal import RefusalError

LARGEST = 1024 * 1024


async def read_body(request: web.Request) -> bytes:
    """Read the body, whatever limit the app around has.

    Raises:
        RefusalError: 413, above 1 MB.
    """
    too_large = RefusalError(413, f"the body is larger than {LARGEST} bytes: send less at once")
    if (request.content_length or 0) > LARGEST:
        raise too_large
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > LARGEST:
            raise too_large
    return bytes(body)
