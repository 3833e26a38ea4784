"""Limits of control groups, read from made-up files as kernels and containers show them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from flowprefill.config import GIB
from flowprefill.engine import cpu_device
from flowprefill.engine.control_groups import memory_left, usable_cores
from flowprefill.engine.cpu_device import CpuDevice, resolve_threads

V2_MOUNT = "24 23 0:20 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "3{n} 31 0:3{n} {top} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}\n"
OTHER_MOUNTS = (
    "22 1 8:1 / / rw shared:1 - ext4 /dev/root rw\n31 22 0:28 / /sys/fs/cgroup rw - tmpfs t rw\n"
)
UNLIMITED_V1 = "9223372036854771712\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def v2(root: Path, files: dict[str, str], own: str = "/") -> Path:
    mounts = OTHER_MOUNTS + V2_MOUNT
    write(root, {"proc/self/mountinfo": mounts, "proc/self/cgroup": f"0::{own}\n"})
    write(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    return root


def v1(root: Path, files: dict[str, str], own: str = "/", top: str = "/") -> Path:
    mounts = [V1_MOUNT.format(n=n, name=name, top=top) for n, name in enumerate(("cpu", "memory"))]
    groups = f"4:memory:{own}\n1:cpu,cpuacct:{own}\n0::/\n"
    hybrid = V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    write(root, {"proc/self/mountinfo": OTHER_MOUNTS + "".join(mounts) + hybrid})
    write(root, {"proc/self/cgroup": groups})
    write(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    return root


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [
        ("max 100000", 8), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1),
        ("1000 100000", 1), ("1600000 100000", 8), ("800000 100000", 8), ("799999 100000", 7),
        ("", 8), ("nonsense", 8), ("100000 0", 8), ("-1 100000", 8),
    ],
)  # fmt: skip
def test_quota_of_version_2(tmp_path: Path, cpu_max: str, cores: int) -> None:
    assert usable_cores(v2(tmp_path, {"cpu.max": cpu_max + "\n"})) == cores


def test_the_tightest_level_counts(tmp_path: Path) -> None:
    own = "/kubepods.slice/pod.slice/app.scope"
    root = v2(
        tmp_path,
        {
            "kubepods.slice/pod.slice/app.scope/cpu.max": "max 100000",
            "kubepods.slice/pod.slice/cpu.max": "300000 100000",
            "kubepods.slice/cpu.max": "600000 100000",
            "other.slice/cpu.max": "100000 100000",
            "kubepods.slice/pod.slice/memory.max": str(4 * GIB),
            "kubepods.slice/pod.slice/memory.current": str(1 * GIB),
            "kubepods.slice/memory.max": str(8 * GIB),
            "kubepods.slice/memory.current": str(7 * GIB),
        },
        own,
    )
    assert usable_cores(root) == 3
    assert memory_left(root) == 1 * GIB


@pytest.mark.parametrize(("own", "top"), [("/docker/a1", "/docker/a1"), ("/docker/a1", "/other")])
def test_container_that_sees_its_group_as_the_top(tmp_path: Path, own: str, top: str) -> None:
    root = v1(
        tmp_path, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, own, top
    )
    assert usable_cores(root) == 2


def test_version_1(tmp_path: Path) -> None:
    files = {
        "cpu/a b/cpu.cfs_quota_us": "150000\n",
        "cpu/a b/cpu.cfs_period_us": "50000\n",
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "memory/a b/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/a b/memory.usage_in_bytes": f"{GIB + 100}\n",
        "memory/a b/memory.stat": "cache 7\ntotal_inactive_file 60\ntotal_active_file 40\n",
        "memory/memory.limit_in_bytes": UNLIMITED_V1,
        "memory/memory.usage_in_bytes": "5\n",
    }
    root = v1(tmp_path, files, "/a b")
    assert usable_cores(root) == 3
    assert memory_left(root) == GIB


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, None),
        ({"memory.max": "max\n", "memory.current": "5\n"}, None),
        ({"memory.max": "1000\n", "memory.current": "400\n"}, 600),
        ({"memory.max": "1000\n"}, 1000),
        ({"memory.max": "max\n", "memory.high": "800\n", "memory.current": "400\n"}, 400),
        ({"memory.max": "1000\n", "memory.current": "1200\n"}, 0),
        (
            {
                "memory.max": "1000\n",
                "memory.current": "900\n",
                "memory.stat": "anon 100\ninactive_file 300\nactive_file 200\nshmem 300\n",
            },
            600,
        ),
        (
            {"memory.max": "1000\n", "memory.current": "9", "memory.stat": "inactive_file 90\n"},
            1000,
        ),
    ],
)
def test_memory_of_version_2(tmp_path: Path, files: dict[str, str], left: int | None) -> None:
    assert memory_left(v2(tmp_path, files)) == left


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert (usable_cores(tmp_path), memory_left(tmp_path)) == (8, None)
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": OTHER_MOUNTS})
    assert (usable_cores(tmp_path), memory_left(tmp_path)) == (8, None)


def test_threads_are_what_is_asked_for_else_what_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_device, "usable_cores", lambda: 3)
    assert (resolve_threads(0), resolve_threads(12)) == (3, 12)


@pytest.mark.parametrize(
    ("left", "cache_bytes"),
    [(None, GIB), (8 * GIB, GIB), (2 * GIB, GIB), (GIB, GIB // 2), (0, 0)],
)
def test_kv_cache_takes_half_of_what_is_left_at_most(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    left: int | None,
    cache_bytes: int,
) -> None:
    monkeypatch.setattr(cpu_device, "memory_left", lambda: left)
    with caplog.at_level(logging.INFO):
        assert CpuDevice.cache_bytes(object(), None) == cache_bytes  # type: ignore[arg-type]
    assert ("half of what the limit" in caplog.text) is (cache_bytes < GIB)
