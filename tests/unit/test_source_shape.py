"""Conventions of every source file: it says first what it is, and it stays small."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "flowprefill", "examples", "tests", "cmake")
COMMENT = {
    ".h": "//",
    ".cc": "//",
    ".cu": "//",
    ".cuh": "//",
    ".cmake": "#",
    ".py": ('"""', 'r"""', "#!"),
}
MAX_LINES = 400


def source_files() -> list[Path]:
    found = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in COMMENT)
    return sorted(p for p in found if p.stat().st_size > 0)


def has_head(path: Path) -> bool:
    """Tell whether the file has to say what it holds; x.cc leaves that to x.h, if any."""
    return path.suffix != ".cc" or not path.with_suffix(".h").exists()


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in source_files() if has_head(p)], ids=_relative)
def test_file_says_first_what_it_holds(path: Path) -> None:
    assert path.read_text().startswith(COMMENT[path.suffix])


@pytest.mark.parametrize("path", source_files(), ids=_relative)
def test_file_over_the_mark_says_why(path: Path) -> None:
    lines = path.read_text().splitlines()
    if len(lines) > MAX_LINES and "tests" not in path.parts:
        head = "\n".join(lines[:12])
        assert "Long because" in head, (
            f"{len(lines)} lines: split it, or say 'Long because ...' in its head"
        )
