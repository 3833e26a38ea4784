"""Settings of all Python tests: reproducible hypothesis; GPU tests are skipped without a GPU."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The same examples everywhere and no time limit per example: no test depends on speed.
settings.register_profile("flowprefill", derandomize=True, deadline=None)
settings.load_profile("flowprefill")


def _cuda_devices() -> int:
    import torch  # only when a GPU test was collected: importing it takes seconds

    return torch.cuda.device_count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` or `multigpu` where the devices are missing."""
    wanted = {"gpu": 1, "multigpu": 2}
    marked = [(item, n) for item in items for m, n in wanted.items() if item.get_closest_marker(m)]
    found = _cuda_devices() if marked else 0
    for item, needed in marked:
        if found < needed:
            reason = f"needs {needed} CUDA device(s), found {found}"
            item.add_marker(pytest.mark.skip(reason=reason))
