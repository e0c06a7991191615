"""When the content domain wakes up."""

from collections.abc import Sequence
from datetime import date, datetime

import azure.functions as func

from content.logic.atom import feed
from content.models import Kind, Post
from content.wiring import Wired
from shared.errors import InvalidPayloadError
from shared.http import AFTER, CURSOR, LIMIT, Api, Body, Page, Query, cursor_of, listed
from shared.inbound import on_time, settle
from signals.events import SignalRaised

FEED_LENGTH = 50


class PostItem(Body):
    """A post; ``version`` rises when it was corrected."""

    post_id: str
    kind: str
    version: int
    session: date
    symbols: Sequence[str]
    signal_ids: Sequence[str]
    title: str
    summary: str
    html: str
    occurred_at: datetime
    recorded_at: datetime
    updated_at: datetime
    cursor: str


class PostPage(Page[PostItem]):
    """Posts, newest first, or oldest first behind ``?after=``."""


KIND = Query(
    name="kind",
    description="Only posts of this kind.",
    schema={"type": "string", "enum": [kind.value for kind in Kind]},
)


def blueprint(content: Wired, api: Api) -> func.Blueprint:
    bp = func.Blueprint()
    service = content.service

    @bp.function_name("content_on_signal_raised")
    @bp.event_grid_trigger(arg_name="event")
    @content.dead_letters.replayable
    async def content_on_signal_raised(event: func.CloudEvent) -> None:
        async with settle(event, "content_on_signal_raised", content.dead_letters):
            await service.collect(SignalRaised.from_wire(event.type, event.get_json()))

    @bp.function_name("content_open_digests")
    @bp.timer_trigger(arg_name="timer", schedule="%CONTENT_DIGEST_SCHEDULE%")
    async def content_open_digests(timer: func.TimerRequest) -> None:
        async with on_time("content_open_digests"):
            await service.open_digests()

    @bp.function_name("content_sweep")
    @bp.timer_trigger(arg_name="timer", schedule="%CONTENT_SWEEP_SCHEDULE%")
    async def content_sweep(timer: func.TimerRequest) -> None:
        async with on_time("content_sweep"):
            await service.sweep()

    @api.endpoint(
        bp,
        "posts_list",
        "posts",
        summary="Posts, newest first.",
        answer=PostPage,
        query=(KIND, LIMIT, CURSOR, AFTER),
    )
    async def posts_list(req: func.HttpRequest) -> PostPage:
        kind = _kind(req.params.get("kind"))
        found, cursor = await listed(
            req, lambda after, newest, limit: service.listed(kind, after, newest_first=newest, limit=limit)
        )
        return PostPage(items=[_item(post) for post in found], next=cursor)

    @api.endpoint(bp, "posts_read", "posts/{post_id}", summary="One post.", answer=PostItem)
    async def posts_read(req: func.HttpRequest) -> PostItem:
        return _item(await service.read(req.route_params["post_id"]))

    @api.endpoint(
        bp, "posts_feed", "feed.xml", summary="The newest posts as an Atom feed.", answer="application/atom+xml"
    )
    async def posts_feed(req: func.HttpRequest) -> func.HttpResponse:
        posts = await service.listed(None, None, newest_first=True, limit=FEED_LENGTH)
        body = feed(posts, public_url=content.public_url, updated_at=service.wall.now())
        return func.HttpResponse(body, mimetype="application/atom+xml")

    return bp


def _kind(text: str | None) -> Kind | None:
    try:
        return Kind(text) if text else None
    except ValueError:
        raise InvalidPayloadError(f"kind must be one of {', '.join(Kind)}") from None


def _item(post: Post) -> PostItem:
    return PostItem(
        post_id=post.post_id,
        kind=post.kind,
        version=post.version,
        session=post.session,
        symbols=post.symbols,
        signal_ids=post.signal_ids,
        title=post.text.title,
        summary=post.text.summary,
        html=post.text.html,
        occurred_at=post.occurred_at,
        recorded_at=post.recorded_at,
        updated_at=post.updated_at,
        cursor=cursor_of(post.sort),
    )
