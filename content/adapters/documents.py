"""Posts over Documents: container posts, partition kind; drafts in one of their own, facts in one a session."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta
from typing import Any

from content.models import Draft, Fact, Kind, Post, Text
from shared.clock import format_instant, parse_instant
from shared.documents import Document, Documents, sort_key
from shared.errors import ConflictError, NotFoundError, StaleError

CONTAINER, SYSTEM, DRAFTS = "posts", "system", "drafts"


class PostDocuments:
    """One document a post and one a fact."""

    def __init__(self, documents: Documents, retention: timedelta = timedelta(days=730)) -> None:
        self._documents = documents
        self._retention = retention

    async def note(self, fact: Fact) -> None:
        partition = _session_of(fact.session)
        body = {
            "signal_id": fact.signal_id,
            "symbol": fact.symbol,
            "interval": fact.interval,
            "entry": fact.entry,
            "strategy": fact.strategy,
            "direction": fact.direction,
            "strength": fact.strength,
            "reference_price": fact.reference_price,
            "params": dict(fact.params),
            "features": dict(fact.features),
            "provider": fact.provider,
            "session": fact.session.isoformat(),
            "occurred_at": format_instant(fact.occurred_at),
        }
        id_ = f"fact|{fact.signal_id}"
        try:
            await self._documents.create(
                CONTAINER,
                Document(id=id_, partition=partition, sort=sort_key(fact.occurred_at, id_), body=body),
            )
        except ConflictError:
            return  # known: facts never change

    async def facts(self, session: date) -> Sequence[Fact]:
        found: list[Fact] = []
        after: str | None = None
        while page := await self._documents.page(CONTAINER, _session_of(session), after=after, limit=500):
            found += [_fact(d) for d in page]
            after = page[-1].sort
        return found

    async def create(self, post: Post) -> Post:
        document = Document(
            id=post.post_id,
            partition=post.kind,
            sort=sort_key(post.recorded_at, post.post_id),
            body=_body(post),
            due_at=post.due_at,
            expires_at=post.recorded_at + self._retention,
        )
        return replace(post, document=await self._documents.create(CONTAINER, document))

    async def save(self, post: Post) -> Post:
        assert post.document is not None, "a post is read before it is saved"  # noqa: S101
        document = post.document.with_body(_body(post), due_at=post.due_at)
        return replace(post, document=await self._documents.replace(CONTAINER, document))

    async def read(self, kind: Kind, post_id: str) -> Post | None:
        try:
            return _post(await self._documents.read(CONTAINER, kind, post_id))
        except NotFoundError:
            return None

    async def open_draft(self, draft: Draft) -> None:
        id_ = _draft_id(draft.session)
        body = {"session": draft.session.isoformat(), "closed_at": format_instant(draft.closed_at), "touched": 0}
        sort = sort_key(draft.closed_at, id_)
        document = Document(id=id_, partition=DRAFTS, sort=sort, body=body, due_at=draft.due_at)
        try:
            await self._documents.create(CONTAINER, document)
        except ConflictError:
            return  # another instance opened it

    async def touch_draft(self, session: date) -> bool:
        while True:
            try:
                document = await self._documents.read(CONTAINER, DRAFTS, _draft_id(session))
                body = {**document.body, "touched": document.body["touched"] + 1}
                await self._documents.replace(CONTAINER, document.with_body(body, due_at=document.due_at))
            except NotFoundError:
                return False
            except StaleError:
                continue
            return True

    async def close_draft(self, draft: Draft) -> Draft | None:
        assert draft.document is not None, "a draft is read before it is closed"  # noqa: S101
        try:
            await self._documents.delete(CONTAINER, draft.document)
        except NotFoundError:
            return None
        except StaleError:
            try:
                return _draft(await self._documents.read(CONTAINER, DRAFTS, draft.document.id))
            except NotFoundError:
                return None
        return None

    async def due(self, before: datetime, limit: int) -> Sequence[Draft | Post]:
        found = await self._documents.due(CONTAINER, before=before, limit=limit)
        return [_draft(d) if d.partition == DRAFTS else _post(d) for d in found]

    async def listed(self, kind: Kind | None, after: str | None, *, newest_first: bool, limit: int) -> list[Post]:
        found: list[Document] = []
        for one in [kind] if kind else list(Kind):
            found += await self._documents.page(CONTAINER, one, after=after, newest_first=newest_first, limit=limit)
        found.sort(key=lambda d: d.sort, reverse=newest_first)
        return [_post(d) for d in found[:limit]]

    async def digested_through(self) -> datetime | None:
        try:
            document = await self._documents.read(SYSTEM, "content", "digests")
        except NotFoundError:
            return None
        return parse_instant(document.body["through"])

    async def set_digested_through(self, closed_at: datetime) -> None:
        body = {"through": format_instant(closed_at)}
        try:
            document = await self._documents.read(SYSTEM, "content", "digests")
            if parse_instant(document.body["through"]) < closed_at:
                await self._documents.replace(SYSTEM, document.with_body(body))
        except NotFoundError:
            sort = sort_key(closed_at, "content|digests")
            document = Document(id="digests", partition="content", sort=sort, body=body)
            try:
                await self._documents.create(SYSTEM, document)
            except ConflictError:
                return  # another instance began at the same moment
        except StaleError:
            return  # another instance moved on at the same moment


def _draft_id(session: date) -> str:
    return f"draft|{session.isoformat()}"


def _draft(document: Document) -> Draft:
    b = document.body
    assert document.due_at is not None, "a draft is always due"  # noqa: S101
    return Draft(
        session=date.fromisoformat(b["session"]),
        closed_at=parse_instant(b["closed_at"]),
        due_at=document.due_at,
        document=document,
    )


def _session_of(session: date) -> str:
    return f"facts|{session.isoformat()}"


def _fact(document: Document) -> Fact:
    b = document.body
    return Fact(
        **{
            **b,
            "session": date.fromisoformat(b["session"]),
            "occurred_at": parse_instant(b["occurred_at"]),
        }
    )


def _body(p: Post) -> dict[str, Any]:
    return {
        "post_id": p.post_id,
        "kind": p.kind,
        "version": p.version,
        "session": p.session.isoformat(),
        "symbols": list(p.symbols),
        "signal_ids": list(p.signal_ids),
        "title": p.text.title,
        "summary": p.text.summary,
        "html": p.text.html,
        "occurred_at": format_instant(p.occurred_at),
        "recorded_at": format_instant(p.recorded_at),
        "updated_at": format_instant(p.updated_at),
    }


def _post(document: Document) -> Post:
    b = document.body
    return Post(
        post_id=b["post_id"],
        kind=Kind(b["kind"]),
        version=b["version"],
        session=date.fromisoformat(b["session"]),
        symbols=b["symbols"],
        signal_ids=b["signal_ids"],
        text=Text(title=b["title"], summary=b["summary"], html=b["html"]),
        occurred_at=parse_instant(b["occurred_at"]),
        recorded_at=parse_instant(b["recorded_at"]),
        updated_at=parse_instant(b["updated_at"]),
        due_at=document.due_at,
        document=document,
    )
