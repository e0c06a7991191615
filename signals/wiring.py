"""Who stands in which place in the signals domain."""

from dataclasses import dataclass

from shared.inbound import DeadLetters
from shared.wiring import Core
from signals.adapters.documents import SignalDocuments
from signals.adapters.entries_file import read_entries
from signals.logic.evaluation import Watcher
from signals.service import SignalService


@dataclass(frozen=True, slots=True, kw_only=True)
class Wired:
    """What the triggers need."""

    service: SignalService
    dead_letters: DeadLetters


def wire(core: Core) -> Wired:
    """
    Build the signals domain.

    Raises:
        ConfigurationError: the entries file is wrong.

    """
    time = core.settings.market_time()
    service = SignalService(
        market=core.market,
        signals=SignalDocuments(core.documents),
        publisher=core.publisher,
        watchers=[Watcher.of(entry) for entry in read_entries(core.settings.file(core.settings.entries_file))],
        wall=core.wall,
        speed=time.speed if time else 1.0,
    )
    return Wired(service=service, dead_letters=core.dead_letters)
