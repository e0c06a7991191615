"""The hub protocol: records as bytes, in JSON and in MessagePack, and as WebSocket frames."""

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NoReturn

import msgpack

SEPARATOR = b"\x1e"
_DEEPEST = 64
_TEXT, _BINARY = 0x81, 0x82


class ProtocolError(Exception):
    """Bytes that are not what the hub protocol says; the sentence goes to the client."""


class HubProtocol(StrEnum):
    """How a client wants its records encoded."""

    JSON = "json"
    MESSAGEPACK = "messagepack"


class Kind(IntEnum):
    """The record types of the hub protocol."""

    INVOCATION = 1
    STREAM_ITEM = 2
    COMPLETION = 3
    STREAM_INVOCATION = 4
    CANCEL_INVOCATION = 5
    PING = 6
    CLOSE = 7


class Record:
    """One message for clients, encoded at most once per protocol however many hear it."""

    __slots__ = ("_array", "_encoded", "_fields", "_framed")

    def __init__(self, fields: dict[str, object], array: list[object] | None = None) -> None:
        # No array: a handshake answer, which is JSON in every protocol.
        self._fields = fields
        self._array = array
        self._encoded: dict[HubProtocol, bytes] = {}
        self._framed: dict[HubProtocol, bytes] = {}

    def encoded(self, protocol: HubProtocol) -> bytes:
        """Give the record itself, complete with separator or length."""
        found = self._encoded.get(protocol)
        if found is None:
            if protocol is HubProtocol.MESSAGEPACK and self._array is not None:
                packed: bytes = msgpack.packb(self._array, default=_as_float)
                found = _varint(len(packed)) + packed
            else:
                found = _json(self._fields) + SEPARATOR
            self._encoded[protocol] = found
        return found

    def framed(self, protocol: HubProtocol) -> bytes:
        """Give the record as one finished, unmasked WebSocket frame."""
        found = self._framed.get(protocol)
        if found is None:
            first = _BINARY if protocol is HubProtocol.MESSAGEPACK else _TEXT
            found = self._framed[protocol] = _frame(first, self.encoded(protocol))
        return found


PING = Record({"type": Kind.PING}, [Kind.PING])
ACCEPTED = Record({})


def invocation(target: str, arguments: Sequence[object]) -> Record:
    """Word a message to clients; it never asks for an answer.

    Raises:
        ValueError: when the arguments cannot be written as JSON.
    """
    record = Record(
        {"type": Kind.INVOCATION, "target": target, "arguments": list(arguments)},
        [Kind.INVOCATION, {}, None, target, list(arguments), []],
    )
    # Encoded here so that what cannot be sent is refused at the door, not while sending.
    record.encoded(HubProtocol.JSON)
    return record


def close(error: str | None = None, *, allow_reconnect: bool = False) -> Record:
    """Word the record that ends a connection."""
    fields: dict[str, object] = {"type": Kind.CLOSE}
    if error is not None:
        fields["error"] = error
    if allow_reconnect:
        fields["allowReconnect"] = True
    return Record(fields, [Kind.CLOSE, error, allow_reconnect])


def refused(error: str) -> Record:
    """Word the handshake answer that turns a client away."""
    return Record({"error": error})


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """A client's first record, and the bytes that came behind it."""

    protocol: HubProtocol
    rest: bytes


def read_handshake(data: bytes) -> Handshake:
    """Read which protocol a client speaks.

    Raises:
        ProtocolError: when it is no handshake, or asks for what nobody speaks.
    """
    record, separator, rest = data.partition(SEPARATOR)
    if not separator:
        raise ProtocolError("the handshake does not end with the record separator 0x1E")
    asked = _object(record, "the handshake")
    name, version = asked.get("protocol"), asked.get("version")
    if name not in set(HubProtocol):
        raise ProtocolError(f"The protocol {name!r} is not supported: use 'json' or 'messagepack'.")
    if version != 1:
        raise ProtocolError(f"Version {version!r} of {name} is not supported: use version 1.")
    return Handshake(protocol=HubProtocol(str(name)), rest=rest)


def read_kinds(protocol: HubProtocol, data: bytes) -> Iterator[int]:
    """Read the type of each record in a client's bytes; serverless needs no more of them.

    Raises:
        ProtocolError: when the bytes are not whole records.
    """
    if protocol is HubProtocol.JSON:
        yield from _json_kinds(data)
    else:
        yield from _messagepack_kinds(data)


def strict_json(data: bytes) -> object:
    """Read JSON that every client can read back.

    Raises:
        ValueError: for anything else, NaN and very deep nesting included.
    """
    if data.count(b"[") + data.count(b"{") > _DEEPEST and _depth(data) > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    value: object = json.loads(data, parse_constant=_no_constant)
    return value


def _json_kinds(data: bytes) -> Iterator[int]:
    if not data:
        return
    *records, tail = data.split(SEPARATOR)
    if tail:
        raise ProtocolError("a record does not end with the record separator 0x1E")
    for record in records:
        kind = _object(record, "a record").get("type")
        if not isinstance(kind, int):
            raise ProtocolError("a record has no number as its type")
        yield kind


def _messagepack_kinds(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        length, at = _read_varint(data, at)
        packed, at = data[at : at + length], at + length
        if len(packed) < length:
            raise ProtocolError("a MessagePack record is shorter than its length says")
        try:
            fields = msgpack.unpackb(packed, strict_map_key=False)
        except (ValueError, msgpack.UnpackException) as e:
            raise ProtocolError(f"a record is not MessagePack: {e}") from e
        if not isinstance(fields, list) or not fields or not isinstance(fields[0], int):
            raise ProtocolError("a MessagePack record is no array that starts with its type")
        yield fields[0]


def _object(record: bytes, what: str) -> dict[str, object]:
    try:
        value = strict_json(record)
    except ValueError as e:
        raise ProtocolError(f"{what} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is no JSON object")
    return value


def _json(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON: use null")


def _depth(data: bytes) -> int:
    depth = deepest = 0
    in_string = escaped = False
    for byte in data:
        if in_string:
            in_string = escaped or byte != 0x22
            escaped = byte == 0x5C and not escaped
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _as_float(value: object) -> float:
    # MessagePack has no integer above 64 bits; JSON clients read such a number as a double too.
    if not isinstance(value, int):
        raise TypeError(f"{type(value).__name__} has no place in a SignalR message")
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _frame(first: int, payload: bytes) -> bytes:
    length = len(payload)
    if length < 126:
        return struct.pack("!BB", first, length) + payload
    if length < 1 << 16:
        return struct.pack("!BBH", first, 126, length) + payload
    return struct.pack("!BBQ", first, 127, length) + payload


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = 0
    for position, byte in enumerate(data[at : at + 5]):
        number |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            return number, at + position + 1
    raise ProtocolError("a MessagePack record does not start with its length")
