"""Posts as an Atom feed (RFC 4287). Pure. Entry ids are the posts' UUIDs: they survive a change of address."""

import re
from collections.abc import Sequence
from datetime import datetime
from uuid import uuid5

from content.models import Post
from shared.events import NAMESPACE

ATOM = "http://www.w3.org/2005/Atom"
_NO_XML = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def feed(posts: Sequence[Post], *, public_url: str, updated_at: datetime) -> bytes:
    """The feed document; *updated_at* counts while there is no post."""
    from xml.etree.ElementTree import Element, SubElement, tostring

    root = Element("feed", xmlns=ATOM)
    SubElement(root, "id").text = f"urn:uuid:{uuid5(NAMESPACE, 'feed')}"
    SubElement(root, "title").text = "TROOP: signals and digests"
    newest = max([p.updated_at for p in posts], default=updated_at)
    SubElement(root, "updated").text = _time(newest)
    SubElement(root, "link", rel="self", href=f"{public_url}/api/feed.xml")
    author = SubElement(root, "author")
    SubElement(author, "name").text = "TROOP"
    for post in posts:
        entry = SubElement(root, "entry")
        SubElement(entry, "id").text = f"urn:uuid:{post.post_id}"
        SubElement(entry, "title").text = _text(post.text.title)
        SubElement(entry, "published").text = _time(post.recorded_at)
        SubElement(entry, "updated").text = _time(post.updated_at)
        SubElement(entry, "link", rel="alternate", href=f"{public_url}/api/posts/{post.post_id}")
        SubElement(entry, "category", term=post.kind)
        SubElement(entry, "summary").text = _text(post.text.summary)
        SubElement(entry, "content", type="html").text = _text(post.text.html)
    document: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return document


def _text(text: str) -> str:
    """The text without the control characters that no XML may hold, escaped or not."""
    return _NO_XML.sub("", text)


def _time(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")
