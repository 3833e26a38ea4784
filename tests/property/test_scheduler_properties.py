"""What holds for every policy whatever arrives, is cancelled, fails or crosses (hypothesis)."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_device import Client, VirtualDevice, cost_model

from flowprefill.config import POLICIES
from flowprefill.scheduling import (
    Arrival,
    CostModel,
    Job,
    MachineRates,
    ModelShape,
    Scheduler,
    SchedulerSettings,
)
from flowprefill.scheduling.job import BACKGROUND

TTFTS = (0.0, 0.05, 0.2, 1.0, 5.0, math.inf)
TTFT = st.sampled_from(TTFTS)
TPOTS = (0.001, 0.02, 0.1, math.inf)
# When a client reads nothing: seconds after its arrival, and for how long.
STALLS = ((), (), ((0.0, 0.5),), ((0.003, 0.02), (0.03, 3.0)), ((0.3, 0.0), (0.6, 0.2)))
World = tuple[list[Client], dict[str, Any]]


def _client(rng: random.Random, number: int, arrival_s: float) -> Client:
    """Return one of any kind."""
    name = rng.choice(("", "", "api", BACKGROUND))
    ttft_s = math.inf if name == BACKGROUND else rng.choice(TTFTS)
    job = Job(
        f"job-{number}",
        arrival_s,
        rng.choice((0, 1, 50, 400, 5_000)),
        rng.choice((0, 1_000)),
        arrival_s + ttft_s,
        math.inf if name == BACKGROUND else rng.choice(TPOTS),
        rng.choice(("demote", "drop")),
        rng.choice((0, 0, 0, 1)),
        rng.choice((1.0, 1.0, 0.01, 50.0)),
        name,
        rng.choice(("", "", "a", "b")),
        rng.choice(("", "", "one", "two")),
        rng.choice(("logits", "logits", "logits", "scores")),
        rng.random() < 0.5,
        ttft_s < math.inf and rng.random() < 0.3,
    )
    leaves_s = arrival_s + rng.choice((math.inf, math.inf, 0.0, 0.01, 0.4))
    stalls = tuple((arrival_s + a, arrival_s + a + b) for a, b in rng.choice(STALLS))
    return Client(job, rng.randint(1, 6), leaves_s, stalls)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Return clients and how the device behaves."""
    count, seed = draw(st.integers(1, 25)), draw(st.integers(0, 2**32))
    rng, arrival_s = random.Random(seed), 1.0  # drawn one by one they would take long
    behaviour = {
        "seed": seed,
        "noise": rng.choice((0.0, 0.1, 1.0)),
        "fail_share": rng.choice((0.0, 0.0, 0.1)),
        "report_s": rng.choice((0.0, 0.0005, 0.004)),
        "slowness": rng.choice((1.0, 1.0, 0.2, 5.0)),  # of what is predicted
    }
    clients = []
    for number in range(count):
        arrival_s += rng.choice((0.0, 0.001, 0.02, 0.3))
        clients.append(_client(rng, number, arrival_s))
    return clients, behaviour


def _copy(client: Client) -> Client:
    return Client(client.job, client.output_tokens, client.cancel_s, client.stalls)


def _play(
    policy: str, clients: list[Client], behaviour: dict[str, Any], *, asks: bool = False
) -> VirtualDevice:
    """Play a world; asks: with questions that change nothing."""
    limits = SchedulerSettings(
        max_running=4, max_batch_jobs=6, max_suspensions=5, class_shares={"api": 0.3}
    )
    scheduler = Scheduler(policy, cost_model(), limits)

    def ask(event: object, now: float, _decision: object) -> None:
        if not isinstance(event, Arrival):
            return
        newcomer = replace(event.job, id="asked about", arrival_s=now, prompt_tokens=70)
        waits_s = [scheduler.predicted_ttft_s(job, now) for job in (event.job, newcomer)]
        outlook = scheduler.outlook(newcomer, now, 1.0)
        assert min(*waits_s, outlook.margin_s, outlook.clear_s, outlook.made_late) >= 0.0
        assert 0.0 < outlook.alone_s <= outlook.ttft_s < math.inf

    device = VirtualDevice(
        scheduler, [_copy(c) for c in clients], on_decision=ask if asks else None, **behaviour
    )
    device.play()
    return device


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=80)
@given(world=worlds())
def test_scheduler_random_world_each_job_ends_once(policy: str, world: World) -> None:
    device = _play(policy, *world)
    for client in device.clients.values():
        assert len(client.ends) == 1, client
    assert device.scheduler.current is None
    load = device.scheduler.load()
    assert (load.waiting_jobs, load.waiting_tokens, load.suspended_works) == (0, 0, 0)
    assert (load.decoding, load.held) == (0, 0)
    assert device.scheduler._decoding._joining == 0, "steps would wait for it for ever"
    for run in device.runs.values():
        assert run.state in ("finished", "cancelled"), run


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=20)
@given(world=worlds())
def test_scheduler_same_world_same_decisions_whatever_is_asked_meanwhile(
    policy: str, world: World
) -> None:
    def told(device: VirtualDevice) -> list[tuple[Any, ...]]:
        return [
            (at, d.reason, d.dispatch and d.dispatch.id, d.dropped, d.wake_at)
            for at, _, d in device.log
        ]

    assert told(_play(policy, *world)) == told(_play(policy, *world, asks=True))


@settings(max_examples=80)
@given(world=worlds())
def test_scheduler_slack_edf_preemptions_by_prefills_bounded(
    world: World,
) -> None:
    device = _play("slack_edf", *world)
    by_prefill: dict[int, int] = {}
    for _, _, decision in device.log:
        dispatch, victim = decision.dispatch, decision.preempted
        if dispatch is not None and victim is not None and dispatch.kind == "prefill":
            by_prefill[victim.id] = by_prefill.get(victim.id, 0) + 1
    slice_s = SchedulerSettings().late_slice_s  # after 5 each goes on for a slice in between
    for number, times in by_prefill.items():
        executed_s = device.runs[number].work.executed_s
        assert times <= 5 + executed_s / slice_s + 1


@settings(max_examples=80)
@given(world=worlds())
def test_scheduler_fcfs_never_preempts(world: World) -> None:
    device = _play("fcfs", *world)
    assert all(decision.preempted is None for _, _, decision in device.log)


@settings(max_examples=80)
@given(
    policy=st.sampled_from(["slack_edf", "s_edf_paper", "edf", "fcfs", "priority"]), world=worlds()
)
def test_scheduler_equal_ones_without_objective_begin_in_order_of_arrival(
    policy: str, world: World
) -> None:
    clients, behaviour = world
    jobs = [client.job for client in clients]
    for job, like in pairwise(jobs):
        if math.isinf(like.ttft_deadline_s):  # so that there are some
            told = ("prompt_tokens", "context_tokens", "priority", "weight", "service_class")
            for name in (*told, "tenant", "output", "ttft_deadline_s", "is_promised"):
                setattr(job, name, getattr(like, name))
    device = _play(policy, clients, behaviour)
    begun: dict[str, list[str]] = {}
    for run in device.runs.values():
        for job in run.first_jobs if not run.work.is_decode else ():
            if math.isinf(job.ttft_deadline_s):
                kind = replace(job, id="", arrival_s=0.0, tpot_s=1.0, client="", decodes=True)
                begun.setdefault(repr(replace(kind, on_miss="drop")), []).append(job.id)
    order = [job.id for job in jobs]
    assert all(ids == sorted(ids, key=order.index) for ids in begun.values()), begun


@settings(max_examples=80)
@given(
    policy=st.sampled_from(POLICIES),
    count=st.integers(2, 12),
    ttft=TTFT,
    gap=st.sampled_from([0.0, 0.001]),
)
def test_scheduler_equal_urgency_never_preempts(
    policy: str, count: int, ttft: float, gap: float
) -> None:
    deadline = 1.0 + ttft
    clients = [
        Client(Job(f"job-{number}", 1.0 + gap * number, 700, 0, deadline))
        for number in range(count)
    ]
    if policy == "shortest_first":  # what has run a while is shorter: a later equal never wins
        clients = clients[:2]
    device = VirtualDevice(Scheduler(policy, cost_model()), clients, noise=0.2)
    device.play()
    assert all(run.work.suspensions == 0 for run in device.runs.values())


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    deadline=st.sampled_from([0.05, math.inf]),
    tokens=st.sampled_from([300, 4_000]),
)
def test_scheduler_slack_edf_overload_late_job_ends_within_bound(
    seed: int, deadline: float, tokens: int
) -> None:
    limits = SchedulerSettings(late_share=0.2, late_patience_s=0.5, late_slice_s=0.05)
    scheduler = Scheduler("slack_edf", cost_model(), limits)
    hopeless = Client(Job("late", 1.0, tokens, 0, 1.0 + min(deadline, 1e-3)))
    if math.isinf(deadline):
        hopeless = Client(Job("late", 1.0, tokens))
    stream = [  # 1.5 times what the device can do, each with time to spare at first
        Client(Job(f"job-{n}", 1.0 + n * 0.02, 300, 0, 1.0 + n * 0.02 + 0.3)) for n in range(250)
    ]
    device = VirtualDevice(scheduler, [hopeless, *stream], seed=seed)
    device.play()
    own = cost_model().prefill_s(tokens)
    longest = cost_model().prefill_s(512)
    bound = 1.0 + limits.late_patience_s + own / limits.late_share + limits.late_slice_s + longest
    assert hopeless.first_token_s <= bound + 0.01
    assert any(client.first_token_s > bound for client in stream)  # there was a choice


@settings(max_examples=20)
@given(
    policy=st.sampled_from(["slack_edf", "s_edf_paper", "edf", "shortest_first"]),
    tpot=st.sampled_from([0.05, math.inf]),
    ttft=st.sampled_from([0.1, 2.0, math.inf]),
)
def test_scheduler_stream_of_prefills_decode_keeps_its_pace(
    policy: str, tpot: float, ttft: float
) -> None:
    scheduler = Scheduler(policy, cost_model())
    talker = Client(Job("talker", 1.0, 10, 0, 1.1, tpot), output_tokens=40)
    stream = [
        Client(Job(f"job-{n}", 1.0 + n * 0.05, 2_000, 0, 1.0 + n * 0.05 + ttft)) for n in range(60)
    ]
    device = VirtualDevice(scheduler, [talker, *stream])
    device.play()
    gaps = [b - a for a, b in zip(talker.token_times, talker.token_times[1:], strict=False)]
    pace = min(tpot, scheduler.settings.max_stall_s)
    assert max(gaps) <= pace + 0.02
    assert all(len(client.ends) == 1 for client in stream)


@settings(max_examples=40)
@given(sizes=st.lists(st.sampled_from([1, 2, 10, 100]), min_size=2, max_size=5))
def test_scheduler_each_of_n_clients_decodes_at_one_nth_of_its_pace_alone(sizes: list[int]) -> None:
    seconds, model = 2.0, cost_model()
    most = SchedulerSettings().max_running
    clients = [
        Client(Job(f"{name}-{number}", 1.0, 0, client=str(name)), 10**6, 1.0 + seconds)
        for name, size in enumerate(sizes)
        for number in range(size)
    ]
    VirtualDevice(Scheduler("slack_edf", cost_model()), clients).play()
    for name, size in enumerate(sizes):
        rows = min(size, most)
        alone = rows / model.decode_s(rows, 0) * seconds
        gained = sum(len(one.token_times) for one in clients if one.job.client == str(name))
        assert gained >= 0.9 * alone / len(sizes) - rows, (name, gained, alone)


@settings(max_examples=40)
@given(
    talkers=st.integers(1, 6),
    burst=st.integers(0, 30),
    tokens=st.sampled_from([100, 2_000]),
    output=st.sampled_from([1, 2, 20]),
    step_s=st.sampled_from([0.002, 0.01, 0.1, 0.2]),
)
def test_scheduler_burst_streams_keep_a_quarter_of_their_pace_and_no_step_is_late(
    talkers: int, burst: int, tokens: int, output: int, step_s: float
) -> None:
    """Steps that wait for others to join them: what bounds that, whether or not others do."""
    model = reads_weights(step_s)
    scheduler = Scheduler("slack_edf", model)
    limits = scheduler.settings
    clients = [Client(Job(f"talker-{n}", 1.0, 0), 60) for n in range(talkers)]
    clients += [Client(Job(f"job-{n}", 1.1 + n * 0.01, tokens), output) for n in range(burst)]
    device = VirtualDevice(scheduler, clients)
    device.play()
    longest_s = model.decode_s(talkers + burst, 10**4)
    for run in device.runs.values():
        if run.work.is_decode:
            assert run.start_s <= run.work.deadline_s + limits.max_blocking_s
    stall_s = min(max(0.5, 16 * model.decode_s(1, 0)), 2.0)
    bound_s = min(stall_s, 4 * longest_s / limits.idle_share) + longest_s
    for client in clients:
        gaps = [b - a for a, b in pairwise(client.token_times)]
        assert max(gaps, default=0.0) <= bound_s + 2 * limits.max_blocking_s


def test_scheduler_burst_takes_few_narrow_steps() -> None:
    """The figures in docs/scheduling.md; steps of a quarter of the time: 1.15, 2.50 and 0.042 s."""
    clients = [Client(Job(f"job-{n}", 1.0, 1_000), 32) for n in range(16)]
    VirtualDevice(Scheduler("slack_edf", reads_weights(0.01)), clients).play()
    assert sum(client.first_token_s - 1.0 for client in clients) / 16 == pytest.approx(
        0.99, abs=0.005
    )
    assert max(client.token_times[-1] for client in clients) - 1.0 == pytest.approx(2.26, abs=0.005)
    gaps = [b - a for client in clients for a, b in pairwise(client.token_times)]
    assert max(gaps) == pytest.approx(0.161, abs=0.001)


@pytest.mark.parametrize("tokens", [(20_000,), (10_000, 20_000)])
@pytest.mark.parametrize("room", [1.1, 1.2, 1.3])
def test_scheduler_steps_that_can_wait_make_no_prefill_late(
    tokens: tuple[int, ...], room: float
) -> None:
    """A stream is due a step of 10 ms every 0.5 s, 2 % of the time, and takes a quarter."""
    model = reads_weights(0.01)
    clients, needed_s = [Client(Job("talker", 1.0, 0), 100)], 0.0
    for count in tokens:  # only the last one's deadline is tight
        needed_s += model.prefill_s(count)
        due_s = 1.001 + needed_s * (room if count == tokens[-1] else 2.0)
        clients.append(Client(Job(f"job-{count}", 1.001, count, 0, due_s, decodes=False)))
    VirtualDevice(Scheduler("slack_edf", model), clients).play()
    assert [client.job.id for client in clients[1:] if not client.is_on_time] == []


@pytest.mark.parametrize("tpot", [0.15, math.inf])
def test_scheduler_suspended_step_goes_on_as_early_as_it_would_begin(tpot: float) -> None:
    """It was suspended for a prompt, whose sequence then waits behind it; others are prefilled."""
    clients = [
        Client(Job("talker", 1.0, 0), 30),
        Client(Job("urgent", 1.0, 30, 0, 1.075, tpot), 10),
        *(Client(Job(f"job-{n}", 1.0, 3_000, decodes=False)) for n in range(10)),
    ]
    device = VirtualDevice(Scheduler("slack_edf", reads_weights(0.06)), clients)
    device.play()
    suspended = [run for run in device.runs.values() if run.work.is_decode and run.preemptions]
    assert len(suspended) == 1
    assert suspended[0].suspended_s <= 0.07, "for the urgent prompt alone"
    urgent = device.clients["urgent"]
    assert urgent.is_on_time
    gaps = [b - a for a, b in pairwise(urgent.token_times)]
    assert max(gaps) <= (0.15 if tpot == 0.15 else 0.3) + 0.01


def reads_weights(step_s: float) -> CostModel:
    """Return a model of 10,000 tokens/s whose step takes so long, however wide it is."""
    return CostModel(
        ModelShape(1e6, 1e9 * step_s, 1e2, 1.0, 1.0),
        MachineRates(1e10, 1e10, 1e9, 1e-6),
        is_calibrated=True,
    )
