"""`python -m flowprefill` is the command `flowprefill`."""

from __future__ import annotations

import sys

from flowprefill.cli import main

sys.exit(main())
