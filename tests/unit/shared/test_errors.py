import inspect
import re
from datetime import timedelta

from shared import errors
from shared.errors import TransientError, TroopError


def drawn() -> dict[str, str]:
    """Child to parent, as the module's docstring draws the tree."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in inspect.getdoc(errors).splitlines():
        row = re.fullmatch(r" *(?:[+\-.] )?([A-Z]\w+Error)(?:  .*)?", line)
        if row is None:
            continue
        depth = row.start(1)
        above = [(column, name) for column, name in above if column < depth]
        found[row[1]] = above[-1][1] if above else "Exception"
        above.append((depth, row[1]))
    return found


def test_tree_is_the_one_drawn():
    """Who reads the drawing knows every error and its kind."""
    real = {
        name: cls.__base__.__name__
        for name, cls in vars(errors).items()
        if inspect.isclass(cls) and issubclass(cls, Exception)
    }

    assert drawn() == real


def test_every_error_says_what_it_means():
    """The docstring is the definition: an error without one could mean anything."""
    silent = [name for name in drawn() if not vars(errors)[name].__dict__.get("__doc__")]

    assert silent == []


def test_every_error_is_one_of_three_kinds():
    """Whoever catches the three kinds by name has caught everything of ours."""
    kinds = (errors.TransientError, errors.PermanentError, errors.ConfigurationError)

    for name in drawn():
        cls = vars(errors)[name]
        assert sum(issubclass(cls, kind) for kind in kinds) == (cls is not TroopError)


def test_transient_trouble_may_say_how_long():
    """A wait is told where it is known and left open where it is not."""
    told = errors.RateLimitedError("slow down", retry_after=timedelta(seconds=7))

    assert (str(told), told.retry_after) == ("slow down", timedelta(seconds=7))
    assert TransientError().retry_after is None
