"""VirtualDevice: one run at a time, suspended at boundaries only, every second accounted for."""

from __future__ import annotations

import pytest

from flowprefill.simulation.device import VirtualDevice, VirtualRun


def make_run(run_id: int, seconds: float, segments: int = 4) -> VirtualRun:
    bounds = [(i + 1) / segments for i in range(segments)]
    return VirtualRun(run_id, seconds, lambda: bounds)


def test_device_undisturbed_run_ends_after_its_time() -> None:
    device, run = VirtualDevice(), make_run(1, 4.0)
    assert device.dispatch(run, 10.0)
    assert device.next_s == 14.0
    assert device.advance(12.0) is None
    assert device.advance(14.0) == ("finished", run)
    assert (run.state, run.executed_s, device.busy_s) == ("finished", 4.0, 4.0)
    assert device.next_s == float("inf")
    assert not device.dispatch(run, 15.0), "it has ended"


def test_device_dispatch_of_another_takes_effect_at_the_next_boundary() -> None:
    device, long, short = VirtualDevice(), make_run(1, 4.0), make_run(2, 1.0)
    device.dispatch(long, 0.0)
    device.dispatch(short, 1.5)
    assert device.next_s == 2.0
    assert device.advance(2.0) == ("suspended", long)
    assert (device.current, device.next_s) == (short, 3.0)
    assert device.blocking_s == [0.5]
    assert short.blocking_s == 0.5
    assert device.advance(3.0) == ("finished", short)
    device.dispatch(long, 3.5)
    assert device.advance(5.5) == ("finished", long)
    assert (long.preemptions, long.suspended_s, long.executed_s) == (1, 1.5, 4.0)


@pytest.mark.parametrize("at_s", [0.0, 1.0])
def test_device_at_a_boundary_the_segment_that_begins_there_goes_first(at_s: float) -> None:
    device = VirtualDevice()
    device.dispatch(make_run(1, 4.0), 0.0)
    device.dispatch(make_run(2, 1.0), at_s)
    assert device.next_s == at_s + 1.0


def test_device_dispatch_of_the_current_run_takes_a_suspension_back() -> None:
    device, long, short = VirtualDevice(), make_run(1, 4.0), make_run(2, 1.0)
    device.dispatch(long, 0.0)
    device.dispatch(short, 0.5)
    device.dispatch(long, 0.7)
    assert device.next_s == 4.0
    assert device.advance(4.0) == ("finished", long)
    assert device.current is None
    assert short.state == "ready"


def test_device_suspend_leaves_it_idle_until_the_next_dispatch() -> None:
    device, run = VirtualDevice(), make_run(1, 4.0)
    device.dispatch(run, 0.0)
    assert device.suspend(run, 0.5)
    assert device.advance(1.0) == ("suspended", run)
    assert device.current is None
    assert not device.suspend(run, 1.0)


def test_device_cancel_ends_the_current_run_at_its_boundary_and_starts_the_next() -> None:
    device, run, other = VirtualDevice(), make_run(1, 4.0), make_run(2, 1.0)
    device.dispatch(run, 0.0)
    assert device.cancel(run, 0.2)
    device.dispatch(other, 0.2)
    device.dispatch(run, 0.3)  # it is as good as gone
    assert device.advance(1.0) == ("cancelled", run)
    assert device.current is other
    assert not device.cancel(run, 1.0)


def test_device_cancel_of_a_suspended_run_is_at_once() -> None:
    device, run, other = VirtualDevice(), make_run(1, 4.0), make_run(2, 1.0)
    device.dispatch(run, 0.0)
    device.dispatch(other, 0.1)
    device.advance(1.0)
    assert device.cancel(run, 1.1)
    assert run.state == "cancelled"
    assert device.current is other


def test_device_with_two_segments_in_flight_stops_one_boundary_later() -> None:
    device = VirtualDevice(segments_in_flight=2)
    device.dispatch(make_run(1, 4.0), 0.0)
    device.dispatch(make_run(2, 1.0), 0.5)
    assert device.next_s == 2.0
