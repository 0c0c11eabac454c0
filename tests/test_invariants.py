"""The table of invariants in docs/testing.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "testing.md").read_text()
ROWS = re.findall(r"^\| (I\d+) \| (.+?) \| (.+?) \|$", TEXT, re.MULTILINE)


def test_every_invariant_has_a_row():
    assert [row[0] for row in ROWS] == [f"I{i}" for i in range(1, 16)]


def test_every_row_names_tests_that_exist_or_says_why_there_are_none():
    for name, _, tests in ROWS:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named or tests.startswith("none: "), name
        for file, test in named:
            source = (TESTS / file).read_text()
            assert re.search(rf"^(def|class) {test}\b", source, re.MULTILINE), f"{name}: {test}"
