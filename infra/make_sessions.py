"""
Writes shared/market/sessions.json, the exchange's session table, from exchange_calendars.

    make sessions                              write the file anew
    python infra/make_sessions.py --check      exit 1 and say so if the file would change

It runs in an environment of its own (requirements-sessions.txt): the app reads the file and never needs
exchange_calendars or pandas.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from datetime import date, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import exchange_calendars

TARGET = Path(__file__).resolve().parent.parent / "shared" / "market" / "sessions.json"
NAME = "XNYS"
ZONE = "America/New_York"
FIRST, LAST = date(1980, 1, 1), date(2035, 12, 31)

# exchange_calendars opens every day at 9:30; the exchange itself opened at 10:00 until 26 September 1985
# (the 27th was hurricane Gloria's, the 30th the first day of the longer hours).
HOURS = (
    (FIRST, time(10, 0), time(16, 0)),
    (date(1985, 9, 30), time(9, 30), time(16, 0)),
)


def table() -> dict[str, object]:
    """Build the whole content of the file."""
    schedule = exchange_calendars.get_calendar(NAME, start=FIRST.isoformat(), end=LAST.isoformat()).schedule
    zone = ZoneInfo(ZONE)
    sessions = {
        day.date(): (opens.astimezone(zone).time(), closes.astimezone(zone).time())
        for day, opens, closes in zip(schedule.index, schedule["open"], schedule["close"], strict=True)
    }
    if on_weekends := [day for day in sessions if day.weekday() >= 5]:
        raise SystemExit(f"the file knows no sessions on weekends, but there are: {on_weekends}")
    opens_by_default = HOURS[-1][1]
    closes_by_default = HOURS[-1][2]
    special_opens: dict[time, list[date]] = defaultdict(list)
    special_closes: dict[time, list[date]] = defaultdict(list)
    for day, (opens, closes) in sessions.items():
        if opens != opens_by_default:
            special_opens[opens].append(day)
        if closes != closes_by_default:
            special_closes[closes].append(day)
    days = (FIRST + timedelta(days=n) for n in range((LAST - FIRST).days + 1))
    holidays = [day for day in days if day.weekday() < 5 and day not in sessions]
    return {
        "name": NAME,
        "zone": ZONE,
        "source": f"exchange_calendars {exchange_calendars.__version__}",
        "first": FIRST.isoformat(),
        "last": LAST.isoformat(),
        "hours": [
            {"from": day.isoformat(), "open": _wall(opens), "close": _wall(closes)} for day, opens, closes in HOURS
        ],
        "holidays": _by_year(holidays),
        "special_opens": {_wall(at): _by_year(special_opens[at]) for at in sorted(special_opens)},
        "special_closes": {_wall(at): _by_year(special_closes[at]) for at in sorted(special_closes)},
    }


def _wall(at: time) -> str:
    return at.strftime("%H:%M")


def _by_year(days: Iterable[date]) -> dict[str, str]:
    years: dict[str, list[str]] = defaultdict(list)
    for day in days:
        years[f"{day.year}"].append(f"{day:%m-%d}")
    return {year: " ".join(found) for year, found in years.items()}


def main(arguments: list[str]) -> int:
    """Write or check the file; answers the exit code."""
    parser = argparse.ArgumentParser(description="Write the session table of the exchange.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file would change")
    checking = parser.parse_args(arguments).check
    text = json.dumps(table(), indent=1) + "\n"
    if checking:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
            print(
                f"{TARGET.name} is not what exchange_calendars {exchange_calendars.__version__} says: "
                "run make sessions and look at the difference",
                file=sys.stderr,
            )
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET.name}: {NAME} from {FIRST} to {LAST}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
