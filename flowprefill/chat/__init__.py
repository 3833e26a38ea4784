"""`flowprefill chat`: a conversation in the terminal, with a server or with a model loaded here."""

from __future__ import annotations
