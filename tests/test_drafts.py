"""Which tokens of a step may be rejected, and what the bank's tail does with them."""

import pytest
import torch

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.drafts import look_up_drafts, write_accepted
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.pieces import cut_pieces
from pacellm_vllm.memory.plain import PlainStep
from pacellm_vllm.memory.store import PagedStore, unit_view
from pacellm_vllm.ops.update import advance

WIDTH, SEGMENT, DRAFTS = 40, 8, 10
RULES = PaceConfig(preset="official", bank_size=5, segment_size=SEGMENT, max_insertions=3).rules()
LAYOUT = BankLayout.plan(RULES, WIDTH, torch.float32, 1024, DRAFTS)


def cut(n, length):
    pieces = cut_pieces([0, n], [length], LAYOUT, RULES)
    return [(piece.begin, piece.end, piece.position, piece.certain) for piece in pieces]


def test_only_what_follows_the_first_token_of_a_short_step_may_be_rejected():
    assert cut(1, 21) == [(0, 1, 20, True)]
    assert cut(4, 24) == [(0, 1, 20, True), (1, 4, 21, False)]
    # The drafts are not cut where segments end: position 24 and 32 start new ones.
    assert cut(11, 33) == [(0, 1, 22, True), (1, 11, 23, False)]
    assert cut(12, 34) == [(0, 2, 22, True), (2, 10, 24, True), (10, 12, 32, True)]
    assert cut(4, 26) == [(0, 1, 22, True), (1, 4, 23, False)]


def test_a_layout_without_drafts_has_no_tail():
    plain = BankLayout.plan(RULES, WIDTH, torch.float32, 1024)
    assert plain.slots_start == plain.header_rows
    assert LAYOUT.slots_start == LAYOUT.header_rows + 1 + DRAFTS
    assert LAYOUT.pages_for(1) > plain.pages_for(1)


def make_store(fill):
    """A bank in pages that held ``fill`` before."""
    pages = range(LAYOUT.num_pages)
    cache = torch.full((LAYOUT.num_pages, 1, 1, LAYOUT.page_bytes), fill, dtype=torch.uint8)
    return PagedStore(unit_view(cache, LAYOUT, torch.float32), pages, LAYOUT)


@pytest.mark.parametrize("fill", [0xFF, 0])
@pytest.mark.parametrize(
    ("drafted", "accept"), [(3, 0), (3, 1), (3, 3), (10, 0), (10, 4), (10, 10)]
)
def test_rejected_drafts_leave_the_bank_of_the_tokens_that_stayed(drafted, accept, fill):
    generator = torch.Generator().manual_seed(accept)
    base = torch.randn(6, WIDTH, generator=generator)
    a = base[torch.randint(6, (90,), generator=generator)]
    a = a + 0.5 * torch.randn(90, WIDTH, generator=generator)
    plain, kept = make_store(0), make_store(fill)
    for position in range(70):
        advance(plain, a[position, None], position, RULES)

    position, steps = 0, 0
    while position < 70:
        list(write_accepted(kept, position, RULES))
        advance(kept, a[position, None], position, RULES)
        steps += 1
        if steps % 2 == 0:
            # The drafter had nothing to say.
            position += 1
            continue
        right = min(accept, 69 - position)
        drafts = a[position + 1 : position + 1 + drafted].clone()
        drafts[right:] *= -1
        out = look_up_drafts(kept, drafts, position + 1, RULES)
        later = kept.copy()
        list(write_accepted(later, position + 1, RULES))
        for i in range(right):
            want, _ = advance(later, drafts[i, None], position + 1 + i, RULES)
            torch.testing.assert_close(out[i, None], want)
        position += 1 + right
    list(write_accepted(kept, 70, RULES))

    for got, want in zip(
        (kept.read_keys(5), kept.read_values(5)),
        (plain.read_keys(5), plain.read_values(5)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    words, expected = kept.read_words(), plain.read_words()
    assert torch.equal(words[:-5], expected[:-5])


def test_accepted_drafts_are_told_when_they_are_written():
    """Each token once, in the step that is sure of it."""
    cache = torch.zeros(LAYOUT.num_pages + 1, 1, 1, LAYOUT.page_bytes, dtype=torch.uint8)
    units = unit_view(cache, LAYOUT, torch.float32)
    table = torch.arange(1, LAYOUT.num_pages + 1)[None]
    a, told = torch.randn(40, WIDTH), []
    # A prompt of 15, three drafts of which two are accepted, and the step after it.
    for begin, end in ((0, 15), (15, 19), (18, 19)):
        pieces = cut_pieces([0, end - begin], [end], LAYOUT, RULES)
        step = PlainStep.of(table, pieces, speculative=True)
        done = step.run(units, LAYOUT, a[begin:end], torch.empty(end - begin, WIDTH), None)
        told.append(sum(each.high + each.mid + each.low for _, each, _ in done))
    assert told == [15, 1, 3]
