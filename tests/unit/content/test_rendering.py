"""Posts and the feed: what they say, and what no text can make them do."""

import re
from datetime import date, timedelta
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

from content.logic.atom import ATOM, feed
from content.logic.rendering import _template, render_digest, render_signal
from content.models import Fact, Post, Text, digest_post_id, signal_post_id
from tests.builders import WALL
from tests.standins import CLOSE
from tests.unit.content.newsroom import SESSION, a_post

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?%?")
TAGS = {"p", "table", "tr", "th", "td", "small"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}",
    "{{ fact.__class__ }}",
    "&lt;b&gt;",
    '" onmouseover="alert(1)',
    "]]>",
    "\x00\x08\x0b\ufffe\uffff",
    "😀\u202e",
]
hostile = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=10), min_size=1, max_size=4).map("".join)
HOUR = timedelta(hours=1)
finite = st.floats(min_value=-1e6, max_value=1e6)


def a_fact(**changes) -> Fact:
    fields = {
        "signal_id": "s1",
        "symbol": "AAPL",
        "interval": "1d",
        "entry": "sma",
        "strategy": "sma_cross@1",
        "direction": "long",
        "strength": 0.62,
        "reference_price": 561.7,
        "params": {"fast": 10.0},
        "features": {"fast": 552.123456, "slow_one": 550.3},
        "provider": "alpha_vantage",
        "session": SESSION,
        "occurred_at": CLOSE,
    }
    return Fact(**(fields | changes))


class Read(HTMLParser):
    """What a browser would make of a post: its tags and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_comment(self, data: str) -> None:
        self.tags.append("!--")

    def handle_data(self, data: str) -> None:
        self.cells.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.cells)


def shown(value: float) -> str:
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4f}"


# --- a signal's post


def test_a_signals_post_reads_well():
    """Title, summary and table, once, whole."""
    text = render_signal(a_fact())

    assert text.title == "AAPL: long at 561.70"
    assert text.summary == "The entry sma points long on AAPL. Close 561.70, strength 62%."
    page = Read(text.html)
    for cell in ("AAPL", "long", "561.70", "62%", "1d, closed 2012-11-21", "fast", "552.12", "slow one", "550.30"):
        assert cell in page.cells
    assert "not investment advice" in text.html


def test_an_intraday_bar_is_named_by_its_close():
    """A bar of an hour says which hour, in UTC."""
    html = render_signal(a_fact(interval="1h")).html

    assert "1h, closed 2012-11-21 21:00 UTC" in html


@pytest.mark.parametrize(
    ("value", "text"), [(123456.789, "123,456.79"), (-12.5, "-12.50"), (0.00012, "0.0001"), (600_000.0, "600,000.00")]
)
def test_numbers_are_written_for_people(value, text):
    """No exponent, no seventeen digits."""
    assert text in Read(render_signal(a_fact(features={"x": value})).html).cells


@given(
    strength=st.floats(min_value=0, max_value=1),
    close=st.floats(min_value=1e-4, max_value=1e6),
    features=st.dictionaries(st.sampled_from(["rsi", "upper", "fast_average"]), finite),
    interval=st.sampled_from(["1d", "1h"]),
    gone=st.timedeltas(min_value=timedelta(), max_value=timedelta(days=4000)),
)
def test_every_number_in_a_post_is_one_of_its_facts(strength, close, features, interval, gone):
    """A post computes nothing: each number is our way of writing one number of the signal."""
    at = CLOSE + gone
    fact = a_fact(
        strength=strength,
        reference_price=close,
        features=features,
        interval=interval,
        occurred_at=at,
        session=at.date(),
        strategy="sma_cross",
    )
    known = {f"{strength:.0%}", shown(close), "1"}
    known |= {shown(value) for value in features.values()}
    known |= set(NUMBER.findall(f"{at:%Y-%m-%d %H:%M}"))

    text = render_signal(fact)
    digest = render_digest(fact.session, [fact])

    for written in (
        text.title,
        text.summary,
        Read(text.html).text,
        digest.title,
        digest.summary,
        Read(digest.html).text,
    ):
        assert set(NUMBER.findall(written)) <= known
    assert Read(text.html).cells.count(shown(close)) >= 1


@given(symbol=hostile, entry=hostile, strategy=hostile, provider=hostile, feature=hostile, direction=hostile)
def test_hostile_text_is_shown_and_never_done(symbol, entry, strategy, provider, feature, direction):
    """Markup and template code in a signal come out as the letters they are, in a signal's post and in a digest."""
    fact = a_fact(
        symbol=symbol, entry=entry, strategy=strategy, provider=provider, direction=direction, features={feature: 1.0}
    )

    for html in (render_signal(fact).html, render_digest(SESSION, [fact]).html):
        page = Read(html)
        assert set(page.tags) <= TAGS
        assert page.attributes == []
        assert "49" not in page.text or "49" in f"{symbol}{entry}{strategy}{provider}{feature}{direction}"
        for text in (symbol, entry):
            assert _lined(text) in _lined("".join(page.cells))


def _lined(text: str) -> str:
    """As browsers read it: a null becomes a replacement character, line ends are one."""
    return text.replace("\x00", "\ufffd").replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("name", ["signal.html.j2", "digest.html.j2"])
def test_a_template_refuses_a_name_it_was_not_given(name):
    """A missing fact is an error, not an empty cell."""
    with pytest.raises(UndefinedError):
        _template(name).render(fact={}, facts=[{}])


# --- a digest


def test_a_quiet_session_says_so():
    """No signal is a fact too."""
    text = render_digest(SESSION, [])

    assert text.title == "2012-11-21: a quiet session"
    assert text.summary == "No entry raised a signal."
    assert "No entry raised a signal at the close of 2012-11-21." in text.html


def test_a_digest_lists_the_strongest_first():
    """Every signal is in the table, the strongest on top; the summary names six and counts the rest."""
    facts = [a_fact(signal_id=str(n), symbol=f"S{n}", strength=n / 10) for n in range(8)]

    text = render_digest(SESSION, facts)

    assert text.title == "2012-11-21: 8 signals"
    assert text.summary == "S7 long, S6 long, S5 long, S4 long, S3 long, S2 long and 2 more."
    cells = Read(text.html).cells
    assert [c for c in cells if re.fullmatch(r"S\d", c)] == [f"S{n}" for n in reversed(range(8))]


@pytest.mark.parametrize(("count", "said"), [(1, "1 signal"), (2, "2 signals")])
def test_a_digest_counts_in_good_english(count, said):
    """One signal, two signals."""
    facts = [a_fact(signal_id=str(n)) for n in range(count)]

    assert render_digest(SESSION, facts).title == f"2012-11-21: {said}"


@given(
    st.permutations([a_fact(signal_id=str(n), strength=(n % 2) / 2, occurred_at=CLOSE + n * HOUR) for n in range(6)])
)
def test_the_order_of_facts_does_not_show(facts):
    """The same facts make the same digest."""
    assert render_digest(SESSION, facts) == render_digest(SESSION, sorted(facts, key=lambda f: f.signal_id))


# --- ids


def test_ids_are_made_from_facts():
    """A post is known by its signal, a digest by its exchange and session."""
    assert signal_post_id("s") == "f4bba3ca-081e-54c0-abaa-d66929eecf42"
    assert digest_post_id("XNYS", date(2012, 11, 21)) == "6d6b9371-0682-50ef-874b-ebfdacbc5152"


# --- the feed


def parsed(posts: list[Post], **changes) -> ET.Element:
    given = {"public_url": "https://troop.example", "updated_at": WALL} | changes
    return ET.fromstring(feed(posts, **given))


def at(node: ET.Element, name: str) -> str | None:
    return node.findtext(f"{{{ATOM}}}{name}")


def entries(root: ET.Element) -> list[ET.Element]:
    return root.findall(f"{{{ATOM}}}entry")


def test_a_feed_is_what_readers_expect():
    """Every element that RFC 4287 demands is there, once, and text is text."""
    root = parsed([a_post(updated_at=WALL + timedelta(hours=1)), a_post("s2")])

    assert root.tag == f"{{{ATOM}}}feed"
    assert at(root, "title")
    assert at(root, "updated") == "2026-11-21T10:00:00Z"
    [own] = [link for link in root.findall(f"{{{ATOM}}}link") if link.get("rel") == "self"]
    assert own.get("href") == "https://troop.example/api/feed.xml"
    first, second = entries(root)
    assert (at(first, "title"), at(first, "summary")) == ("AAPL: long", "It rose.")
    assert at(first, "content") == "<p>It <b>rose</b>.</p>"
    assert first.find(f"{{{ATOM}}}content").get("type") == "html"
    assert (at(first, "published"), at(first, "updated")) == ("2026-11-21T09:00:00Z", "2026-11-21T10:00:00Z")
    assert at(second, "updated") == "2026-11-21T09:00:00Z"
    assert first.find(f"{{{ATOM}}}category").get("term") == "signal"


def test_ids_of_entries_survive_a_change_of_address_and_of_text():
    """A reader that moved with us does not see old posts as new."""
    before = parsed([a_post(), a_post("s2")])
    after = parsed(
        [a_post(version=2, text=Text(title="x", summary="y", html="z")), a_post("s2")], public_url="https://b.example"
    )

    assert [at(e, "id") for e in entries(before)] == [at(e, "id") for e in entries(after)]
    assert at(before, "id") == at(after, "id")
    assert len({at(e, "id") for e in entries(before)}) == 2
    assert all(at(e, "id").startswith("urn:uuid:") for e in entries(before))


def test_an_empty_feed_is_a_feed():
    """Before the first post a reader gets a feed with nothing in it."""
    root = parsed([])

    assert entries(root) == []
    assert at(root, "updated") == "2026-11-21T09:00:00Z"


@given(title=hostile, summary=hostile, html=hostile)
def test_any_text_makes_a_well_formed_feed(title, summary, html):
    """Characters that no XML may hold are left out, all others come back as they were."""
    [entry] = entries(parsed([a_post(text=Text(title=title, summary=summary, html=html))]))

    for name, text in (("title", title), ("summary", summary), ("content", html)):
        kept = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)
        assert _lined(at(entry, name) or "") == _lined(kept)
