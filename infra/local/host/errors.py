"""What keeps a host from starting."""


class StartError(Exception):
    """One sentence for the person at the terminal: what is wrong and what to change."""

    def __init__(self, sentence: str, *, details: str = "") -> None:
        super().__init__(sentence)
        self.details = details
