"""`.ci/debian-packages`: installs what is missing where it may, else says the one line to type."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Installs a compiler, all that a build lacks here; any header counts as there once it is.
APT_GET = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  *install*) test ! -e "$CALLS.old-lists" || exit 100; printf '#!/bin/sh\\n' > "$BIN/g++"; chmod +x "$BIN/g++" ;;
  *update*) rm -f "$CALLS.old-lists" ;;
esac
"""  # noqa: E501


class Machine:
    """A PATH of its own with a Python that has all it needs, without compiler and git."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls = folder / "calls"
        for name in ("bash", "sh", "env", "xargs", "echo", "rm", "chmod"):
            (self.bin / name).symlink_to(shutil.which(name) or name)
        self.program("python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        self.program("apt-get", APT_GET)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, purpose: str, user: int) -> subprocess.CompletedProcess[str]:
        self.program("id", f"#!/bin/sh\necho {user}\n")
        return subprocess.run(
            [str(ROOT / ".ci" / "debian-packages"), purpose],
            env={"PATH": str(self.bin), "CALLS": str(self.calls), "BIN": str(self.bin)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def apt_calls(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("purpose", "packages"),
    [
        ("build", "g++"),
        ("test", "g++ libgtest-dev"),
        ("lint", "g++ git"),
        ("aarch64", "g++ libgtest-dev g++-aarch64-linux-gnu qemu-user"),
    ],
)
def test_user_without_rights_gets_one_line_to_type(
    machine: Machine, purpose: str, packages: str
) -> None:
    done = machine.run(purpose, user=1000)
    assert done.returncode == 1
    assert done.stderr == f"Debian packages are missing. Run: sudo apt-get install {packages}\n"
    assert machine.apt_calls() == []


def test_sudo_that_asks_for_a_password_counts_as_no_right(machine: Machine) -> None:
    machine.program("sudo", "#!/bin/sh\nexit 1\n")
    assert machine.run("build", user=1000).returncode == 1
    assert machine.apt_calls() == []


def test_sudo_without_a_password_installs(machine: Machine) -> None:
    machine.program("sudo", '#!/bin/sh\nshift  # -n\nexec "$@"\n')
    machine.program("true", "#!/bin/sh\n")
    done = machine.run("build", user=1000)
    assert done.returncode == 0, done.stderr
    assert machine.apt_calls() == ["-q install -y --no-install-recommends g++"]


def test_root_installs_with_fresh_lists_if_the_first_try_fails(machine: Machine) -> None:
    Path(f"{machine.calls}.old-lists").touch()
    done = machine.run("test", user=0)
    assert done.returncode == 0, done.stderr
    install = "-q install -y --no-install-recommends g++ libgtest-dev"
    assert machine.apt_calls() == [install, "-q update", install]


def test_machine_with_everything_asks_for_nothing(machine: Machine) -> None:
    machine.program("g++", "#!/bin/sh\n")
    done = machine.run("test", user=1000)
    assert (done.returncode, done.stderr) == (0, "")


def test_package_that_does_not_help_is_named(machine: Machine) -> None:
    machine.program("apt-get", "#!/bin/sh\n")
    done = machine.run("build", user=0)
    assert done.returncode == 1
    assert "still lacks g++" in done.stderr
