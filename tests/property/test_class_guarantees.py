"""Guaranteed shares and the line of the late, against adversaries on the virtual device."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_device import Client, VirtualDevice, cost_model

from flowprefill.scheduling import (
    Arrival,
    CostModel,
    Decision,
    Job,
    MachineRates,
    ModelShape,
    Scheduler,
    SchedulerSettings,
)

SHARE, LATE_SHARE, SLICE_S, BLOCKING_S = 0.3, 0.1, 0.02, 0.002
Mix = tuple[tuple[int, ...], tuple[float, ...]]  # tokens, objectives
ADVERSARIES = ("tight stream", "gaming", "ping-pong", "long")


def conforming(rng: random.Random, until: float) -> list[Client]:
    """Return requests of the class `api`, each within its share by the documented formula."""
    clients: list[Client] = []
    at, end = 1.0, 0.0
    while at < until:
        tokens, objective = rng.choice((50, 300, 1_000, 3_000)), rng.choice((0.4, 1.0, 3.0))
        needed = cost_model().prefill_s(tokens) + 2 * BLOCKING_S
        ends = max(end, at) + needed / SHARE
        if ends <= at + objective - BLOCKING_S - SLICE_S - 1e-6:
            end = ends
            job = Job(f"api-{len(clients)}", at, tokens, 0, at + objective, service_class="api")
            clients.append(Client(job))
        at += rng.choice((0.0, 0.01, 0.1, 0.4))
    return clients


def adversary(kind: str, rng: random.Random, until: float) -> list[Client]:
    """Return 2.5 times what the device can do, of requests that want to be served first."""
    clients: list[Client] = []
    at = 1.0
    while at < until:
        tokens, objective, weight = 500, 0.1, 1.0
        if kind == "gaming":
            tokens, objective, weight = 1_000, rng.choice((1e-4, 0.15)), 1000.0
        elif kind == "ping-pong":
            tokens, objective = rng.choice(((60, 0.012), (2_000, 0.3)))
        elif kind == "long":
            tokens, objective = 8_000, 1.0
        name = f"other-{len(clients)}"
        clients.append(Client(Job(name, at, tokens, 0, at + objective, weight=weight)))
        at += cost_model().prefill_s(tokens) / 2.5
    return clients


def make(**shares: float) -> Scheduler:
    limits = SchedulerSettings(
        late_share=LATE_SHARE, late_patience_s=0.5, late_slice_s=SLICE_S, class_shares=shares
    )
    return Scheduler("slack_edf", cost_model(), limits)


@pytest.mark.parametrize("kind", ADVERSARIES)
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_guaranteed_share_conforming_requests_are_on_time(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    honest = conforming(rng, 6.0)
    late = Client(Job("late", 1.0, 3_000, 0, 1.001))
    device = VirtualDevice(make(api=SHARE), [*honest, late, *adversary(kind, rng, 6.0)])
    device.play()
    assert [c.job.id for c in honest if not c.is_on_time] == []


def weight_bound(max_batch_jobs: int, share: float, late_share: float) -> Scheduler:
    """Return a scheduler for a device on which a prefill of no tokens takes 9 ms."""
    model = CostModel(
        ModelShape(1e6, 1e6, 1e2, 1.0, 1.0),
        MachineRates(1e10, 1e10, 1e9, 8e-3),
        is_calibrated=True,
    )
    limits = SchedulerSettings(
        late_share=late_share,
        late_patience_s=0.5,
        late_slice_s=SLICE_S,
        class_shares={"api": share},
        max_batch_jobs=max_batch_jobs,
    )
    return Scheduler("slack_edf", model, limits)


def late_of_mix(
    seed: int, scheduler: Scheduler, own: Mix, others: Mix, pauses: tuple[float, ...], until: float
) -> list[str]:
    """Play requests within the share of the class `api` next to 2.5 times what the device can do.

    Args:
        own: tokens and objectives of the class's; others: those of the others.
        pauses: between two of the class's.

    Returns:
        Which of the class's were late.
    """
    rng = random.Random(seed)
    limits, prefill_s = scheduler.settings, scheduler.cost_model.prefill_s
    honest: list[Client] = []
    at, end = 1.0, 0.0
    while at < until:
        tokens, objective = rng.choice(own[0]), rng.choice(own[1])
        needed_s = prefill_s(tokens) + 2 * limits.max_blocking_s
        ends = max(end, at) + needed_s / limits.class_shares["api"]
        if ends <= at + objective - limits.max_blocking_s - limits.late_slice_s - 1e-6:
            end = ends
            job = Job(f"api-{len(honest)}", at, tokens, 0, at + objective, service_class="api")
            honest.append(Client(job))
        at += rng.choice(pauses)
    rest: list[Client] = []
    at = 1.0
    while at < until:
        tokens, objective = rng.choice(others[0]), rng.choice(others[1])
        weight = rng.choice((1.0, 100.0))
        job = Job(f"other-{len(rest)}", at, tokens, 0, at + objective, weight=weight)
        rest.append(Client(job))
        at += prefill_s(tokens) / 2.5
    VirtualDevice(scheduler, [*honest, *rest]).play()
    return [client.job.id for client in honest if not client.is_on_time]


LONG_AND_SHORT = (
    ((30, 100, 300, 2_000), (0.2, 0.4, 1.0, 3.0)),
    ((30, 60, 100, 400), (0.03, 0.06, 0.1, 0.5)),
    (0.0, 0.01, 0.05, 0.1),
)


def test_guaranteed_share_first_protected_is_not_given_up_for_one_that_is_due_later() -> None:
    """The plan would keep several short ones: the first goes on all the same, and not by turns."""
    assert late_of_mix(1, weight_bound(1, SHARE, LATE_SHARE), *LONG_AND_SHORT, 5.0) == []


@pytest.mark.parametrize("seed", [10, 15, 19, 20])
def test_guaranteed_share_packed_one_is_on_time_whatever_it_was_packed_with(seed: int) -> None:
    """One packed with it may be due sooner and turn late, and its last 5 % are as predicted."""
    assert late_of_mix(seed, weight_bound(64, SHARE, LATE_SHARE), *LONG_AND_SHORT, 5.0) == []


@pytest.mark.parametrize("seed", [0, 9, 10, 16])
def test_guaranteed_share_what_is_packed_leaves_time_for_the_other_protected(seed: int) -> None:
    scheduler = weight_bound(64, 0.8, 0.05)
    own = ((30, 30, 60, 2_000), (0.05, 0.06, 0.2, 0.4, 3.0))
    others = ((60, 100, 300), (0.06, 0.2, 0.5, 2.0))
    assert late_of_mix(seed, scheduler, own, others, (0.0, 0.005, 0.01), 2.2) == []


@pytest.mark.parametrize(("tokens", "objective"), [(3_000, 4.0), (8_000, 10.0), (8_000, 5.0)])
@pytest.mark.parametrize("at", [1.0, 1.03])
def test_guaranteed_share_others_go_first_while_that_leaves_enough(
    tokens: int, objective: float, at: float
) -> None:
    """It goes on when what is left by its deadline is its own time, and what others may still ask.

    Others: the two classes, for which the time after its own device would end it counts, and those
    without a share. At 1.0 s it is the first to come, and begins before it is suspended.
    """
    shares, went_on = {"api": SHARE, "batch": 0.2}, list[tuple[float, float]]()
    one = Client(Job("one", at, tokens, 0, at + objective, service_class="api"))

    def note(_event: object, now: float, decision: Decision) -> None:
        if now > at and decision.dispatch is not None and "one" in decision.dispatch.job_ids:
            went_on.append((now, decision.dispatch.remaining_s))

    others = adversary("tight stream", random.Random(1), at + objective)
    VirtualDevice(make(**shares), [one, *others], on_decision=note).play()
    needed_s = cost_model().prefill_s(tokens)
    end_s = at + (needed_s + 2 * BLOCKING_S) / SHARE  # on a device of its own
    due_s = at + objective - BLOCKING_S - SLICE_S
    late_share = LATE_SHARE * (1 + 2 * BLOCKING_S / SLICE_S)

    def spare_s(now: float, left_s: float) -> float:
        others_s = SHARE * (due_s - max(now, end_s)) + shares["batch"] * (due_s - now)
        return (due_s - now) * (1 - late_share) - left_s - others_s

    assert one.is_on_time
    assert spare_s(at, needed_s) > 0.1
    assert spare_s(*went_on[0]) == pytest.approx(0.0, abs=0.01)


def test_guaranteed_share_protects_what_has_a_deadline_within_it_and_at_most_64() -> None:
    """Each takes 0.11 s, a third of a second of the share: the third would end after 1.07 s."""
    scheduler = make(api=SHARE)
    jobs = [Job("none", 1.0, 30_000, service_class="api")]
    jobs += [Job(f"api-{n}", 1.0, 1_000, 0, 2.0, service_class="api") for n in range(3)]
    jobs += [Job(f"many-{n}", 1.0, 10, 0, 60.0, service_class="api") for n in range(80)]
    jobs += [Job("other", 1.0, 10, 0, 60.0)]
    for job in jobs:
        scheduler.on_event(Arrival(job), 1.0)
    protected = [job.id for job in jobs if scheduler._prefills[job.id].is_protected]
    assert protected == ["api-0", "api-1", *(f"many-{n}" for n in range(62))]


def test_guaranteed_share_of_short_ones_counts_two_segments_for_each() -> None:
    scheduler = make(api=SHARE)
    jobs = [Job(f"api-{n}", 1.0, 10, 0, 2.0, service_class="api") for n in range(60)]
    for job in jobs:
        scheduler.on_event(Arrival(job), 1.0)
    protected = sum(scheduler._prefills[job.id].is_protected for job in jobs)
    each_s = (cost_model().prefill_s(10) + 2 * BLOCKING_S) / SHARE
    assert protected == int((1.0 - BLOCKING_S - SLICE_S) / each_s)
    assert protected < 60


def test_guaranteed_share_is_what_makes_them_on_time() -> None:
    rng = random.Random(1)
    honest = conforming(rng, 6.0)
    device = VirtualDevice(make(), [*honest, *adversary("tight stream", rng, 6.0)])
    device.play()
    assert any(not client.is_on_time for client in honest)


@pytest.mark.parametrize("kind", ADVERSARIES)
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([None, SHARE]))
def test_late_and_best_effort_end_within_the_documented_bound(
    kind: str, seed: int, share: float | None
) -> None:
    rng = random.Random(seed)
    scheduler = make() if share is None else make(batch=share)
    victims: list[Client] = []
    for number in range(4):  # without a share all come first: the stream turns late and joins them
        at = 1.0 if share is None else 1.0 + 0.2 * number
        ttft = math.inf if share is not None else rng.choice((math.inf, 1e-3))
        tokens = rng.choice((200, 1_000, 2_500))
        job = Job(f"victim-{number}", at, tokens, 0, at + ttft, service_class="batch")
        victims.append(Client(job))
    VirtualDevice(scheduler, [*victims, *adversary(kind, rng, 20.0)]).play()
    share = LATE_SHARE if share is None else share
    patience = 0.5 if share == LATE_SHARE else 0.0
    line_s = 0.0
    longest = cost_model().prefill_s(8_000)
    for number, victim in enumerate(victims):
        line_s += cost_model().prefill_s(victim.job.prompt_tokens)
        ahead_of_it = max(v.job.arrival_s for v in victims[: number + 1])
        bound = ahead_of_it + patience + (line_s + SLICE_S) / share + (number + 1) * SLICE_S
        assert victim.first_token_s <= bound + longest, victim


@pytest.mark.parametrize("name", ["", "batch"])
def test_late_ones_take_no_more_than_their_share_from_those_on_time(name: str) -> None:
    share, patience_s = (SHARE, 0.0) if name else (LATE_SHARE, 0.5)
    victim = Client(Job("late", 1.0, 8_000, 0, 1.001, service_class=name))
    stream = adversary("tight stream", random.Random(1), 20.0)
    VirtualDevice(make(batch=SHARE), [victim, *stream]).play()
    slices = cost_model().prefill_s(8_000) / SLICE_S
    took_s = victim.first_token_s - 1.0 - patience_s
    assert took_s == pytest.approx((slices - 1) * SLICE_S / share, rel=0.05)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_background_never_reduces_who_is_on_time(seed: int) -> None:
    rng = random.Random(seed)
    foreground: list[Job] = []
    at = 1.0
    while at < 4.0:
        tokens = rng.choice((100, 800, 3_000))
        ttft = rng.choice((0.1, 0.5, 2.0, math.inf))
        foreground.append(Job(f"job-{len(foreground)}", at, tokens, 0, at + ttft))
        at += rng.choice((0.02, 0.1, 0.2))
    background = [
        Client(Job(f"background-{n}", 0.9 + 0.1 * n, 5_000, service_class="background"))
        for n in range(20)
    ]

    def on_time(extra: list[Client]) -> set[str]:
        clients = [Client(job) for job in foreground]
        limits = SchedulerSettings(max_blocking_s=0.0)  # what is left is a segment per arrival
        VirtualDevice(Scheduler("slack_edf", cost_model(), limits), [*clients, *extra]).play()
        return {client.job.id for client in clients if client.is_on_time}

    assert on_time(background) >= on_time([])
    assert all(client.ends for client in background)


def test_background_decodes_only_while_nothing_is_to_be_prefilled() -> None:
    talker = Client(Job("talker", 1.0, 10, service_class="background"), output_tokens=20)
    stream = [  # the device is never idle before it has ended
        Client(Job(f"job-{n}", 1.0 + n * 0.05, 1_000, 0, 1.0 + n * 0.05 + 30.0)) for n in range(60)
    ]
    VirtualDevice(Scheduler("slack_edf", cost_model()), [talker, *stream]).play()
    last_prefill = max(client.first_token_s for client in stream)
    assert sum(at > last_prefill for at in talker.token_times) >= 19
