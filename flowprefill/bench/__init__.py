"""Commands of ``flowprefill bench``: one module each, with ``add_arguments`` and ``run``."""

from __future__ import annotations
