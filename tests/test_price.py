"""The price of memory at 7B shapes, as vLLM's own planner sees it."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "price_of_memory.py"


def test_a_full_bank_costs_at_most_a_third_more_than_its_committed_bytes():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True, timeout=120
    )
    ratios = [float(ratio) for ratio in re.findall(r"([\d.]+) x its committed", done.stdout)]
    assert len(ratios) == 4
    assert max(ratios) <= 1.3
    pools = re.findall(r"(\d+) blocks with memory, (\d+) without", done.stdout)
    assert all(with_memory == without for with_memory, without in pools)
    [thirty] = re.findall(r"TP 1, PP 1.*?\n.*?\n +30 +2 +(\d+)", done.stdout)
    assert int(thirty) == 6
    # In the order of docs/performance.md: 30B-A3B, V3, Next, Gemma.
    banks = re.findall(r"a full bank is (\d+) blocks", done.stdout)
    assert banks == ["2", "2", "1", "16"]
    at_once = re.findall(r"(\d+) requests at once, (\d+) plain", done.stdout)
    assert len(at_once) == 12
    assert all(int(memory) >= 0.85 * int(plain) for memory, plain in at_once)
