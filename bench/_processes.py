"""What Linux tells of processes: who is whose child, how much memory it ever held, what it computed."""

import os
from pathlib import Path

PROC = Path("/proc")


def children(pid: int, argument: str) -> list[int]:
    """The living children of a process that were started with *argument*."""
    found = []
    for folder in PROC.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and argument in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue  # it ended in between
    return found


def peak_mb(pid: int) -> float:
    """The most memory a process ever held, in MB; 0 when it is gone."""
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def cpu_seconds(pid: int) -> float:
    """How long a process has computed; 0 when it is gone."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
