"""The replay ends what the rule would have ended, with the rivals that were finished by then."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.analysis.stop_replay import Curve, asha, dominated, replay_stops

RULE = dominated(0.5)
FLAT = {20: 3.0, 40: 3.0, 60: 3.0, 80: 3.0}


def curve(label: str, final: float, **more: Any) -> Curve:
    values = {"num_steps": 100, "seconds": 10.0, "losses": FLAT, "final_loss": final, **more}
    return Curve(label=label, **values)


def test_a_hopeless_trial_ends_at_the_first_look_behind_the_grace() -> None:
    cheap, costly = curve("cheap", 2.0), curve("costly", 3.0, rivals=frozenset({"cheap"}))
    replay = replay_stops([cheap, costly], RULE)
    assert set(replay.verdicts) == {"costly"}
    verdict = replay.verdicts["costly"]
    assert (verdict.step, verdict.rival) == (60, "cheap")
    assert replay.share_of_seconds == pytest.approx(4.0 / 20.0)


def test_only_who_is_finished_by_then_can_end_another() -> None:
    cheap, costly = curve("cheap", 2.0), curve("costly", 3.0, rivals=frozenset({"cheap"}))
    assert replay_stops([costly, cheap], RULE).verdicts == {}
    assert replay_stops([cheap, costly], RULE, at_once=2).verdicts == {}
    slow = curve("costly", 3.0, rivals=frozenset({"cheap"}), seconds=30.0)
    assert replay_stops([cheap, slow], RULE, at_once=2).verdicts["costly"].step == 60


def test_who_costs_less_or_may_still_win_is_trained_to_its_end() -> None:
    cheap, other = curve("cheap", 2.0), curve("other", 3.0)
    assert replay_stops([cheap, other], RULE).verdicts == {}
    falling = {20: 3.0, 40: 2.7, 60: 2.4, 80: 2.2}
    hopeful = curve("hopeful", 1.9, losses=falling, rivals=frozenset({"cheap"}))
    assert replay_stops([cheap, hopeful], RULE).verdicts == {}


def test_who_is_stopped_ends_nobody() -> None:
    first = curve("first", 2.0)
    second = curve("second", 1.0, rivals=frozenset({"first"}))
    middling = dict.fromkeys(FLAT, 1.5)
    third = curve("third", 1.5, losses=middling, rivals=frozenset({"second"}))
    assert set(replay_stops([first, second, third], RULE).verdicts) == {"second"}


def test_without_looks_or_seconds_nothing_is_saved() -> None:
    replay = replay_stops([curve("a", 1.0, losses={}, seconds=0.0)], RULE)
    assert (replay.verdicts, replay.share_of_seconds) == ({}, 0.0)


def test_the_worse_of_two_rates_ends_where_the_better_one_has_been() -> None:
    others = {"good": frozenset({"bad"}), "bad": frozenset({"good"})}
    good = curve("good", 2.0, losses={20: 2.5, 40: 2.2, 60: 2.1, 80: 2.0}, rivals=others["good"])
    bad = curve("bad", 3.0, rivals=others["bad"])
    rule = asha(0.25, 2)
    assert replay_stops([bad, good], rule, at_once=2).verdicts == {}, "it is first at every rung"
    slow = curve("bad", 3.0, rivals=others["bad"], seconds=12.0)
    for replay in (replay_stops([slow, good], rule, at_once=2), replay_stops([good, bad], rule)):
        assert {label: verdict.step for label, verdict in replay.verdicts.items()} == {"bad": 40}
