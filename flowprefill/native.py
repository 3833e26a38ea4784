"""The native module `_core`, loaded after torch, whose libraries it links.

The rest of the package takes it from here. Where it came first, with torch 2.11 for CUDA 13.0 and
a GPU's driver, the import of torch that followed ended the process: SIGSEGV below pthread_once
in torch::get_symint_class().
"""

from __future__ import annotations

import torch  # noqa: F401

from flowprefill import _core

__all__ = ["_core"]
