"""Why a signal was raised, in one sentence for people. Pure."""

from signals.models import Opinion


def why(title: str, said: Opinion) -> str:
    """What the strategy says and when it says so (*title*), and the numbers it saw."""
    saw = ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in said.features.items())
    return f"{said.direction.capitalize()}, because {title.rstrip('.')}{f' ({saw})' if saw else ''}."
