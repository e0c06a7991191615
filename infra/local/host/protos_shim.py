"""Stand-ins for the worker's control messages, handed to the library in place of protobuf.

The library never imports them: it is given a module with these names and only ever
constructs them with keywords and reads the fields back.
"""

from types import SimpleNamespace


class BindingInfo(SimpleNamespace):
    """One binding; the library compares `direction` with these numbers."""

    inout, out, undefined = 2, 1, 0


class StatusResult(SimpleNamespace):
    """How a control request ended."""

    Failure, Success, Cancelled = 0, 1, 2


class RpcException(SimpleNamespace):
    """Why indexing failed: `message` and `stack_trace`."""


class RpcFunctionMetadata(SimpleNamespace):
    """One indexed function."""


class RpcRetryOptions(SimpleNamespace):
    """A function's retry policy."""


class WorkerMetadata(SimpleNamespace):
    """The library's own version."""


class WorkerInitResponse(SimpleNamespace):
    """The answer to the first request."""


class FunctionMetadataResponse(SimpleNamespace):
    """The list of functions."""


class FunctionLoadResponse(SimpleNamespace):
    """The answer to a request that does nothing in this library."""
