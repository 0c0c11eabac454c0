"""The soak's statistics and verdict, and what it holds against answers to hostile requests."""

import pytest
from soaking.hostile import HOSTILE, LONGEST_ANSWER
from soaking.tally import Growth, Tally


def resident(size, minutes=40):
    """A sample each ten seconds, ``size(seconds)`` MB."""
    return [(float(second), size(second)) for second in range(0, 60 * minutes, 10)]


def test_growth_does_not_count_the_warm_up():
    growth = Growth.of(resident(lambda second: 500 + min(second, 550)))
    assert growth.before == growth.after == 1050
    assert growth.slope_per_hour == 0


def test_growth_is_seen():
    growth = Growth.of(resident(lambda second: 500 + second / 36))
    assert growth.slope_per_hour == pytest.approx(100)
    assert growth.grown == pytest.approx(100 * 30 / 60 * 0.8, rel=0.02)


def test_too_few_samples_say_nothing():
    assert Growth.of([]) is None
    assert Growth.of([(0.0, 1.0), (10.0, 1.0)]) is None


def test_a_clean_run_has_nothing_wrong():
    tally = Tally()
    tally.request("chat")
    for second, size in resident(lambda second: 500):
        tally.resident(1, second, size)
    assert tally.verdict(16) == []
    assert "| requests: chat | 1 |" in tally.table(1)
    assert "| failures | 0 |" in tally.table(1)


def test_what_goes_wrong_is_said():
    tally = Tally()
    tally.fail("status 500", "first")
    tally.fail("status 500", "second")
    tally.count("blocks lost", 3)
    for second, size in resident(lambda second: second / 36):
        tally.resident(2, second, size)
    failures, blocks, memory = tally.verdict(16)
    assert failures == "2 x status 500: first"
    assert blocks == "3 blocks lost"
    assert memory.startswith("resident memory grew by")
    assert "| failures: status 500 | 2 |" in tally.table(1)


def test_memory_is_judged_in_the_longest_life():
    tally = Tally()
    for second, size in resident(lambda second: second, minutes=3):
        tally.resident(1, second, size)
    for second, size in resident(lambda second: 700):
        tally.resident(2, second, size)
    assert tally.verdict(16) == []


@pytest.mark.parametrize(
    ("refused", "status", "size", "wrong"),
    [
        (True, 400, 10, False),
        (True, 200, 10, True),
        (True, 500, 10, True),
        (False, 200, 10**6, False),
        (False, 400, 10, False),
        (False, 503, 10, True),
        (True, 400, LONGEST_ANSWER + 1, True),
    ],
)
def test_what_an_answer_to_a_hostile_request_may_be(refused, status, size, wrong):
    hostile = next(each for each in HOSTILE if each.refused is refused)
    assert bool(hostile.wrong(status, b"x" * size)) is wrong
