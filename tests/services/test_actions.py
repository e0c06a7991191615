from dataclasses import replace
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import StoppedClock
from shared.market.actions import (
    Actions,
    Provenance,
    contradiction,
    disbelief,
    may_be_split,
    splits_of,
    with_marks,
    with_splits,
)
from shared.market.models import Adjustment, Columns, CorporateAction, Interval, minute_of
from shared.market.stores import Series
from tests.builders import CLOSE, WALL, bars_closing_at, closes_from, daily_bars, documents

BARS = daily_bars(20)
CLOSES = [bar.closed_at for bar in BARS]
DAYS = [closed_at.date() for closed_at in CLOSES]
RAW, SPLIT = Adjustment.RAW, Adjustment.SPLIT


def scaled(bars, factor):
    return [
        replace(b, open=b.open * factor, high=b.high * factor, low=b.low * factor, close=b.close * factor) for b in bars
    ]


def an_action(day, *, split=1.0, dividend=0.0, provider="alpha_vantage"):
    return CorporateAction(symbol="AAPL", day=day, split=split, dividend=dividend, provider=provider)


class TestContradiction:
    HELD = Columns.of(BARS[:3])

    def test_same_bars_contradict_nothing(self):
        """Bars that are not held are no matter of it."""
        assert contradiction(self.HELD, BARS) is None
        assert contradiction(self.HELD, BARS[5:]) is None
        assert contradiction(Columns(), BARS) is None

    @pytest.mark.parametrize(("relative", "is_told"), [(9e-7, False), (2e-6, True)])
    def test_close_is_compared_to_the_last_cent(self, relative, is_told):
        """One millionth is rounding; the text names the bar and both values."""
        changed = replace(BARS[1], close=BARS[1].close * (1 + relative))
        why = contradiction(self.HELD, [BARS[0], changed])
        assert bool(why) is is_told
        if why:
            assert f"{DAYS[1]}" in why
            assert "101" in why

    @pytest.mark.parametrize(
        ("volume", "is_told"), [(1999.0, False), (2001.0, True), (501.0, False), (499.0, True), (0.0, True)]
    )
    def test_volume_that_is_far_off_is_told(self, volume, is_told):
        """Late trades add to a volume; twice of it or half is something else."""
        assert bool(contradiction(self.HELD, [replace(BARS[2], volume=volume)])) is is_told

    def test_no_volume_twice_is_the_same(self):
        """A minute without trades stays one."""
        quiet = replace(BARS[0], volume=0.0)
        assert contradiction(Columns.of([quiet]), [quiet]) is None

    def test_bars_of_another_provider_are_compared_roughly(self):
        """Through the minute at which the provider changed, a thousandth and any volume pass; after it they do not."""
        roughly = [replace(b, close=b.close * 1.0009, volume=9.0) for b in BARS[:3]]
        through = minute_of(CLOSES[1])
        assert contradiction(self.HELD, roughly[:2], rounded_through=through) is None
        assert contradiction(self.HELD, roughly, rounded_through=through)
        assert contradiction(self.HELD, scaled(BARS[:1], 1.002), rounded_through=through)


class TestDisbelief:
    HELD = Columns.of(BARS)

    @pytest.mark.parametrize("adjustment", Adjustment)
    def test_correction_is_believed(self, adjustment):
        """Up to half of the bars may change."""
        fresh = [*scaled(BARS[:10], 1.2), *BARS[10:]]
        assert disbelief(self.HELD, Columns.of(fresh), [], adjustment) is None
        assert disbelief(self.HELD, Columns.of([*scaled(BARS[:3], 1.3), *fresh[3:]]), [], adjustment) is None

    @given(factor=st.sampled_from([2.0, 3.0, 7.0, 20.0, 1.5, 0.1]), at=st.integers(min_value=11, max_value=19))
    def test_split_is_believed_of_adjusted_prices_only(self, factor, at):
        """All prices before it are divided by its factor, told or not; of prices as traded that cannot be."""
        fresh = Columns.of([*scaled(BARS[:at], 1 / factor), *BARS[at:]])
        told = [(DAYS[at], factor)]
        assert disbelief(self.HELD, fresh, told, SPLIT) is None
        assert disbelief(self.HELD, fresh, [], SPLIT) is None
        assert "prices as traded do not change" in disbelief(self.HELD, fresh, told, RAW)

    def test_two_splits_are_believed_when_they_are_told(self):
        """Two factors in one history are explained by two splits, and by nothing else."""
        fresh = Columns.of([*scaled(BARS[:8], 1 / 6), *scaled(BARS[8:16], 1 / 2), *BARS[16:]])
        assert disbelief(self.HELD, fresh, [(DAYS[8], 3.0), (DAYS[16], 2.0)], SPLIT) is None
        assert "no split explains" in disbelief(self.HELD, fresh, [(DAYS[8], 3.0)], SPLIT)
        assert "no split explains" in disbelief(self.HELD, fresh, [], SPLIT)

    def test_shorter_history_is_not_believed(self):
        """It has to reach as far as what is held; only prices as traded may begin later."""
        assert disbelief(self.HELD, Columns.of(BARS[:-1]), [], RAW) == "it ends before what is stored"
        assert disbelief(self.HELD, Columns(), [], SPLIT) == "it ends before what is stored"
        assert disbelief(self.HELD, Columns.of(BARS[1:]), [], SPLIT) == "it begins after what is stored"
        assert disbelief(self.HELD, Columns.of(BARS[1:]), [], RAW) is None

    def test_history_of_other_instants_is_not_believed(self):
        """Without a bar in common nothing can be compared."""
        later = Columns.of(daily_bars(30)[20:])
        assert "none of the bars" in disbelief(self.HELD, later, [], RAW)

    def test_of_a_few_bars_nothing_is_said(self):
        """Two of three corrected bars are a young series, not another one."""
        held, fresh = Columns.of(BARS[:3]), Columns.of([*scaled(BARS[:2], 1.1), BARS[2]])
        assert disbelief(held, fresh, [], RAW) is None


class TestSplits:
    def halved(self, at):
        """Prices as traded around a split of two for one, which the provider does not mark."""
        return [*BARS[:at], *scaled(BARS[at:], 0.5)]

    def test_split_is_marked_on_the_first_bar_in_new_shares(self):
        marked = with_splits(self.halved(7), [(DAYS[7], 2.0)])
        assert [b.split for b in marked] == [2.0 if i == 7 else 1.0 for i in range(20)]

    def test_split_of_a_day_without_a_bar_is_marked_on_the_next(self):
        """A session the provider left out; a split on a weekend."""
        bars = [b for i, b in enumerate(self.halved(7)) if i != 7]
        assert [b.split for b in with_splits(bars, [(DAYS[7], 2.0)])].index(2.0) == 7

    def test_mark_of_the_provider_stays(self):
        """What it marked itself is not counted twice."""
        bars = self.halved(7)
        bars[7] = replace(bars[7], split=2.0)
        assert with_splits(bars, [(DAYS[7], 2.0)]) == bars

    @pytest.mark.parametrize("off", [-1, 1])
    def test_split_whose_day_is_off_by_one_is_not_marked_again(self, off):
        """Sellers disagree on the day; where the price does not show it, there was none."""
        bars = self.halved(7)
        bars[7] = replace(bars[7], split=2.0)
        assert with_splits(bars, [(DAYS[7 + off], 2.0)]) == bars

    def test_reverse_split_and_a_small_one(self):
        """One for ten, and eleven for ten, are marked as well."""
        bars = [*BARS[:5], *scaled(BARS[5:12], 10), *scaled(BARS[12:], 10 / 1.1)]
        marked = with_splits(bars, [(DAYS[5], 0.1), (DAYS[12], 1.1)])
        assert [b.split for b in marked if b.split != 1.0] == [0.1, 1.1]

    def test_split_before_or_behind_all_bars_marks_none(self):
        long_ago, some_day = date(2000, 6, 21), date(2099, 1, 5)
        assert with_splits(BARS, [(long_ago, 2.0), (some_day, 2.0)]) == BARS
        assert with_splits([], [(long_ago, 2.0)]) == []

    def test_answer_that_begins_in_the_middle_of_the_session_marks_none(self):
        """Its first bar of new shares is not among them."""
        hours = bars_closing_at(closes_from(CLOSE - timedelta(hours=5, minutes=30), 7, interval=Interval.HOUR))
        hours[0] = replace(hours[0], opened_at=hours[0].closed_at - timedelta(hours=1))
        assert with_splits(hours, [(CLOSE.date(), 2.0)])[0].split == 2.0
        assert with_splits(hours[1:], [(CLOSE.date(), 2.0)])[0].split == 1.0

    def test_marks_that_are_held_are_kept(self):
        """On the same bar only: one that is another now may have another past."""
        held = Columns.of([replace(b, split=3.0) if i in (4, 6) else b for i, b in enumerate(BARS)])
        fresh = [*BARS[:6], *scaled(BARS[6:], 2)]
        assert [i for i, b in enumerate(with_marks(held, fresh)) if b.split == 3.0] == [4]

    @pytest.mark.parametrize(("open", "may"), [(0.97, False), (1.03, False), (0.95, True), (1.06, True)])
    def test_session_that_opens_far_away_may_be_split(self, open, may):
        """Four hundredths overnight are enough to look whether we were told of a split."""
        price = BARS[4].close * open
        bars = [*BARS[:5], *scaled(BARS[5:6], price / BARS[5].open)]
        assert may_be_split(bars, since=None) is may
        assert may_be_split(bars, since=CLOSES[4]) is may
        assert may_be_split(bars, since=CLOSES[5]) is False
        assert may_be_split([*bars[:5], replace(bars[5], split=2.0)], since=None) is False

    def test_dividends_are_no_splits(self):
        assert splits_of([an_action(DAYS[3], dividend=0.5), an_action(DAYS[1], split=2.0)]) == [(DAYS[1], 2.0)]


@pytest.fixture
async def store():
    store = documents()
    yield store
    await store.close()


class TestActions:
    async def test_what_was_told_is_kept(self, store):
        """Oldest first; nothing where nobody was asked."""
        actions = Actions(store, StoppedClock(WALL))
        split, paid = an_action(DAYS[5], split=2.0), an_action(DAYS[1], dividend=0.42)
        assert await actions.get("AAPL") == []
        assert await actions.keep("AAPL", [split, paid]) == [paid, split]
        assert await Actions(store, StoppedClock(WALL)).get("AAPL") == [paid, split]
        assert await actions.get("IBM") == []

    async def test_later_word_on_a_day_counts_and_others_are_kept(self, store):
        """One provider knows ten years, another two: the union is known."""
        actions = Actions(store, StoppedClock(WALL))
        await actions.keep("AAPL", [an_action(DAYS[1], split=2.0), an_action(DAYS[5], split=3.0)])
        corrected = an_action(DAYS[5], split=4.0, provider="polygon")
        assert await actions.keep("AAPL", [corrected]) == [an_action(DAYS[1], split=2.0), corrected]

    async def test_same_again_writes_nothing(self, store):
        wall = StoppedClock(WALL)
        await Actions(store, wall).keep("AAPL", [an_action(DAYS[1], split=2.0)])
        before = await store.feed("quota")
        wall.at += timedelta(days=1)
        assert await Actions(store, wall).keep("AAPL", [an_action(DAYS[1], split=2.0)])
        assert await store.feed("quota") == before


class TestProvenance:
    SERIES = Series(symbol="AAPL", interval=Interval.DAY, live_from=CLOSE, provider="alpha_vantage")

    async def record(self, provenance, series, kind, *, provider="alpha_vantage", revision=0, n=5):
        await provenance.record(
            series,
            kind=kind,
            provider=provider,
            revision=revision,
            through=CLOSES[n],
            occurred_at=CLOSES[n + 1],
            reason="for the test",
            splits=[(DAYS[2], 2.0)],
        )

    async def test_changes_are_told_in_order_with_who_when_and_why(self, store):
        provenance = Provenance(store, StoppedClock(WALL))
        await self.record(provenance, self.SERIES, "revision", revision=1)
        revised = replace(self.SERIES, revision=1)
        await self.record(provenance, revised, "provider", provider="polygon", revision=1, n=8)
        moved = replace(revised, provider="polygon")
        first, second = await Provenance(store, StoppedClock(WALL)).of(moved)
        assert (first.kind, first.revision, first.splits) == ("revision", 1, [(DAYS[2], 2.0)])
        assert (second.former, second.provider) == ("alpha_vantage", "polygon")
        assert (second.through, second.occurred_at, second.recorded_at) == (CLOSES[8], CLOSES[9], WALL)
        assert await provenance.rounded_through(moved) == minute_of(CLOSES[8])

    async def test_change_that_was_not_made_is_not_told(self, store):
        """The process died between writing it down and doing it: the series shows that."""
        provenance = Provenance(store, StoppedClock(WALL))
        await self.record(provenance, self.SERIES, "provider", provider="polygon")
        await self.record(provenance, self.SERIES, "revision", revision=1)
        assert await provenance.of(self.SERIES) == []
        assert await provenance.rounded_through(self.SERIES) == -1

        await self.record(provenance, self.SERIES, "provider", provider="finnhub", n=9)
        moved = replace(self.SERIES, provider="finnhub", revision=1)
        assert [(c.kind, c.provider) for c in await provenance.of(moved)] == [("provider", "finnhub")]

    async def test_back_and_forth(self, store):
        """A series that came home has moved twice."""
        provenance = Provenance(store, StoppedClock(WALL))
        await self.record(provenance, self.SERIES, "provider", provider="polygon")
        there = replace(self.SERIES, provider="polygon")
        await self.record(provenance, there, "provider", provider="alpha_vantage", n=9)
        assert [c.provider for c in await provenance.of(self.SERIES)] == ["polygon", "alpha_vantage"]
        assert await provenance.rounded_through(self.SERIES) == minute_of(CLOSES[9])

    async def test_newest_fifty_are_kept(self, store):
        provenance = Provenance(store, StoppedClock(WALL))
        for revision in range(1, 61):
            series = replace(self.SERIES, revision=revision - 1)
            await self.record(provenance, series, "revision", revision=revision)
        found = await provenance.of(replace(self.SERIES, revision=60))
        assert [c.revision for c in found] == list(range(11, 61))
