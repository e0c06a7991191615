"""``python -m bench._up PORT DATA FOLDER BEGIN INSTANCES``: troop up for a benchmark, with nobody's limits."""

import asyncio
import sys
from pathlib import Path

from infra.local.up.replay import Wanted
from infra.local.up.supervisor import Options, Supervisor

NO_LIMIT = 1_000_000


def main() -> int:
    """Run until told to stop; the market stands still at BEGIN until its clock is moved."""
    port, data, folder, begin, instances = sys.argv[1:]
    wanted = Wanted(symbols=None, interval="1d", folder=Path(folder), first=begin, last=None, speed=0)
    options = Options(
        host="127.0.0.1",
        port=int(port),
        instances=int(instances),
        data=Path(data),
        live=False,
        replay=wanted,
        plan="unlimited",
        discord_limit=NO_LIMIT,
        quiet=True,
    )
    return asyncio.run(Supervisor(options).run())


if __name__ == "__main__":
    sys.exit(main())
