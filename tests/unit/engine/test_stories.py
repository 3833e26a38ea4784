"""Stories of requests in virtual time: who waited for whom and why; and as sentences."""

from __future__ import annotations

from typing import Any

import pytest
from test_gate import DEMOTE, GateWorld

from flowprefill.engine import stories
from flowprefill.explain import sentences
from flowprefill.request import SLO


def kinds_of(story: dict[str, Any]) -> list[str]:
    return [event["what"] for event in story["events"]]


def story_of(world: GateWorld, index: int) -> dict[str, Any]:
    story = world.core.story(world.live[index].id)
    assert story is not None
    return story


def test_who_was_suspended_for_whom_and_why_is_told_on_both_sides() -> None:
    world = GateWorld()
    start_s = world.worker.now
    long = world.submit(2000, SLO(ttft=9.0))
    world.play(start_s + 1.0)
    short = world.submit(100, SLO(ttft=0.15))
    live = story_of(world, 0)
    assert live["state"] == "suspended"
    assert (live["ttft_ms"], live["finish_reason"]) == (None, None)
    assert story_of(world, 1)["state"] == "running"
    world.play()
    story = story_of(world, 0)
    assert kinds_of(story) == ["started", "suspended", "resumed"]
    suspended = story["events"][1]
    assert (suspended["at_ms"], suspended["requests"]) == (1000.0, [short.id])
    assert suspended["reason"]
    assert suspended["reason"] == story_of(world, 1)["events"][0]["reason"]
    assert story["events"][2]["at_ms"] == pytest.approx(1100.0, abs=1.5)  # at a boundary
    assert story["suspended_ms"] == pytest.approx(100.0)
    ((from_s, to_s),) = world.live[0].timings(world.worker.now).suspensions
    assert (1e3 * from_s, 1e3 * to_s) == (story["events"][1]["at_ms"], story["events"][2]["at_ms"])
    assert story["ttft_ms"] == pytest.approx(2100.0)
    assert (story["state"], story["finish_reason"]) == ("ended", "length")
    other = story_of(world, 1)
    assert other["events"][0]["preempted"] == [long.id]
    assert other["waited_for"] == []


def test_whom_a_request_waited_for_is_looked_up_when_asked() -> None:
    world = GateWorld()
    running = world.submit(1000, SLO(ttft=1.1))
    waiting = world.submit(1000, SLO())
    world.play(world.worker.now + 0.5)
    urgent = world.submit(900, SLO(ttft=2.0))
    assert story_of(world, 1)["state"] == "waiting"
    world.play()
    story = story_of(world, 1)
    assert kinds_of(story)[:2] == ["waits", "started"]
    assert story["events"][0]["requests"] == [running.id]
    assert [one["requests"] for one in story["waited_for"]] == [[running.id], [urgent.id]]
    assert story["queue_ms"] == pytest.approx(1900.0, rel=0.01)
    assert story["queue_ms"] == story["preprocess_ms"] + story["waiting_ms"]
    assert waiting.handle.result(0)


def test_demoted_and_decode_steps_are_told() -> None:
    world = GateWorld()
    world.submit(100, SLO(tpot=0.01), max_tokens=50)
    world.submit(3000, SLO(ttft=1.0), DEMOTE)
    world.play()
    story = story_of(world, 1)
    assert kinds_of(story)[0] == "demoted"
    suspensions = [event for event in story["events"] if event["what"] == "suspended"]
    assert {(event["kind"], event["count"]) for event in suspensions} == {("decode", 1)}
    assert story["slo_met"] is False
    assert len(story["events"]) == stories.MAX_ENTRIES
    assert story["events_left_out"] > 0
    assert any("a decode step of 1 sequence:" in line for line in sentences(story))


def test_packed_requests_name_each_other_up_to_a_bound() -> None:
    world = GateWorld(policy="fcfs")
    world.submit(500, SLO())
    for _ in range(12):
        world.submit(10, SLO())
    world.play()
    started = next(e for e in story_of(world, 5)["events"] if e["what"] == "started")
    assert started["count"] == 11
    assert len(started["requests"]) == stories.MAX_NAMES
    assert world.live[5].id not in started["requests"]


def test_only_the_last_stories_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "KEPT_STORIES", 3)
    world = GateWorld()
    for _ in range(5):
        world.submit(10)
    world.play()
    assert world.core.story(world.live[1].id) is None
    kept = [one.id for one in world.live[:1:-1]]
    assert [one["id"] for one in world.core.recent()] == kept
    assert world.core.recent("req-none") == []


def test_cancelled_request_is_told_and_nothing_of_it_is_kept() -> None:
    world = GateWorld()
    world.submit(1000)
    cancelled = world.submit(1000)
    cancelled.handle.cancel()
    world.play()
    story = story_of(world, 1)
    assert (story["finish_reason"], story["ttft_ms"]) == ("cancelled", None)
    assert "was cancelled" in story["error"]
    assert world.core._stories._stories[cancelled.id].live is None


def test_sentences_tell_times_names_and_the_prediction() -> None:
    world = GateWorld()
    long = world.submit(2000, SLO(ttft=9.0), tenant="shop")
    world.play(world.worker.now + 1.0)
    short = world.submit(100, SLO(ttft=0.15))
    world.play()
    text = "\n".join(sentences(story_of(world, 0)))
    assert f"{long.id}: 2,000 prompt tokens, class default, tenant shop, first token due in" in text
    assert "0.0 ms  It arrived; its first token was predicted in 2,000.0 ms." in text
    assert f"1,000.0 ms  It was to give way to the prefill of {short.id}: " in text
    assert "1,101.0 ms  It went on where it had stopped" in text
    assert "2,100.0 ms  Its first token was made, 100.0 ms later than predicted." in text
    assert "It ended: length, after 1 token. Its objectives were met." in text
    assert "suspended 1 time for 10" in text
    other = "\n".join(sentences(story_of(world, 1)))
    assert f"It suspended the prefill of {long.id}." in other
    assert "never suspended" in other


def test_a_suspension_that_the_end_of_the_prefill_forestalled_is_none() -> None:
    """A prefill may end where it was told to stop: it was suspended once here, told so twice."""
    story = stories.Story(None, {}, arrival_s=10.0)
    for at_s, what in ((11.0, "started"), (12.0, "suspended"), (13.0, "resumed")):
        story.add(stories.Entry(at_s, what))  # type: ignore[arg-type]
    story.add(stories.Entry(14.0, "suspended"))
    assert stories._suspensions(story, 14.5, ttft=4.25) == ((2.0, 3.0),)
    assert stories._suspensions(story, 14.5, ttft=None) == ((2.0, 3.0), (4.0, 4.5))  # cancelled
