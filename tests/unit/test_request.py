"""Request, SLO and SamplingParams refuse what is of another type: later it would cost others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flowprefill import SLO, Request, SamplingParams
from flowprefill.errors import InvalidRequest


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (lambda value: Request([1], id=value), "id", 7),
        (lambda value: Request([1], tenant=value), "tenant", None),
        (lambda value: Request([1], client=value), "client", ["a"]),  # unhashable
        (lambda value: Request([1], value), "sampling", None),
        (lambda value: SLO(service_class=value), "slo.service_class", None),
        (lambda value: SamplingParams(stop=value), "stop", "END"),
        (lambda value: SamplingParams(stop=value), "stop", None),
    ],
)
def test_field_of_another_type_is_named(
    make: Callable[[Any], object], field: str, value: object
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: got") as caught:
        make(value)
    assert caught.value.param == field
