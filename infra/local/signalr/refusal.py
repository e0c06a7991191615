"""What the service says when it will not do a thing."""

from aiohttp import web


class RefusalError(Exception):
    """A request is answered with this status, this sentence and, where Azure sends one, this code."""

    def __init__(self, status: int, sentence: str, *, code: str | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.code = code

    def response(self) -> web.Response:
        """Put the refusal on the wire."""
        body = {"code": self.code or str(self.status), "message": self.sentence}
        response = web.json_response(body, status=self.status)
        if self.code:
            response.headers["x-ms-error-code"] = self.code
        if self.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response
