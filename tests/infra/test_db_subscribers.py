"""`troop db import --subscribers`: who is taken, who is refused and why, and that an address is never seen."""

import asyncio
import base64
import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from alerts.adapters.directory import DocumentDirectory
from alerts.adapters.rule_documents import changed_since, revision_of
from alerts.models import Severity
from alerts.ports import Address
from alerts.subscriptions import Listener, Subscription
from infra.cli import app
from infra.db.subscribers import RefusedRowError, endpoint_id, subscription_id, wanted_of
from shared.adapters.sqlite import SQLiteDocuments
from shared.clock import SystemClock
from shared.documents import Document
from shared.events import fact_id
from shared.sealing import Sealer

KEY = "k1:" + base64.b64encode(bytes(range(32))).decode()
NEW_KEY = "k2:" + base64.b64encode(bytes(range(32, 64))).decode()
TOKEN = "sEcret_Token-" + "x7" * 28
WEBHOOK = f"https://discord.com/api/webhooks/123456789012345678/{TOKEN}"
HEADER = "subscriber,email,discord_webhook,symbols,entries,min_strength,severity"
ADA = f"ada,Ada.Lovelace@Example.COM,{WEBHOOK},aapl;MSFT,sma-10-30,0.25,critical"
BOB = "bob,bob@example.org,,all,,,"
PLAIN = {"subscriber": "ada", "email": "ada@example.com", "discord_webhook": "", "symbols": "all"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def store(folder: Path) -> Path:
    return folder / "app.db"


def troop(folder: Path, *rows: str, header: str = HEADER, keys: str = KEY, options: tuple[str, ...] = ()) -> Result:
    file = folder / "people.csv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    arguments = ["db", "import", "--subscribers", str(file), "--data", str(folder), *options]
    return CliRunner().invoke(app, arguments, env={"ENDPOINT_KEYS": keys, "COLUMNS": "200", "NO_COLOR": "1"})


def rules(store: Path) -> list[Document]:
    async def read() -> list[Document]:
        documents = SQLiteDocuments(store, SystemClock())
        found = await documents.feed("rules", limit=1000)
        await documents.close()
        return [document for document in found if document.partition != "_directory"]

    return asyncio.run(read())


def by_id(store: Path) -> dict[str, Document]:
    return {document.id: document for document in rules(store)}


def refused(folder: Path) -> list[dict[str, str]]:
    with (folder / "people.csv.refused.csv").open(newline="") as text:
        return list(csv.DictReader(text))


class TestTaken:
    def test_row_becomes_a_subscription_and_an_endpoint_a_channel(self, folder, store):
        """What was asked for is stored in the subscriber's own partition, under ids made of facts."""
        found = troop(folder, ADA)

        assert found.exit_code == 0, found.output
        assert "1 created, 0 replaced, 0 unchanged, 0 refused" in found.stdout
        stored = by_id(store)
        assert {d.partition for d in stored.values()} == {"ada"}
        assert stored.pop(fact_id("subscription", "ada")).body == {
            "kind": "subscription",
            "subscriber": "ada",
            "channels": ["email", "discord"],
            "symbols": ["AAPL", "MSFT"],
            "entries": ["sma-10-30"],
            "min_strength": 0.25,
            "severity": "critical",
        }
        sealer = Sealer(KEY)
        opened = {d.body["channel"]: sealer.open(d.body["sealed"], "ada", d.body["channel"]) for d in stored.values()}
        assert opened == {"email": "Ada.Lovelace@example.com", "discord": WEBHOOK}
        assert {d.body["shown"] for d in stored.values()} == {"A***@example.com", "webhook 123456789012345678/***"}

    def test_only_what_is_given_is_stored(self, folder, store):
        """One address is enough; all symbols and entries are the default, and info the severity."""
        assert troop(folder, BOB).exit_code == 0

        stored = by_id(store)
        assert set(stored) == {subscription_id("bob"), endpoint_id("bob", "email")}
        body = stored[subscription_id("bob")].body
        assert body["channels"] == ["email"]
        assert (body["symbols"], body["entries"], body["min_strength"], body["severity"]) == (None, None, 0.0, "info")

    def test_optional_columns_may_be_missing_and_the_order_is_free(self, folder, store):
        """A list from another system needs its header only."""
        found = troop(folder, "AAPL,ada,,ada@example.com", header="symbols,Subscriber,discord_webhook,EMAIL")

        assert found.exit_code == 0, found.output
        assert by_id(store)[subscription_id("ada")].body["symbols"] == ["AAPL"]

    def test_spreadsheets_way_of_writing_is_read(self, folder, store):
        """A byte order mark, CRLF, quoted fields and empty lines are no fault of the row."""
        file = folder / "people.csv"
        file.write_bytes(f'\ufeff{HEADER}\r\n\r\n"ada","ada@example.com","","AAPL, MSFT","","",""\r\n'.encode())

        found = CliRunner().invoke(
            app,
            ["db", "import", "--subscribers", str(file), "--data", str(folder)],
            env={"ENDPOINT_KEYS": KEY},
        )

        assert found.exit_code == 0, found.output
        assert by_id(store)[subscription_id("ada")].body["symbols"] == ["AAPL", "MSFT"]

    def test_second_import_changes_nothing(self, folder, store):
        """Sealing the same address gives another text each time, and yet nothing is written."""
        troop(folder, ADA, BOB)
        before = rules(store)

        found = troop(folder, ADA, BOB)

        assert found.exit_code == 0
        assert "0 created, 0 replaced, 2 unchanged" in found.stdout
        assert rules(store) == before

    def test_import_after_a_rotation_changes_nothing(self, folder, store):
        """A new key in front is no reason to write every address again."""
        troop(folder, ADA)
        before = rules(store)

        found = troop(folder, ADA, keys=f"{NEW_KEY},{KEY}")

        assert "1 unchanged" in found.stdout
        assert rules(store) == before

    def test_stored_subscriber_stays_unless_overwritten(self, folder, store):
        """What a subscriber changed since is not taken back by an old list; on demand the list wins, wholly."""
        troop(folder, ADA)
        before = rules(store)
        changed = "ada,new@example.com,,TSLA,,,"

        kept = troop(folder, changed)

        assert kept.exit_code == 1
        assert "line 2: subscriber: is stored with something else, which stays" in kept.stdout
        assert rules(store) == before

        replaced = troop(folder, changed, options=("--overwrite",))

        assert replaced.exit_code == 0
        stored = by_id(store)
        assert set(stored) == {subscription_id("ada"), endpoint_id("ada", "email")}
        assert stored[subscription_id("ada")].body["symbols"] == ["TSLA"]
        assert Sealer(KEY).open(stored[endpoint_id("ada", "email")].body["sealed"], "ada", "email") == "new@example.com"

    def test_same_subscriber_twice_in_one_list_is_told(self, folder, store):
        """Which of two rows is meant, a person must say."""
        found = troop(folder, BOB, "bob,bob@example.org,,AAPL,,,", BOB)

        assert found.exit_code == 1
        assert "line 3: subscriber: is stored with something else" in found.stdout
        assert "1 created, 0 replaced, 1 unchanged, 1 refused" in found.stdout
        assert by_id(store)[subscription_id("bob")].body["symbols"] is None

    def test_without_a_key_nothing_is_begun(self, folder, store):
        """No address is ever stored readable, so the import says how to make a key and stops."""
        found = troop(folder, ADA, keys="")

        assert found.exit_code == 1
        assert "openssl rand -base64 32" in found.stderr
        assert not store.exists()

    def test_lost_key_stops_the_import(self, folder, store):
        """Addresses that nobody can open are not silently written over."""
        troop(folder, ADA)
        before = rules(store)

        found = troop(folder, ADA, keys=NEW_KEY, options=("--overwrite",))

        assert found.exit_code == 1
        assert "key k1" in found.stderr
        assert rules(store) == before


class TestHeard:
    """What an import writes is what the directory of a running app reads."""

    def test_imported_subscriber_is_heard_and_reached(self, folder, store):
        """Subscription and addresses, with the defaults of everything the list does not know."""
        assert troop(folder, ADA, BOB).exit_code == 0

        async def look() -> tuple[Listener | None, Address | None, list[str]]:
            documents = SQLiteDocuments(store, SystemClock())
            directory = DocumentDirectory(documents, SystemClock(), Sealer(KEY))
            ada, address = await directory.listener("ada"), await directory.address("ada", "discord")
            everybody = [one.subscriber for one in await directory.listeners()]
            await documents.close()
            return ada, address, everybody

        ada, address, everybody = asyncio.run(look())

        assert sorted(everybody) == ["ada", "bob"]
        assert ada is not None
        assert ada.subscriptions == (
            Subscription(
                subscription_id=subscription_id("ada"),
                subscriber="ada",
                channels=("email", "discord"),
                symbols=frozenset({"AAPL", "MSFT"}),
                entries=frozenset({"sma-10-30"}),
                min_strength=0.25,
                severity=Severity.CRITICAL,
            ),
        )
        assert {channel: e.is_enabled for channel, e in ada.endpoints.items()} == {"email": True, "discord": True}
        assert address is not None
        assert address.value.get_secret_value() == WEBHOOK

    def test_import_is_seen_by_who_runs_and_one_that_changes_nothing_is_not(self, folder, store):
        """The count of changes names whom it was about."""

        def revision() -> Document | None:
            async def read() -> Document | None:
                documents = SQLiteDocuments(store, SystemClock())
                found = await revision_of(documents)
                await documents.close()
                return found

            return asyncio.run(read())

        troop(folder, ADA, "eve,nobody,,AAPL,,2,loud", BOB)
        first = revision()
        troop(folder, ADA, BOB)

        assert first is not None
        assert changed_since(first, 0) == {"ada", "bob"}
        assert revision() == first


class TestRefused:
    def test_every_refused_row_is_told_and_the_others_are_taken(self, folder, store):
        """Line, field and reason on the screen and in a file beside the list; the exit code tells of it."""
        found = troop(folder, ADA, "eve,nobody,,AAPL,,2,loud", BOB, "mallory,,,AAPL,,,")

        assert found.exit_code == 1
        assert "2 created, 0 replaced, 0 unchanged, 2 refused" in found.stdout
        assert {d.partition for d in rules(store)} == {"ada", "bob"}
        told = refused(folder)
        assert [(row["line"], row["field"]) for row in told] == [
            ("3", "email"),
            ("3", "min_strength"),
            ("3", "severity"),
            ("5", "email"),
        ]
        for row in told:
            assert f"line {row['line']}: {row['field']}: {row['reason']}" in found.stdout

    def test_report_goes_when_nothing_is_refused_any_more(self, folder):
        """A file that lists the refused is about the last import."""
        troop(folder, "eve,nobody,,AAPL,,,")
        assert refused(folder)

        troop(folder, "eve,eve@example.com,,AAPL,,,")

        assert not (folder / "people.csv.refused.csv").exists()

    def test_no_address_is_seen_anywhere(self, folder, store):
        """Not in what is printed, not in the report, not in the file of the store; even from columns that slipped."""
        rows = [
            ADA,
            f"{WEBHOOK},ada@private.example,,AAPL,,,",
            f"bob,{WEBHOOK},bob@private.example,AAPL,,,",
            f"cyd,cyd@private.example,{WEBHOOK}?wait=true,AAPL,,,",
            "dan,dan@private.example,,dan@private.example,dan@private.example|,dan@private.example,dan@private.example",
            f"eve,eve@private.example,{WEBHOOK},AAPL",
        ]

        found = troop(folder, *rows)

        assert found.exit_code == 1
        report = (folder / "people.csv.refused.csv").read_text()
        asyncio.run(_closed(store))
        raw = b"".join(file.read_bytes() for file in folder.glob("app.db*")).decode("latin-1")
        for seen in (found.output, report, raw):
            assert TOKEN not in seen
            assert "private.example" not in seen
            assert "Lovelace" not in seen
        assert {row["line"] for row in refused(folder)} == {"3", "4", "5", "6", "7"}

    def test_line_is_the_one_an_editor_shows(self, folder):
        """A field may hold a line break; the next row is counted from where it begins."""
        found = troop(folder, BOB, 'cyd,"cyd\n@example.com",,AAPL,,,', "eve,nobody,,AAPL,,,")

        assert found.exit_code == 1
        assert [row["line"] for row in refused(folder)] == ["3", "5"]

    def test_quote_that_is_never_closed_is_told(self, folder, store):
        """What it swallows cannot be read; what came before is stored."""
        found = troop(folder, BOB, 'cyd,"cyd@example.com,,AAPL,,,', ADA)

        assert found.exit_code == 1
        assert "line 3: row: cannot be read as CSV: look for a quote" in found.stdout
        assert {d.partition for d in rules(store)} == {"bob"}

    @pytest.mark.parametrize(
        "header",
        ["", "subscriber,email,symbols", f"{HEADER},phone", f"{HEADER},email", "ada,ada@example.com,,AAPL"],
        ids=["none", "missing", "strange", "twice", "no header"],
    )
    def test_other_header_is_refused_before_anything_is_stored(self, folder, header):
        """The wrong list is a slip of the hand; the answer shows the right header and not the line."""
        found = troop(folder, BOB, header=header)

        assert found.exit_code == 1
        assert "the first line must name the columns subscriber,email,discord_webhook,symbols" in found.stderr
        assert "ada@example.com" not in found.output

    def test_bytes_that_are_no_text_refuse_their_row(self, folder, store):
        """A list in another encoding loses the rows it spoils, and says which."""
        file = folder / "people.csv"
        rows = [HEADER.encode(), b"j\xfcrg,jurg@example.com,,AAPL,,,", BOB.encode()]
        file.write_bytes(b"\n".join(rows))

        found = CliRunner().invoke(
            app,
            ["db", "import", "--subscribers", str(file), "--data", str(folder)],
            env={"ENDPOINT_KEYS": KEY},
        )

        assert found.exit_code == 1
        assert "line 2: subscriber:" in found.stdout
        assert {d.partition for d in rules(store)} == {"bob"}


async def _closed(store: Path) -> None:
    """Everything in the file, nothing left in its log."""
    documents = SQLiteDocuments(store, SystemClock())
    await documents.feed("rules", limit=1)
    await documents.close()


class TestRow:
    def faults(self, **change: str) -> list[str]:
        try:
            wanted_of({**PLAIN, **change})
        except RefusedRowError as e:
            return [field for field, _ in e.faults]
        return []

    @pytest.mark.parametrize(
        "address",
        [
            "a@b.co",
            "o'neil+x@sub.example.com",
            "ada_l@example-1.org",
            "a" * 64 + "@example.com",
            "{x}@xn--bcher-kva.ch",
        ],
    )
    def test_addresses_that_mail_reaches_are_taken(self, address):
        """What RFC 5321 lets through without quotes."""
        assert self.faults(email=address) == []

    @pytest.mark.parametrize(
        "address",
        [
            "ada",
            "@example.com",
            "ada@",
            "ada@localhost",
            "ada@@example.com",
            "ada@example..com",
            ".ada@example.com",
            "ada.@example.com",
            "a..b@example.com",
            "ada@-example.com",
            "ada@example.com\nBcc: eve@example.com",
            "ada @example.com",
            "ada@exa mple.com",
            "Ada <ada@example.com>",
            "ada@example.com,eve@example.com",
            "ädä@example.com",
            "a" * 65 + "@example.com",
            "ada@" + "a" * 64 + ".com",
            "ada@" + "a." * 130 + "com",
            "ada@[127.0.0.1]",
        ],
    )
    def test_addresses_that_could_be_misread_are_refused(self, address):
        """One address, on one line, at a host with a domain."""
        assert self.faults(email=address) == ["email"]

    @pytest.mark.parametrize(
        "host", ["discord.com", "discordapp.com", "ptb.discord.com", "canary.discord.com", "DISCORD.com"]
    )
    @pytest.mark.parametrize("path", ["/api/webhooks", "/api/v10/webhooks"])
    def test_webhook_is_made_anew_from_id_and_token(self, host, path):
        """Of the given address nothing else is used: every one of Discord's own ends the same."""
        row = {**PLAIN, "discord_webhook": f"https://{host}{path}/123456789012345678/{TOKEN}"}

        assert wanted_of(row).addresses["discord"] == WEBHOOK

    @pytest.mark.parametrize(
        "url",
        [
            WEBHOOK.replace("https", "http"),
            WEBHOOK.replace("discord.com", "discord.com.evil.example"),
            WEBHOOK.replace("discord.com", "evil.example"),
            WEBHOOK.replace("discord.com", "127.0.0.1"),
            WEBHOOK.replace("https://discord.com", "http://127.0.0.1:7072/discord"),
            WEBHOOK.replace("discord.com", "discord.com@evil.example"),
            WEBHOOK.replace("discord.com", "evil.example@discord.com"),
            WEBHOOK.replace("discord.com", "discord.com:8443"),
            WEBHOOK.replace("discord.com", "discord.com."),
            WEBHOOK.replace("discord.com", "discord.com\\.evil.example"),
            WEBHOOK.replace("discord.com", "dis\tcord.com"),
            WEBHOOK.replace("discord.com", "d\u0131scord.com"),
            WEBHOOK.replace("/api", "/redirect?to=/api"),
            WEBHOOK.replace("/api", "/proxy/api"),
            WEBHOOK.replace("/api", "/%2e%2e/api"),
            WEBHOOK + "?wait=true",
            WEBHOOK + "#x",
            WEBHOOK + "/",
            WEBHOOK + "/github",
            WEBHOOK.replace("123456789012345678", "1234"),
            WEBHOOK.replace(TOKEN, "short"),
            WEBHOOK.replace("//", "///"),
            "discord.com/api/webhooks/123456789012345678/" + TOKEN,
            "javascript:alert(1)",
            "https://[::1",
        ],
    )
    def test_webhook_that_might_lead_elsewhere_is_refused(self, url):
        """Whatever is stored here is called later: it is Discord, or it is nothing."""
        assert self.faults(discord_webhook=url) == ["discord_webhook"]

    @given(data=st.data())
    def test_webhook_with_anything_put_in_is_discords_or_refused(self, data):
        """No text between, before or behind makes the app call another host."""
        at = data.draw(st.integers(0, len(WEBHOOK)))
        url = WEBHOOK[:at] + data.draw(st.text(max_size=6)) + WEBHOOK[at:]
        try:
            stored = wanted_of({**PLAIN, "discord_webhook": url.strip()}).addresses.get("discord", "")
        except RefusedRowError:
            return
        assert stored.startswith("https://discord.com/api/webhooks/")
        assert stored.count("/") == 6

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "public",
            "guest-1",
            "_directory",
            "a b",
            "a|b",
            "a/b",
            "a\\b",
            "a?b",
            "a#b",
            "a\x00b",
            "x" * 101,
            "\udcff",
            "a\u200bb",
        ],
    )
    def test_names_that_mean_something_else_are_refused(self, name):
        """A subscriber's name is a partition and a part of ids; the built-in ones are taken."""
        assert self.faults(subscriber=name) == ["subscriber"]

    @pytest.mark.parametrize(
        ("field", "values"),
        [
            ("symbols", ["", ",", "AAPL;no symbol here!", "A" * 16]),
            ("entries", [";", "a|b", "a\x07b"]),
            ("min_strength", ["-0.1", "1.1", "nan", "inf", "half"]),
            ("severity", ["loud", "critical!"]),
        ],
    )
    def test_what_cannot_be_meant_is_refused_by_field(self, field, values):
        """The reason names the column."""
        assert [self.faults(**{field: value}) for value in values] == [[field]] * len(values)
