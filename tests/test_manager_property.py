"""The manager under random arrivals, chunks, preemptions, hits, aborts and forks, against a model.

The model follows what vLLM's workers would do with the blocks: copies before a forward, then the
forward itself, which leaves in a request's pages, slot by slot, the bank of its prefix up to the
last segment end. Every token takes a slot of its own there, so that as many count as can; where
slots lie and how many count is worked out here from what a layout promises.
"""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_manager import (
    ATTENTION,
    BANK,
    BLOCK,
    SEGMENT,
    bank_spec,
    held,
    make_manager,
    make_request,
)

MAX_LEN = 400
BASE = [7919 * i % 211 for i in range(MAX_LEN)]


class ManagerMachine(RuleBasedStateMachine):
    """``blocks`` of the pool, and a bank's slots beside segments of ``segment`` tokens."""

    blocks = 130
    slots, segment, page_bytes = 23, SEGMENT, 16384

    @initialize()
    def start(self):
        sizes = {"bank_size": self.slots, "segment": self.segment, "page_bytes": self.page_bytes}
        self.manager = make_manager(self.blocks, caching=True, **sizes)
        self.layout = bank_spec(**sizes).layout
        self.free = self.manager.block_pool.get_num_free_blocks()
        self.waiting, self.running = [], []
        self.contents = {}
        self.count = self.hits = self.restored = self.copied = 0

    @rule(shared=st.integers(0, 250), tail=st.integers(1, 120), copies=st.integers(1, 2))
    def arrive(self, shared, tail, copies):
        """A new prompt that shares a prefix with others; n > 1 siblings are equal prompts."""
        prompt = BASE[:shared] + [1000 + (shared * tail + i) % 3 for i in range(tail)]
        for _ in range(copies):
            self.waiting.append(make_request(f"r{self.count}", list(prompt), caching=True))
            self.count += 1

    @rule(data=st.data(), budget=st.integers(1, 160))
    def step(self, data, budget):
        """One scheduler step and its forward."""
        self.manager.new_step_starts()
        scheduled = []
        for request in list(self.running):
            if request not in self.running or budget <= 0:
                continue
            tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            if tokens <= 0:
                continue
            while self.manager.allocate_slots(request, tokens) is None:
                victim = self.running[-1]
                self.preempt(victim)
                scheduled = [entry for entry in scheduled if entry[0] is not victim]
                if victim is request:
                    break
            else:
                scheduled.append((request, request.num_computed_tokens, tokens))
                budget -= tokens
        while self.waiting and budget > 0:
            request = self.waiting[0]
            found, hit, _ = self.manager.get_computed_blocks(request)
            assert hit % self.segment == 0
            tokens = min(request.num_tokens - hit, budget)
            if self.manager.allocate_slots(request, tokens, hit, found) is None:
                break
            self.hits += hit > 0
            self.restored += hit
            self.waiting.pop(0)
            self.running.append(request)
            request.num_computed_tokens = hit
            scheduled.append((request, hit, tokens))
            budget -= tokens
        copies, retained = self.manager.take_kv_cache_block_copies()
        before = {copy.dst_block_id: self.contents.get(copy.src_block_id) for copy in copies}
        self.contents.update(before)
        self.manager.block_pool.free_blocks(retained)
        for request, start, tokens in scheduled:
            self.forward(request, start, tokens)
        for request, start, tokens in scheduled:
            request.num_computed_tokens = start + tokens
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids([data.draw(st.integers(2000, 2001))])
            if request.num_tokens >= MAX_LEN:
                self.finish(request)

    def pages_of(self, slots):
        """Which pages hold the header and the first ``slots`` slots, counted in claiming order."""
        layout = self.layout
        last_unit = (layout.header_rows + 2 * slots) * layout.parts - 1
        return range(last_unit // layout.units_per_page + 1)

    def forward(self, request, start, tokens):
        """Read the bank of the prefix, copy it where asked, and leave the bank after the tokens."""
        row, size = held(self.manager, request, BANK), self.segment
        known, end = tuple(request.all_token_ids), start + tokens
        position = start
        while position < end:
            read, upto = position // size * size, min(end, (position // size + 1) * size)
            counted = self.pages_of(min(read, self.slots)) if read else ()
            for i in counted:
                assert self.contents.get(row[i]) == (known[:read], i), (request.request_id, read, i)
            if position == read and tokens > 1:
                self.copy_bank(row, read, counted)
            reached = min(upto, self.slots)
            mine = self.pages_of(self.slots) if upto > size else self.pages_of(reached)
            # Pages claimed behind them are never read before they are written.
            for i in mine:
                left = upto // size * size
                whole = left and i in self.pages_of(min(left, self.slots))
                self.contents[row[i]] = (known[:left], i) if whole else None
            position = upto

    def copy_bank(self, row, read, counted):
        """What a worker does at a boundary: its columns say where to, if anywhere."""
        pages = len(self.pages_of(self.slots))
        every = -(-pages * BLOCK // self.segment) * self.segment
        if not read or read % every:
            return
        first = self.layout.num_pages + (read // every - 1) * pages
        targets = row[first : first + len(counted)]
        assert len(targets) == len(counted), "a worker would read what stood there before"
        if not all(targets):
            return
        self.copied += 1
        for i, target in zip(counted, targets, strict=True):
            assert self.manager.block_pool.blocks[target].block_hash is None
            self.contents[target] = self.contents[row[i]]

    def preempt(self, request):
        self.manager.free(request)
        self.running.remove(request)
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)

    def finish(self, request):
        self.manager.free(request)
        self.running.remove(request)

    @rule(data=st.data())
    def preempt_any(self, data):
        if self.running:
            self.preempt(data.draw(st.sampled_from(self.running)))

    @rule(data=st.data())
    def abort_any(self, data):
        if self.running:
            self.finish(data.draw(st.sampled_from(self.running)))
        if self.waiting:
            gone = data.draw(st.sampled_from(self.waiting))
            self.manager.free(gone)
            self.waiting.remove(gone)

    @invariant()
    def pages_are_nobody_elses(self):
        if not hasattr(self, "manager"):
            return
        banks = [b for request in self.running for b in held(self.manager, request, BANK) if b]
        attention = {b for request in self.running for b in held(self.manager, request, ATTENTION)}
        assert len(banks) == len(set(banks))
        assert attention.isdisjoint(banks)
        blocks = self.manager.block_pool.blocks
        assert all(blocks[block].ref_cnt == 1 for block in banks)

    def teardown(self):
        if not hasattr(self, "manager"):
            return
        for request in list(self.running):
            self.finish(request)
        _copies, retained = self.manager.take_kv_cache_block_copies()
        self.manager.block_pool.free_blocks(retained)
        self.manager.new_step_starts()
        assert self.manager.block_pool.get_num_free_blocks() == self.free
        assert all(b.ref_cnt == 0 for b in self.manager.block_pool.blocks if not b.is_null)
        TOTALS["hits"] += self.hits
        TOTALS["restored"] += self.restored
        TOTALS["copied"] += self.copied


class RoomyMachine(ManagerMachine):
    """So many blocks that nothing is evicted: long-lived snapshots and many hits."""

    blocks, page_bytes = 600, 4096


class ShortSegmentsMachine(ManagerMachine):
    """Banks that no segment fills: a snapshot's pages grow from one boundary to the next."""

    blocks, slots, segment = 250, 40, 16


class OneMoreMachine(ManagerMachine):
    """A bank one slot larger than a segment."""

    blocks, slots, segment = 250, 33, 32


TOTALS = {"hits": 0, "restored": 0, "copied": 0}
MACHINES = [ManagerMachine, RoomyMachine, ShortSegmentsMachine, OneMoreMachine]


@pytest.mark.parametrize("machine", MACHINES)
def test_thousands_of_random_steps(machine):
    TOTALS.update(hits=0, restored=0, copied=0)
    case = machine.TestCase()
    case.settings = settings(
        # What Hypothesis draws depends on the modules that are loaded, so few examples may miss.
        max_examples=300,
        stateful_step_count=60,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    case.runTest()
    assert TOTALS["hits"] > 20
    assert TOTALS["restored"] > 20 * machine.segment
    assert TOTALS["copied"] > 5
