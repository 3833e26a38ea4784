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


@cache
def _why_no_gpu() -> str:
    """Return why there is no GPU that the engine can use; "" if there is one."""
    from flowprefill.engine.device_choice import cuda_module  # only where a GPU test was collected

    module, reason = cuda_module()
    if module is None:
        return f"no GPU: {reason}"
    answers = [module.availability(index) for index in range(max(module.device_count(), 1))]
    if any(is_usable for is_usable, _ in answers):
        return ""
    return "no GPU: " + "; ".join(about for _, about in answers)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu`, before their fixtures, where there is none."""
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
        pytest.skip(reason)
