"""
Brings existing subscribers in from a CSV file: who, their addresses, what they want to hear.

Into container rules, partition subscriber: one subscription, and one endpoint for each channel with its address
sealed. Ids are facts, so importing again changes nothing. A row with any fault is refused whole and told with its
line, field and reason; an address is never shown, in no report and no error.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from alerts.adapters.rule_documents import CONTAINER, bump, endpoint_body, subscription_body
from alerts.logic.addresses import email_of, masked, webhook_of
from alerts.models import Severity
from alerts.subscriptions import ADDRESSED, Endpoint, Subscription, endpoint_id, subscription_id
from infra.db.place import Place, Progress, setting, steadily
from shared.clock import Clock
from shared.documents import Document, Documents, Operation, sort_key
from shared.errors import (
    ConfigurationError,
    ConflictError,
    InvalidPayloadError,
    NotFoundError,
    StaleError,
)
from shared.market.models import symbol_of
from shared.migrations import MIGRATIONS, Migrated, Migrations
from shared.sealing import SETTING, Sealer
from shared.wiring import VERSION

EMAIL, DISCORD = ADDRESSED
REQUIRED = ("subscriber", "email", "discord_webhook", "symbols")
OPTIONAL = ("entries", "min_strength", "severity")
TRIES = 5

_SUBSCRIBER = re.compile(r"[^\s|/\\?#\x00-\x1f\x7f]{1,100}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a row was not taken; without anything that the row says."""

    line: int
    field: str
    reason: str


class RefusedRowError(InvalidPayloadError):
    """A row cannot be taken; ``faults`` are fields with reasons."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {reason}" for field, reason in faults))
        self.faults = faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a row asks for."""

    subscriber: str
    addresses: Mapping[str, str]
    symbols: Sequence[str] | None
    entries: Sequence[str] | None
    min_strength: float
    severity: Severity


async def import_subscribers(
    file: Path,
    place: Place,
    wall: Clock,
    *,
    sealer: Sealer | None = None,
    overwrite: bool = False,
    migrations: Migrations = MIGRATIONS,
) -> bool:
    """
    Store every valid row, print what became of them, and list the refused in *file*.refused.csv; whether none was.

    Addresses are sealed with the keys of *sealer*, by default those of ENDPOINT_KEYS.
    A subscriber who is stored with something else stays as stored and is refused, unless *overwrite*.

    Raises:
        ConfigurationError: the file has another header, or there is no key to seal addresses with.

    """
    sealer = sealer or Sealer(setting(SETTING))
    sealer.seal("")  # without a key nothing is begun
    store = place.open(wall)
    documents = Migrated(store, wall, app=VERSION, migrations=migrations)
    rules = _Rules(documents, wall, sealer, overwrite=overwrite)
    try:
        try:
            with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
                refused = await _import(text, rules)
        finally:
            if rules.changed:  # whoever runs reads them again, also what was taken before the trouble
                await bump(documents, wall, list(rules.changed))
        _report(refused, file.with_name(f"{file.name}.refused.csv"))
    except OSError as e:
        raise ConfigurationError(f"{e.filename or file}: {e.strerror}") from e
    finally:
        await store.close()
    return not refused


async def _import(text: TextIO, rules: "_Rules") -> list[Refusal]:
    refused: list[Refusal] = []
    progress = Progress()
    count = {"created": 0, "replaced": 0, "unchanged": 0}
    for line, row in _rows(text):
        try:
            count[await rules.keep(wanted_of(row))] += 1
        except RefusedRowError as e:
            for field, reason in e.faults:
                refused.append(Refusal(line=line, field=field, reason=reason))
                progress.done()
                print(f"line {line}: {field}: {reason}")
        progress(f"{sum(count.values()):,} subscribers imported")
    progress.done()
    rows = len({refusal.line for refusal in refused})
    print(", ".join(f"{n:,} {what}" for what, n in count.items()) + f", {rows:,} refused")
    return refused


def _rows(text: TextIO) -> Iterator[tuple[int, Mapping[str, str] | str]]:
    """Every row with the line it begins at; instead of a row that has another shape, what is wrong with it."""
    reader = csv.reader(text, strict=True)
    names = [name.strip().lower() for name in next(reader, [])]
    missing = [name for name in REQUIRED if name not in names]
    strangers = [name for name in names if name not in (*REQUIRED, *OPTIONAL)]
    if missing or strangers or len(set(names)) != len(names):
        raise ConfigurationError(
            f"the first line must name the columns {','.join(REQUIRED)} and may name {','.join(OPTIONAL)}, each once"
        )
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error:
            yield line, "cannot be read as CSV: look for a quote that is not closed"
            continue
        if values is None:
            return
        if not values:
            continue  # an empty line
        if len(values) != len(names):
            yield line, f"has {len(values)} fields, the header has {len(names)}"
            continue
        yield line, dict(zip(names, (value.strip() for value in values), strict=True))


def wanted_of(row: Mapping[str, str] | str) -> Wanted:
    """
    Check a row.

    Raises:
        RefusedRowError: names every field that is wrong, and no value of it.

    """
    if isinstance(row, str):
        raise RefusedRowError([("row", row)])
    faults: list[tuple[str, str]] = []

    def checked[T](field: str, check: Callable[[str], T], default: T) -> T:
        try:
            return check(row.get(field, ""))
        except InvalidPayloadError as e:
            faults.append((field, str(e)))
            return default

    wanted = Wanted(
        subscriber=checked("subscriber", _subscriber, ""),
        addresses={
            channel: address
            for channel, address in (
                (EMAIL, checked("email", _email, "")),
                (DISCORD, checked("discord_webhook", _webhook, "")),
            )
            if address
        },
        symbols=checked("symbols", _symbols, None),
        entries=checked("entries", _entries, None),
        min_strength=checked("min_strength", _strength, 0.0),
        severity=checked("severity", _severity, Severity.INFO),
    )
    if not row["email"] and not row["discord_webhook"]:
        faults.append(("email", "is empty, and so is discord_webhook: give at least one address"))
    if faults:
        raise RefusedRowError(faults)
    return wanted


class _Rules:
    """What is stored about subscribers, as far as an import touches it."""

    def __init__(self, documents: Documents, wall: Clock, sealer: Sealer, *, overwrite: bool) -> None:
        self._documents = documents
        self._wall = wall
        self._sealer = sealer
        self._overwrite = overwrite
        self.changed: dict[str, None] = {}

    async def keep(self, wanted: Wanted) -> str:
        """
        Store what a row asks for, all or nothing; says what had to be done.

        Raises:
            RefusedRowError: something else is stored, and stays.

        """
        for _ in range(TRIES):
            operations = await self._operations(wanted)
            if not operations:
                return "unchanged"
            is_new = all(operation.kind == "create" for operation in operations)
            if not is_new and not self._overwrite:
                raise RefusedRowError([("subscriber", "is stored with something else, which stays: see --overwrite")])
            self.changed[wanted.subscriber] = None  # also where the answer is lost
            try:
                await steadily(partial(self._documents.batch, CONTAINER, operations))
            except (ConflictError, StaleError, NotFoundError):
                continue  # somebody else wrote meanwhile, or our own write did happen: look again
            return "created" if is_new else "replaced"
        raise RefusedRowError([("subscriber", "is being changed by somebody else: import again")])

    async def _operations(self, wanted: Wanted) -> list[Operation]:
        """What is between the stored and the wanted."""
        subscriber = wanted.subscriber
        operations = [await self._subscription(wanted)]
        for channel in ADDRESSED:
            stored = await self._stored(subscriber, endpoint_id(subscriber, channel))
            operations.append(self._endpoint(subscriber, channel, wanted.addresses.get(channel), stored))
        return [operation for operation in operations if operation]

    async def _subscription(self, wanted: Wanted) -> Operation | None:
        id_ = subscription_id(wanted.subscriber)
        asked = Subscription(
            subscription_id=id_,
            subscriber=wanted.subscriber,
            channels=tuple(wanted.addresses),
            symbols=None if wanted.symbols is None else frozenset(wanted.symbols),
            entries=None if wanted.entries is None else frozenset(wanted.entries),
            min_strength=wanted.min_strength,
            severity=wanted.severity,
        )
        body = subscription_body(asked)
        stored = await self._stored(wanted.subscriber, id_)
        if stored is None:
            return Operation(kind="create", document=self._new(wanted.subscriber, id_, body))
        return None if stored.body == body else Operation(kind="replace", document=stored.with_body(body))

    def _endpoint(
        self, subscriber: str, channel: str, address: str | None, stored: Document | None
    ) -> Operation | None:
        if address is None:
            return Operation(kind="delete", document=stored) if stored else None
        if stored and self._opened(stored, subscriber, channel) == address:
            return None
        endpoint = Endpoint(
            endpoint_id=endpoint_id(subscriber, channel),
            subscriber=subscriber,
            channel=channel,
            shown=masked(channel, address),
        )
        body = endpoint_body(endpoint, self._sealer.seal(address, subscriber, channel))
        if stored:
            return Operation(kind="replace", document=stored.with_body(body))
        new = self._new(subscriber, endpoint.endpoint_id, body)
        return Operation(kind="create", document=new)

    def _opened(self, stored: Document, subscriber: str, channel: str) -> str | None:
        try:
            return self._sealer.open(stored.body["sealed"], subscriber, channel)
        except InvalidPayloadError:
            return None

    def _new(self, subscriber: str, id_: str, body: Mapping[str, Any]) -> Document:
        return Document(id=id_, partition=subscriber, sort=sort_key(self._wall.now(), id_), body=body)

    async def _stored(self, subscriber: str, id_: str) -> Document | None:
        try:
            return await steadily(partial(self._documents.read, CONTAINER, subscriber, id_))
        except NotFoundError:
            return None


# --- one check a column: what it means, or InvalidPayloadError with a reason that shows nothing of the value


def _subscriber(text: str) -> str:
    if not _SUBSCRIBER.fullmatch(text) or not text.isprintable():
        raise InvalidPayloadError("must be a name of 1 to 100 characters, without spaces and | / \\ ? #")
    if text == "public" or text.startswith(("guest-", "_")):
        raise InvalidPayloadError("public, guest-… and _… are built in: give another name")
    return text


def _email(text: str) -> str:
    return email_of(text) if text else ""


def _webhook(text: str) -> str:
    return webhook_of(text) if text else ""


def _symbols(text: str) -> list[str] | None:
    if text.lower() == "all":
        return None
    names = [name for name in re.split(r"[\s,;]+", text) if name]
    if not names:
        raise InvalidPayloadError("is empty: write all, or symbols such as AAPL;MSFT")
    try:
        return sorted(set(map(symbol_of, names)))
    except InvalidPayloadError:
        raise InvalidPayloadError(
            "names something that is no symbol: write all, or symbols such as AAPL;MSFT"
        ) from None


def _entries(text: str) -> list[str] | None:
    if not text or text.lower() == "all":
        return None
    names = {name.strip() for name in re.split(r"[,;]", text)} - {""}
    if not names or any("|" in name or not name.isprintable() for name in names):
        raise InvalidPayloadError("must be all, or names of entries such as sma-10-30;rsi-14")
    return sorted(names)


def _strength(text: str) -> float:
    try:
        strength = float(text or 0)
    except ValueError:
        strength = -1.0
    if not 0 <= strength <= 1:
        raise InvalidPayloadError("must be a number from 0 to 1")
    return strength


def _severity(text: str) -> Severity:
    try:
        return Severity(text.lower() or Severity.INFO)
    except ValueError:
        raise InvalidPayloadError(f"must be one of {', '.join(Severity)}") from None


def _report(refused: Sequence[Refusal], file: Path) -> None:
    """Write the refused beside the file; without any, take an older report away."""
    if not refused:
        file.unlink(missing_ok=True)
        return
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("line", "field", "reason"))
        writer.writerows((refusal.line, refusal.field, refusal.reason) for refusal in refused)
    part.replace(file)
    print(f"the refused rows are listed in {file}")
