"""Who stands in which place where subscribers say what they want to hear."""

from collections.abc import Mapping

from alerts.adapters.directory import DocumentDirectory
from alerts.adapters.rule_documents import RuleDocuments
from alerts.logic.addresses import webhook_base
from alerts.logic.unsubscribing import UnsubscribeKeys
from alerts.ports import Channel
from alerts.rules import RuleService
from alerts.rules_functions import RulesWired
from alerts.trial import TrialMessages
from shared.audit import Audit
from shared.sealing import Sealer
from shared.wiring import Core


def wire_rules(
    core: Core, directory: DocumentDirectory, channels: Mapping[str, Channel], links: UnsubscribeKeys
) -> RulesWired:
    """
    Build what the endpoints of rules need, over the directory and the channels that deliver.

    Raises:
        ConfigurationError: ENDPOINT_KEYS cannot be read.

    """
    settings = core.settings
    book = RuleDocuments(
        core.documents,
        core.wall,
        Sealer(settings.endpoint_keys.get_secret_value()),
        on_change=directory.look_again,
    )
    tester = TrialMessages(directory=directory, channels=channels, wall=core.wall, market=core.market_clock)
    service = RuleService(
        book=book,
        wall=core.wall,
        market=core.market_clock,
        audit=Audit(core.documents, core.wall),
        links=links,
        tester=tester,
        channels=channels,
        webhook_base=webhook_base(settings.discord_webhook_url.get_secret_value()),
    )
    return RulesWired(rules=service)
