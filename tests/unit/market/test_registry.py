"""What we believe of providers is data: complete, possible, and the same as the page that shows it."""

import tomllib
from datetime import timedelta

import pytest

from infra import providers_doc
from shared.errors import ConfigurationError
from shared.market.registry import FILE, Kind, provider, providers, read_registry, weight_of, windows_of

SECOND, MINUTE, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(days=1)

GOOD = """
[provider.p]
title = "P"
home = "https://example.com"
key_in = "header"
key_name = "X-Key"
stamps = "start"
adjustment = "raw"
quota_notes = "none"
sources = [{ what = "documents", read_on = 2026-11-01 }]
[provider.p.windows]
free = [{ amount = 8, span = "1 min", kind = "aligned", zone = "America/New_York" }]
premium = []
[provider.p.endpoints]
quote = { use_cases = ["quotes"], plans = ["free"], weight = 3 }
"""


def summary(name, plan):
    return [(w.amount, w.span, w.kind.value, w.is_weighted) for w in windows_of(name, plan)]


def test_documented_limits_of_free_keys():
    """Second, minute and day at once, as documented."""
    assert summary("alpha_vantage", "free") == [(1, SECOND, "unknown", True), (25, DAY, "unknown", True)]
    assert summary("finnhub", "free") == [(30, SECOND, "rolling", False), (60, MINUTE, "rolling", True)]
    assert summary("twelve_data", "free") == [(8, MINUTE, "aligned", True), (800, DAY, "aligned", True)]
    assert summary("polygon", "free") == [(5, MINUTE, "rolling", True)]


@pytest.mark.parametrize("name", providers())
def test_unlimited_plan_has_no_windows(name):
    """Only the replay sells it."""
    assert windows_of(name, "unlimited") == ()
    assert windows_of(name, "premium")


@pytest.mark.parametrize("name", providers())
def test_every_provider_sells_bars_and_quotes(name):
    """The two things a provider is for; an endpoint's weight is at least one."""
    facts = provider(name)

    sold = {use for endpoint in facts.endpoints.values() for use in endpoint.use_cases}
    assert {"daily bars", "quotes"} <= sold
    assert all(weight_of(name, endpoint) >= 1 for endpoint in facts.endpoints)


def test_keys_travel_in_headers_where_the_provider_takes_them():
    """Alpha Vantage alone takes it in the query only."""
    assert {name for name, facts in providers().items() if facts.key_in == "query"} == {"alpha_vantage"}


def test_unknown_names_are_named():
    """A typing error is found by its text."""
    with pytest.raises(ConfigurationError, match=r"'yahoo' is no provider: use one of alpha_vantage"):
        provider("yahoo")
    with pytest.raises(ConfigurationError, match=r"finnhub has no endpoint 'quotes': use one of quote, "):
        weight_of("finnhub", "quotes")


def test_a_registry_can_be_read():
    """What is not given has its default; spans are words."""
    [facts] = read_registry(GOOD).values()

    assert facts.name == "p"
    assert facts.windows["free"][0].span == MINUTE
    assert facts.windows["free"][0].kind is Kind.ALIGNED
    assert facts.endpoints["quote"].weight == 3


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[provider.p]", "[provider.p", "is no TOML"),
        (GOOD, "provider = 5", "cannot be used"),
        (GOOD, "[provider]\np = 5", "cannot be used"),
        (
            'span = "1 min"',
            'span = "1 fortnight"',
            r"provider.p.windows.free.0.span: .*'1 fortnight' is no span: write",
        ),
        ('span = "1 min"', 'span = "7 min"', "must fill a day without a rest"),
        ('span = "1 min"', 'span = "0 s"', "greater than"),
        ("America/New_York", "America/Gotham", "'America/Gotham' is no time zone"),
        ("amount = 8", "amount = 0", "provider.p.windows.free.0.amount"),
        ("amount = 8", "amuont = 8", "amuont"),
        ("weight = 3", "weight = 9", "a call of quote weighs 9, which no window of free can hold"),
        ('plans = ["free"]', 'plans = ["gratis"]', "provider.p.endpoints.quote.plans.0"),
        ("premium = []", "", "for the plans free and premium"),
        ('kind = "aligned"', 'kind = "sliding"', "provider.p.windows.free.0.kind"),
    ],
)
def test_what_cannot_be_is_refused_by_name(old, new, said):
    """The error says where and what to do."""
    with pytest.raises(ConfigurationError, match=said):
        read_registry(GOOD.replace(old, new))


def test_the_page_says_what_the_file_says(capsys):
    """docs/providers.md is generated: run python -m infra.providers_doc after a change."""
    assert providers_doc.main(["--check"]) == 0, capsys.readouterr().err

    page = providers_doc.PAGE.read_text(encoding="utf-8")
    for name, facts in tomllib.loads(FILE.read_text(encoding="utf-8"))["provider"].items():
        assert f"`{name}`" in page
        for endpoint in facts["endpoints"]:
            assert f"| `{endpoint}` |" in page


def test_a_page_that_is_out_of_date_is_noticed(tmp_path, monkeypatch, capsys):
    """The check fails and names the command; writing makes it true again."""
    monkeypatch.setattr(providers_doc, "PAGE", tmp_path / "providers.md")

    assert providers_doc.main(["--check"]) == 1
    assert "run python -m infra.providers_doc" in capsys.readouterr().err
    assert providers_doc.main([]) == 0
    assert providers_doc.main(["--check"]) == 0
