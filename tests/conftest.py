"""Settings of all Python tests: reproducible hypothesis; GPU tests are skipped without a GPU."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, settings

# The same examples everywhere and no time limit, neither for an example nor for making the first
# ten (a second, else): no test depends on speed.
settings.register_profile(
    "flowprefill",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("flowprefill")

GPUS_NEEDED = {"gpu": 1, "multigpu": 2}  # by marker


@cache
def _missing_gpus(needed: int) -> str:
    """Return why there are fewer GPUs than this that the engine can use; "" if there are enough."""
    from flowprefill.engine.device_choice import cuda_module  # only where a GPU test was collected

    module, reason = cuda_module()
    if module is None:
        return f"no GPU: {reason}"
    answers = [module.availability(index) for index in range(max(module.device_count(), 1))]
    num_usable = sum(is_usable for is_usable, _ in answers)
    if num_usable >= needed:
        return ""
    reasons = "; ".join(about for is_usable, about in answers if not is_usable)
    return f"needs {needed} GPUs, found {num_usable}{': ' if reasons else ''}{reasons}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` or `multigpu`, before their fixtures, where devices are missing."""
    for marker, needed in GPUS_NEEDED.items():
        if item.get_closest_marker(marker) and (reason := _missing_gpus(needed)):
            pytest.skip(reason)
