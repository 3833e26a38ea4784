"""The version, written here only; pyproject.toml, the CLI and the server read it."""

from __future__ import annotations

__version__ = "0.1.0"
