"""Models named as on the Hugging Face hub, found where its tools keep downloads; by registry.

Nothing is downloaded: a model that is not there is an error with the command that fetches it. The
layout is that of huggingface_hub: ``models--ORG--NAME/refs/main`` holds a commit,
``models--ORG--NAME/snapshots/COMMIT`` the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flowprefill.errors import CheckpointError
from flowprefill.models.gguf_parts import ggufs_of, part_names
from flowprefill.models.json_file import read_json

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_NAME = re.compile(
    rf"(?P<repo>{_WORD}/{_WORD})(?P<file>(/{_WORD})+\.gguf)?(@(?P<revision>{_WORD}(/{_WORD})*))?"
)
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the hub.

    Attributes:
        repo: ``ORG/NAME``.
        file: one GGUF of it; empty: the whole.
        revision: branch, tag or commit.
    """

    repo: str
    file: str = ""
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """Read ``ORG/NAME``, ``ORG/NAME/FILE.gguf``, each perhaps with ``@REVISION``; else None."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        return cls(match["repo"], (match["file"] or "").lstrip("/"), match["revision"] or "main")

    @property
    def command(self) -> str:
        """What downloads it."""
        parts = ["hf download", self.repo, self.file]
        if self.revision != "main":
            parts.append(f"--revision {self.revision}")
        return " ".join(part for part in parts if part)


def hub_cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the hub's tools keep what they download."""
    places = {
        "HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": "", "HF_HOME": "hub",
        "XDG_CACHE_HOME": "huggingface/hub",
    }  # fmt: skip
    given = next((name for name in places if environment.get(name)), "")
    place = environment.get(given) or "~/.cache"
    # As the hub's tools do it: a home that is not known stays as it is written.
    text = os.path.expandvars(os.path.expanduser(place))  # noqa: PTH111
    return Path(text) / places.get(given, "huggingface/hub")


def find_in_hub_cache(name: HubName) -> Path:
    """Return the folder or GGUF file of a downloaded model.

    Raises:
        CheckpointError: it is not there, or not all of it; says which command downloads it.
    """
    cache = hub_cache_folder()
    snapshot = _snapshot(cache / f"models--{name.repo.replace('/', '--')}", name.revision)
    if snapshot is None:
        what = f"model: {name.repo!r} is no path, and not in the hub's cache {cache}"
        raise CheckpointError(f"{what}; to download it, run: {name.command}", param="model")
    missing = _missing_file(snapshot, name)
    if missing is not None:
        what = f"model {name.repo}: {snapshot / missing} is missing"
        name = replace(name, file=missing) if name.file else name
        raise CheckpointError(f"{what}; to download it, run: {name.command}", param="model")
    return snapshot / name.file if name.file else snapshot


def _snapshot(folder: Path, revision: str) -> Path | None:
    """Return the folder of a revision; with a single one downloaded, "main" is that one."""
    commit = revision
    try:
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip() or revision
    except (OSError, UnicodeDecodeError):
        pass
    snapshots = folder / "snapshots"
    if "/" not in commit and (snapshots / commit).is_dir():
        return snapshots / commit
    found = sorted(snapshots.glob("*")) if revision == "main" else []
    return found[0] if len(found) == 1 and found[0].is_dir() else None


def _missing_file(snapshot: Path, name: HubName) -> str | None:
    """Name a file that loading needs and that was not downloaded."""
    if name.file:
        folder = Path(name.file).parent
        parts = [str(folder / part) for part in part_names(Path(name.file))]
        return next((part for part in parts if not (snapshot / part).is_file()), None)
    ggufs = ggufs_of(snapshot)
    if ggufs:
        return next((path.name for path in ggufs if not path.is_file()), None)
    needed = ["config.json", "tokenizer.json"]
    if (snapshot / _INDEX).is_file() and not (snapshot / "model.safetensors").is_file():
        weight_map = read_json(snapshot / _INDEX).get("weight_map")
        needed += sorted(map(str, weight_map.values())) if isinstance(weight_map, dict) else []
    else:
        needed.append("model.safetensors")
    return next((file for file in needed if not (snapshot / file).is_file()), None)
