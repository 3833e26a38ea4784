"""The HTTP server: OpenAI-compatible endpoints over one engine."""

from __future__ import annotations
