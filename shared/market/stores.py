"""The market room's own words over Documents: series, bars, quotes, and what the watchlist file said last."""

from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from shared.clock import Clock, format_instant, parse_instant
from shared.documents import BATCH_LIMIT, Document, Documents, Operation, sort_key
from shared.errors import NotFoundError, TransientError
from shared.market.conditional import QUOTA, changed
from shared.market.models import (
    NUMBER_NAMES,
    Adjustment,
    Bar,
    Columns,
    Interval,
    Quote,
    instant_of,
    minute_of,
    series_key,
)

SERIES, BARS, QUOTES, SYSTEM, INTEREST = "series", "bars", "quotes", "system", "interest"
CACHED_PAGES = 8192
NOTED_EVERY, NOTED_FOR, NOTED_SYMBOLS = timedelta(minutes=1), timedelta(days=45), 500
"""How often a process writes down the interest in one symbol, how long that is kept, and in how many at a time."""
LONGEST_PAGE = 92 * 24 * 60
"""The minutes of the longest quarter: no page covers more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """
    What is known of one series of bars.

    ``live_from``: bars closed after it raise alerts. ``evaluated_through``: the last bar that every strategy
    has seen. ``due_at`` (market time): when the next bar can be fetched; None while it is not watched.
    """

    symbol: str
    interval: Interval
    live_from: datetime
    is_active: bool = True
    watched_by: str = "file"
    evaluated_through: datetime | None = None
    provider: str | None = None
    adjustment: Adjustment | None = None
    revision: int = 0
    misses: int = 0
    trouble: Mapping[str, Any] | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)
    told_at: datetime | None = None
    """When the event of bars that are still not evaluated was told again (wall)."""
    claimed: int = 0
    """The highest revision that anybody began to write."""
    scoring_at: datetime | None = None
    """No horizon of a signal that is still open closes before this bar's close; None: none is open."""
    due_at: datetime | None = None
    document: Document | None = None

    @property
    def key(self) -> str:
        return series_key(self.symbol, self.interval)

    @property
    def sort(self) -> str:
        """Its place in the list of series."""
        assert self.document is not None, "a listed series was read"  # noqa: S101
        return self.document.sort


class SeriesStore:
    """One document a series."""

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall

    async def get(self, symbol: str, interval: Interval) -> Series:
        """
        Read a series.

        Raises:
            NotFoundError: nobody watches it.

        """
        key = series_key(symbol, interval)
        try:
            return _series(await self._documents.read(SERIES, key, key))
        except NotFoundError:
            raise NotFoundError(
                f"{symbol} at {interval} is not watched: PUT /api/watchlist/{symbol}?interval={interval} adds it"
            ) from None

    async def create(self, series: Series) -> Series:
        """Store a new series; raises ConflictError if it is known."""
        document = Document(
            id=series.key,
            partition=series.key,
            sort=sort_key(self._wall.now(), series.key),
            body=_series_body(series),
            due_at=series.due_at,
        )
        return replace(series, document=await self._documents.create(SERIES, document))

    async def save(self, series: Series) -> Series:
        """Write what changed; raises StaleError if somebody else wrote first."""
        assert series.document is not None, "a series is read before it is saved"  # noqa: S101
        document = series.document.with_body(_series_body(series), due_at=series.due_at)
        return replace(series, document=await self._documents.replace(SERIES, document))

    async def claim(self, series: Series) -> Series:
        """
        Take the next revision for oneself, to write a history under it: it is the answer's ``claimed``.

        A revision is claimed once, so what a killed writer left under one is never read and never mixed with.
        Raises StaleError if somebody else wrote first.
        """
        return await self.save(replace(series, claimed=max(series.claimed, series.revision) + 1))

    async def due(self, before: datetime, limit: int) -> list[Series]:
        """Series whose next bar can be fetched by market instant *before*, the longest due first."""
        return [_series(d) for d in await self._documents.due(SERIES, before=before, limit=limit)]

    async def page(self, after: str | None, *, newest_first: bool, limit: int) -> list[Series]:
        """List series by when they became known, strictly behind *after* in the direction of reading."""
        found = await self._documents.feed(SERIES, after=after, newest_first=newest_first, limit=limit)
        return [_series(d) for d in found]

    async def all(self) -> list[Series]:
        """Every series ever watched or fetched."""
        found: list[Series] = []
        after: str | None = None
        while page := await self._documents.feed(SERIES, after=after, limit=500):
            found += [_series(d) for d in page]
            after = page[-1].sort
        return found


def _series_body(s: Series) -> dict[str, Any]:
    return {
        "symbol": s.symbol,
        "interval": s.interval,
        "live_from": format_instant(s.live_from),
        "is_active": s.is_active,
        "watched_by": s.watched_by,
        "evaluated_through": format_instant(s.evaluated_through) if s.evaluated_through else None,
        "provider": s.provider,
        "adjustment": s.adjustment,
        "revision": s.revision,
        "misses": s.misses,
        "trouble": s.trouble,
        "entries": s.entries,
        "told_at": format_instant(s.told_at) if s.told_at else None,
        "claimed": s.claimed,
        "scoring_at": format_instant(s.scoring_at) if s.scoring_at else None,
    }


def _series(document: Document) -> Series:
    b = document.body
    return Series(
        symbol=b["symbol"],
        interval=Interval(b["interval"]),
        live_from=parse_instant(b["live_from"]),
        is_active=b["is_active"],
        watched_by=b["watched_by"],
        evaluated_through=parse_instant(b["evaluated_through"]) if b["evaluated_through"] else None,
        provider=b["provider"],
        adjustment=Adjustment(b["adjustment"]) if b["adjustment"] else None,
        revision=b["revision"],
        misses=b["misses"],
        trouble=b["trouble"],
        entries=b["entries"],
        told_at=parse_instant(b["told_at"]) if b.get("told_at") else None,
        claimed=b.get("claimed", 0),
        scoring_at=parse_instant(b["scoring_at"]) if b.get("scoring_at") else None,
        due_at=document.due_at,
        document=document,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BarPage:
    """Up to about 64 bars of one series: a quarter of days, a week of hours, an hour of minutes."""

    name: str
    columns: Columns
    recorded_at: datetime
    document: Document
    older: int | None = None
    """How many bars the pages before it hold; kept true on the page being filled, None where it was never counted."""
    first: int | None = None
    """The minute at which the first bar of the whole history closes; kept as ``older`` is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How far the history of a series reaches: the closes of its first and last bar, and how many there are."""

    first: datetime
    last: datetime
    count: int


class Bars:
    """
    Pages of bars. A page that has a newer one behind it is never edited, so a process may keep it.

    Older history is put before the first page as more pages. A correction, or what fills a hole in between, is
    written as pages of the next revision; whoever reads, reads the series' revision.
    """

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall
        self._closed: OrderedDict[tuple[str, int], list[BarPage]] = OrderedDict()
        self._kept = 0

    async def newest(self, key: str, revision: int) -> BarPage | None:
        """The page that is still being filled."""
        after: str | None = None
        limit = 1  # nearly always the one; pages of other revisions may lie before it
        while documents := await self._documents.page(BARS, key, after=after, newest_first=True, limit=limit):
            for document in documents:
                if document.body["revision"] == revision:
                    return _page(document)
            after, limit = documents[-1].sort, 8
        return None

    async def append(
        self, key: str, interval: Interval, revision: int, bars: Sequence[Bar], *, behind: BarPage | None = None
    ) -> None:
        """
        Store *bars* behind what is there, oldest first; bars already stored are left as they are.

        *behind* is the newest page where the caller has just read it; without it the page is read here.
        Raises ConflictError or StaleError when another process appended at the same moment: read again.
        """
        last = behind or await self.newest(key, revision)
        stored = last.columns.closed[-1] if last else None
        fresh = [b for b in bars if stored is None or minute_of(b.closed_at) > stored]
        if not fresh:
            return
        older, first = await self._counted(key, revision, last) if last else (0, minute_of(fresh[0].closed_at))
        operations: list[Operation] = []
        for name, columns in _pieces(interval, Columns.of(fresh)):
            if last and name == last.name:
                columns = Columns.joined([last.columns, columns])  # noqa: PLW2901 - the page as it will be
                body = self._body(interval, revision, name, columns, older, first)
                operations.append(Operation(kind="replace", document=last.document.with_body(body)))
            else:
                older += len(last.columns) if last and not operations else 0
                document = self._new_page(key, interval, revision, name, columns, older, first)
                operations.append(Operation(kind="create", document=document))
            older += len(columns)
        await self._write(operations)

    async def prepend(self, key: str, interval: Interval, revision: int, bars: Sequence[Bar]) -> None:
        """
        Store *bars* before what is there; those that are not older than the first stored bar are left out.

        Raises ConflictError or StaleError when another process wrote at the same moment: read again.
        """
        newest = await self.newest(key, revision)
        if newest is None:
            await self.append(key, interval, revision, bars)
            return
        older, first = await self._counted(key, revision, newest)
        oldest_page = _page_name(interval, instant_of(first))
        pieces = list(_pieces(interval, Columns.of([b for b in bars if minute_of(b.closed_at) < first])))
        # Newest pages first, and each batch renews the page being filled, which counts them: a crash between two
        # leaves a history without a hole, and of two writers at once one is refused.
        while pieces:
            taken, pieces = pieces[-(BATCH_LIMIT - 1) :], pieces[: -(BATCH_LIMIT - 1)]
            operations: list[Operation] = []
            for name, columns in taken:
                behind = first if name == oldest_page else None
                document = self._new_page(key, interval, revision, name, columns, None, None, before=behind)
                operations.append(Operation(kind="create", document=document))
                older += len(columns)
            first = taken[0][1].closed[0]
            body = self._body(interval, revision, newest.name, newest.columns, older, first)
            body["recorded_at"] = newest.document.body["recorded_at"]  # what it holds is as old as it was
            operations.append(Operation(kind="replace", document=newest.document.with_body(body)))
            written = await self._documents.batch(BARS, operations)
            newest = replace(newest, document=written[-1])

    async def rewrite(self, key: str, interval: Interval, revision: int, columns: Columns) -> None:
        """
        Write a whole history under a claimed *revision*, which nobody reads before the series says so.

        Raises ConflictError when something lies under that revision already.
        """
        operations: list[Operation] = []
        older = 0
        for name, piece in _pieces(interval, columns):
            document = self._new_page(key, interval, revision, name, piece, older, columns.closed[0])
            operations.append(Operation(kind="create", document=document))
            older += len(piece)
        await self._write(operations)

    async def extent(self, key: str, revision: int) -> Extent | None:
        """How far the history reaches; one read, whatever its length."""
        newest = await self.newest(key, revision)
        if newest is None:
            return None
        older, first = await self._counted(key, revision, newest)
        last = newest.columns.closed[-1]
        return Extent(first=instant_of(first), last=instant_of(last), count=older + len(newest.columns))

    async def _counted(self, key: str, revision: int, newest: BarPage) -> tuple[int, int]:
        """How many bars the pages before the newest hold, and the first minute of all."""
        if newest.older is not None and newest.first is not None:
            return newest.older, newest.first
        whole = await self.window(key, revision, since=None, lookback=0)  # written before pages were counted
        return len(whole) - len(newest.columns), whole.closed[0]

    async def _write(self, operations: Sequence[Operation]) -> None:
        # Oldest pages first: a crash between two batches leaves a prefix, never a hole.
        for start in range(0, len(operations), BATCH_LIMIT):
            await self._documents.batch(BARS, operations[start : start + BATCH_LIMIT])

    def _new_page(
        self,
        key: str,
        interval: Interval,
        revision: int,
        name: str,
        columns: Columns,
        older: int | None,
        first: int | None,
        *,
        before: int | None = None,
    ) -> Document:
        """
        A page; with *before* it holds bars of the same quarter, week or hour as the first page so far.

        It then lies just before that page, and of several such pages the one of older bars comes first: its id says
        before which minute its bars lie.
        """
        start = _page_start(interval, instant_of(columns.closed[0]))
        body = self._body(interval, revision, name, columns, older, first)
        if before is not None:
            name = body["name"] = f"{name}<{before:010}"
            start -= timedelta(microseconds=1)
        id_ = f"{key}|r{revision}|{name}"
        return Document(id=id_, partition=key, sort=sort_key(start, id_), body=body)

    async def window(
        self, key: str, revision: int, *, since: datetime | None, lookback: int, through: datetime | None = None
    ) -> Columns:
        """
        The bars closed after *since* (None: all) and up to *lookback* bars before them, oldest first.

        With *through* nothing that closes later is in it.
        """
        first_new = minute_of(since) if since else None
        pages = await self._back_to(key, revision, first_new, lookback)
        columns = Columns.joined([p.columns for p in pages]) if pages else Columns()
        closed = columns.closed
        end = len(closed)
        if through is not None:
            end = bisect_right(closed, minute_of(through))
        new = 0 if first_new is None else bisect_right(closed, first_new, 0, end)
        return columns[max(0, new - lookback) : end]

    async def latest(self, key: str, revision: int, *, end: int | None = None, count: int) -> Columns:
        """The last *count* bars and perhaps some older ones, of those that close before minute *end*; for lists."""
        before = None if end is None else sort_key(instant_of(end), "~")
        found: list[Columns] = []
        have = 0
        while have < count:
            documents = await self._documents.page(BARS, key, after=before, newest_first=True, limit=8)
            for document in documents:
                if document.body["revision"] == revision:
                    columns = _page(document).columns
                    found.append(columns if end is None else columns[: bisect_left(columns.closed, end)])
                    have += len(found[-1])
            if len(documents) < 8:
                break
            before = documents[-1].sort
        return Columns.joined(found[::-1]) if found else Columns()

    async def _back_to(self, key: str, revision: int, first_new: int | None, lookback: int) -> list[BarPage]:
        """Pages, oldest first, that hold every new bar and *lookback* older ones as far as they exist."""
        kept = self._closed.get((key, revision), [])
        pages: list[BarPage] = []
        older = 0
        after: str | None = None
        size = 2

        def enough() -> bool:
            # One older bar at least: only behind it can no new one hide.
            return first_new is not None and older >= max(lookback, 1)

        while not enough():
            documents = await self._documents.page(BARS, key, after=after, newest_first=True, limit=size)
            joined = False
            for document in documents:
                if document.body["revision"] != revision:
                    continue
                if kept and document.sort == kept[-1].document.sort:
                    joined = True
                    break
                page = _page(document)
                pages.append(page)
                older += _older(page, first_new)
                if enough():
                    break
            if joined:
                while kept and not enough():
                    page = kept[len(kept) - 1]
                    kept = kept[:-1]
                    pages.append(page)
                    older += _older(page, first_new)
                if enough():
                    break
                after, kept, size = pages[-1].document.sort, [], 50
                continue
            if len(documents) < size:
                break
            after, size = documents[-1].sort, 50
        pages.reverse()
        self._keep(key, revision, pages[:-1])
        return pages

    def _keep(self, key: str, revision: int, closed: list[BarPage]) -> None:
        """Remember closed pages; *closed* is contiguous and ends just before the page being filled."""
        name = (key, revision)
        before = self._closed.pop(name, [])
        if len(before) > len(closed) and closed and before[-1].document.sort == closed[-1].document.sort:
            closed = before
        self._kept += len(closed) - len(before)
        self._closed[name] = closed
        while self._kept > CACHED_PAGES and len(self._closed) > 1:
            _, dropped = self._closed.popitem(last=False)
            self._kept -= len(dropped)

    def _body(
        self, interval: Interval, revision: int, name: str, columns: Columns, older: int | None, first: int | None
    ) -> dict[str, Any]:
        start = minute_of(_page_start(interval, instant_of(columns.closed[0])))
        return {
            "name": name,
            "revision": revision,
            "start": start,
            "recorded_at": format_instant(self._wall.now()),
            "opened": [minute - start for minute in columns.opened],
            "closed": [minute - start for minute in columns.closed],
            **{number: list(getattr(columns, number)) for number in NUMBER_NAMES if number != "split"},
            "split": {str(i): factor for i, factor in enumerate(columns.split) if factor != 1.0},
            **({} if older is None else {"older": older, "first": first}),
        }


def _older(page: BarPage, first_new: int | None) -> int:
    return 0 if first_new is None else bisect_right(page.columns.closed, first_new)


def _page(document: Document) -> BarPage:
    b = document.body
    start, count = b["start"], len(b["closed"])
    split = array("d", (1.0,)) * count
    for index, factor in b["split"].items():
        split[int(index)] = factor
    columns = Columns(
        opened=array("q", (start + offset for offset in b["opened"])),
        closed=array("q", (start + offset for offset in b["closed"])),
        split=split,
        **{name: array("d", b[name]) for name in NUMBER_NAMES if name != "split"},
    )
    return BarPage(
        name=b["name"],
        columns=columns,
        recorded_at=parse_instant(b["recorded_at"]),
        document=document,
        older=b.get("older"),
        first=b.get("first"),
    )


def _page_start(interval: Interval, closed_at: datetime) -> datetime:
    midnight = closed_at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    match interval:
        case Interval.DAY:
            return midnight.replace(month=(midnight.month - 1) // 3 * 3 + 1, day=1)
        case Interval.HOUR:
            return midnight - timedelta(days=midnight.weekday())
        case Interval.MINUTE:
            return closed_at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def _page_end(interval: Interval, closed_at: datetime) -> datetime:
    start = _page_start(interval, closed_at)
    match interval:
        case Interval.DAY:
            return (start + timedelta(minutes=LONGEST_PAGE)).replace(day=1)
        case Interval.HOUR:
            return start + timedelta(days=7)
        case Interval.MINUTE:
            return start + timedelta(hours=1)


def _page_name(interval: Interval, closed_at: datetime) -> str:
    form = "%Y-%m-%dT%H" if interval is Interval.MINUTE else "%Y-%m-%d"
    return _page_start(interval, closed_at).strftime(form)


def _pieces(interval: Interval, columns: Columns) -> Iterator[tuple[str, Columns]]:
    """The columns cut into pages, oldest first."""
    begin = 0
    while begin < len(columns):
        first = instant_of(columns.closed[begin])
        end = bisect_left(columns.closed, minute_of(_page_end(interval, first)), begin)
        yield _page_name(interval, first), columns[begin:end]
        begin = end


def merged(held: Columns, fresh: Columns) -> Columns:
    """Both as one history, oldest first; where both have a bar *fresh* is right."""
    parts: list[Columns] = []
    at = begin = 0
    while begin < len(fresh):
        place = bisect_left(held.closed, fresh.closed[begin], at)
        parts.append(held[at:place])
        end = begin
        while end < len(fresh) and (place == len(held) or fresh.closed[end] <= held.closed[place]):
            place += place < len(held) and fresh.closed[end] == held.closed[place]
            end += 1
        parts.append(fresh[begin:end])
        at, begin = place, end
    parts.append(held[at:])
    return Columns.joined(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedQuote:
    """The stored quote of a symbol, if there is one yet, and how often it was asked for in vain."""

    symbol: str
    quote: Quote | None = None
    recorded_at: datetime | None = None
    wanted: int = 0
    due_at: datetime | None = None
    document: Document | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How often a symbol was asked for in one hour of the wall clock."""

    symbol: str
    hour: datetime
    count: int


class Interest:
    """
    Remembers which symbols are asked for, by the hour, so that somebody can foresee what will be.

    A process counts and writes at most once a minute a symbol; what it has counted since is lost when it ends.
    """

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall
        self._counted: dict[str, int] = {}
        self._written: dict[str, datetime] = {}

    async def note(self, symbol: str) -> None:
        """Count one request; storage in trouble is no trouble of the reader's."""
        now = self._wall.now()
        if len(self._written) >= NOTED_SYMBOLS:
            self._written = {s: at for s, at in self._written.items() if now - at < NOTED_EVERY}
            self._counted = {s: n for s, n in self._counted.items() if s in self._written}
        if symbol not in self._written and len(self._written) >= NOTED_SYMBOLS:
            return  # somebody asks for all the symbols there could be
        self._counted[symbol] = self._counted.get(symbol, 0) + 1
        if symbol in self._written and now - self._written[symbol] < NOTED_EVERY:
            return
        self._written[symbol] = now
        count = self._counted.pop(symbol)
        try:
            await self._add(symbol, now, count)
        except TransientError:
            self._counted[symbol] = self._counted.get(symbol, 0) + count

    async def since(self, at: datetime) -> list[Asked]:
        """Everything noted of the hours from *at* on, oldest first."""
        found: list[Asked] = []
        after: str | None = sort_key(at)
        while page := await self._documents.page(QUOTA, INTEREST, after=after, limit=500):
            found += [
                Asked(symbol=d.body["symbol"], hour=parse_instant(d.body["hour"]), count=d.body["count"]) for d in page
            ]
            after = page[-1].sort
        return found

    async def _add(self, symbol: str, now: datetime, count: int) -> None:
        hour = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)

        def more(body: Mapping[str, Any]) -> Mapping[str, Any]:
            return {"symbol": symbol, "hour": format_instant(hour), "count": body.get("count", 0) + count}

        name = f"{symbol}|{hour:%Y-%m-%dT%H}"
        await changed(self._documents, self._wall, INTEREST, name, more, expires_at=hour + NOTED_FOR)


class Quotes:
    """One document a symbol; ``interest`` remembers who is asked for."""

    def __init__(self, documents: Documents, wall: Clock) -> None:
        self._documents = documents
        self._wall = wall
        self.interest = Interest(documents, wall)

    async def get(self, symbol: str) -> WantedQuote | None:
        """The stored quote, or None when the symbol was never asked for."""
        try:
            return _wanted(await self._documents.read(QUOTES, symbol, symbol))
        except NotFoundError:
            return None

    async def put(self, wanted: WantedQuote) -> None:
        """Create or conditionally replace; raises ConflictError or StaleError when somebody else wrote first."""
        quote = wanted.quote
        body: dict[str, Any] = {
            "symbol": wanted.symbol,
            "wanted": wanted.wanted,
            "recorded_at": format_instant(wanted.recorded_at) if wanted.recorded_at else None,
            "quote": None
            if quote is None
            else {
                "price": quote.price,
                "previous_close": quote.previous_close,
                "as_of": format_instant(quote.as_of),
                "provider": quote.provider,
            },
        }
        if wanted.document is None:
            sort = sort_key(self._wall.now(), wanted.symbol)
            await self._documents.create(
                QUOTES,
                Document(id=wanted.symbol, partition=wanted.symbol, sort=sort, body=body, due_at=wanted.due_at),
            )
        else:
            await self._documents.replace(QUOTES, wanted.document.with_body(body, due_at=wanted.due_at))

    async def due(self, before: datetime, limit: int) -> list[WantedQuote]:
        """Quotes to refresh by market instant *before*, the longest due first."""
        return [_wanted(d) for d in await self._documents.due(QUOTES, before=before, limit=limit)]


def _wanted(document: Document) -> WantedQuote:
    b, q = document.body, document.body["quote"]
    quote = q and Quote(
        symbol=b["symbol"],
        price=q["price"],
        previous_close=q["previous_close"],
        as_of=parse_instant(q["as_of"]),
        provider=q["provider"],
    )
    return WantedQuote(
        symbol=b["symbol"],
        quote=quote or None,
        recorded_at=parse_instant(b["recorded_at"]) if b["recorded_at"] else None,
        wanted=b["wanted"],
        due_at=document.due_at,
        document=document,
    )
