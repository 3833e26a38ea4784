"""ReadyQueue: random use against a list that is sorted anew each time."""

from __future__ import annotations

import hand_made
from hypothesis import given
from hypothesis import strategies as st

from flowprefill.scheduling.policies.base import BasePolicy
from flowprefill.scheduling.ready_queue import ReadyQueue
from flowprefill.scheduling.work import Rank, Work


class Turning(BasePolicy):
    """By length; behind all others from the deadline on. Remembers who no longer waits."""

    name = "turning"

    def __init__(self) -> None:
        plain = hand_made.make()
        super().__init__(plain.cost_model, plain.settings)
        self.gone: list[Work] = []

    def rank(self, work: Work, now: float) -> Rank:
        if now < work.deadline_s:
            return Rank((0.0, work.remaining_s), work.deadline_s)
        return Rank((1.0, work.remaining_s))

    def left(self, work: Work) -> None:
        self.gone.append(work)


# (seconds that pass, its time, when it is due, priority), and who leaves: a place in the order.
STEP = st.tuples(
    st.integers(0, 2), st.integers(1, 5), st.integers(0, 40), st.integers(0, 1), st.integers(0, 99)
)


@given(steps=st.lists(STEP, max_size=30), stay=st.integers(0, 5), crowd=st.sampled_from([0, 40]))
def test_queue_is_in_order_at_all_times_and_forgets_who_left(
    steps: list[tuple[int, ...]], stay: int, crowd: int
) -> None:
    policy, now, serial = Turning(), 0.0, 0
    queue, waiting, gone = ReadyQueue(policy), list[Work](), list[Work]()

    def push(seconds: float, due_s: float, priority: int) -> None:
        nonlocal serial
        job = hand_made.job(str(serial), 1, due_s, priority=priority)
        waiting.append(Work([job], serial, seconds))
        queue.push(waiting[-1], now)
        serial += 1

    def remove(work: Work) -> None:
        queue.remove(work)
        waiting.remove(work)
        gone.append(work)

    for passed, seconds, due_s, priority, place in steps:
        now += passed
        queue.review(now)
        push(seconds / 10, now + due_s, priority)
        for _ in range(crowd):  # they come, and leave at once
            push(7.0, now + 99.0, 0)
            remove(waiting[-1])
        if len(waiting) > stay:
            remove(waiting[place % len(waiting)])
        waiting.sort(key=lambda work: (policy.rank(work, now).key, work.priority, work.serial))
        assert list(queue.in_order()) == waiting
        assert queue.first(3) == waiting[:3]
        assert len(queue) == len(waiting)
        assert all(work in queue for work in waiting)
        assert not any(work in queue for work in gone)
        assert abs(queue.total_s - sum(work.remaining_s for work in waiting)) < 1e-9
        assert policy.gone == gone
        assert len(queue._reviews) <= 2 * len(waiting) + 100
    for work in tuple(waiting):
        remove(work)
    assert queue.total_s == 0.0
