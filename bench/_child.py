"""
One cold start, as a process of its own: ``python -m bench._child index|first|libraries APP [EVENT]``.

It writes ``done`` when it is where it was asked to get: the app in the folder APP is indexed, or its first
``signals_on_bars_ingested`` is answered. ``libraries`` writes what it had to load for that instead.
"""

import asyncio
import sys
from pathlib import Path

from infra.local.host.worker import Worker

OURS = {"alerts", "bench", "content", "function_app", "infra", "shared", "signals"}


async def run(goal: str, app: str, event: str) -> str:
    """Get to the goal and say what to write; raises RuntimeError when the function failed."""
    worker = await Worker.start(app)
    if goal == "index":
        return "done"
    outcome = await worker.invoke_event_grid("signals_on_bars_ingested", Path(event).read_text())  # noqa: ASYNC240
    if outcome.error is not None:
        raise RuntimeError(f"{outcome.error}\n{outcome.traceback}")
    return "done" if goal == "first" else " ".join(sorted(_libraries()))


def _libraries() -> set[str]:
    loaded = {name.partition(".")[0] for name in sys.modules}
    return {name for name in loaded - sys.stdlib_module_names - OURS if not name.startswith("_")}


if __name__ == "__main__":
    print(asyncio.run(run(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "")), flush=True)
