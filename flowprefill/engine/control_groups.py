"""What control groups (of containers, systemd) leave this process; the CPU device asks.

The kernel's counts of cores and of memory know nothing of these limits. Both versions of the
hierarchy are read, at every level from the process's own group up.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

SYSTEM = Path("/")
# "No limit" is a number in version 1: the largest multiple of a page. No machine has so much.
UNLIMITED_BYTES = 1 << 60


def usable_cores(root: Path = SYSTEM) -> int:
    """Return how many threads can compute all the time: the affinity, and no more than the quota.

    A quota of 2.5 cores is 2: the third thread would be stopped for half of each period, in the
    middle of a segment.

    Args:
        root: where /proc and /sys are found.
    """
    cores, quota = len(os.sched_getaffinity(0)), _quota(root)
    return cores if quota >= cores else max(math.floor(quota), 1)


def memory_left(root: Path = SYSTEM) -> int | None:
    """Return the bytes that may still be used before the group's limit; None without a limit.

    Cached files count as free, as the kernel gives them up first.
    """
    left = [
        *(_left(folder, _V2_MEMORY) for folder in _groups(root, "")),
        *(_left(folder, _V1_MEMORY) for folder in _groups(root, "memory")),
    ]
    known = [one for one in left if one is not None]
    return max(min(known), 0) if known else None


def _quota(root: Path) -> float:
    """Return the cores that the tightest quota is worth; inf without one."""
    quotas = [math.inf]
    for folder in _groups(root, ""):
        words = _read(folder / "cpu.max").split()  # "max 100000" or "150000 100000"
        quotas.append(_ratio(*words) if len(words) == 2 else math.inf)
    for folder in _groups(root, "cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quotas.append(_ratio(*(_read(folder / name).strip() for name in names)))
    return min(quotas)


def _ratio(quota: str, period: str) -> float:
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return math.inf  # "max", "-1", or no such file
    return int(quota) / int(period)


# The limits, what is used of them, and how memory.stat calls what of that is cached files.
_V2_MEMORY = (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1_MEMORY = (
    ("memory.limit_in_bytes",), "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)  # fmt: skip


def _left(folder: Path, names: tuple[tuple[str, ...], str, tuple[str, ...]]) -> int | None:
    """Return what the limit of one group leaves; None if it has none."""
    limit_names, used_name, cached_names = names
    limits = [_number(_read(folder / name)) for name in limit_names]
    limit = min((one for one in limits if one is not None), default=UNLIMITED_BYTES)
    if limit >= UNLIMITED_BYTES:
        return None
    stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if " " in line)
    cached = sum(_number(stat.get(name, "")) or 0 for name in cached_names)
    return limit - max((_number(_read(folder / used_name)) or 0) - cached, 0)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those above it.

    Args:
        root: where /proc and /sys are found.
        controller: of version 1; empty: version 2, which has one hierarchy for all.
    """
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, mounted = line.partition(" - ")
        kind, *rest = mounted.split() or [""]
        has_controller = bool(rest) and controller in rest[-1].split(",")
        is_wanted = (kind == "cgroup" and has_controller) if controller else kind == "cgroup2"
        path = _own_path(root, controller)
        if not is_wanted or path is None:
            continue
        top, at = (_unescaped(field) for field in fields.split()[3:5])
        # Inside a container the mount may start at the process's own group, by its outer name.
        inside = os.path.relpath(path, top) if Path(path).is_relative_to(top) else "."
        mount = root / at.lstrip("/")
        folder = mount / inside
        yield folder
        while folder != mount:
            folder = folder.parent
            yield folder
        return


def _own_path(root: Path, controller: str) -> str | None:
    """Return the path of this process's group, e.g. ``/system.slice/a.service``."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        is_it = controller in controllers.split(",") if controller else number == "0"
        if is_it:
            return path
    return None


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _read(path: Path) -> str:
    """Return a file's text, empty where there is none: not every kernel has every file."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
