"""The manager under random arrivals, chunks, preemptions, hits, aborts and forks, against a model.

The model follows what vLLM's workers would do with the blocks: copies before a forward, then the
forward itself, which leaves in a request's pages the bank of its prefix up to the last segment end.
"""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_manager import ATTENTION, BANK, SEGMENT, bank_spec, held, make_manager, make_request

LAYOUT = bank_spec().layout
PAGES = LAYOUT.committed_pages
MAX_LEN = 400
BASE = [7919 * i % 211 for i in range(MAX_LEN)]


class ManagerMachine(RuleBasedStateMachine):
    blocks = 130

    @initialize()
    def start(self):
        self.manager = make_manager(self.blocks, caching=True)
        self.free = self.manager.block_pool.get_num_free_blocks()
        self.waiting, self.running = [], []
        self.contents = {}
        self.count = self.hits = self.restored = 0

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
            assert hit % SEGMENT == 0
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

    def forward(self, request, start, tokens):
        """Read the bank of the prefix, and leave the bank after these tokens."""
        pages = held(self.manager, request, BANK)
        assert len(pages) >= LAYOUT.pages_for(start + tokens)
        known = tuple(request.all_token_ids)
        read, left = start // SEGMENT * SEGMENT, (start + tokens) // SEGMENT * SEGMENT
        for i, page in enumerate(pages[:PAGES]):
            if read:
                assert self.contents.get(page) == (known[:read], i), (request.request_id, read, i)
            self.contents[page] = (known[:left], i) if left else None

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
        banks = [b for request in self.running for b in held(self.manager, request, BANK)]
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
        assert self.manager.block_pool.get_num_free_blocks() == self.free
        assert all(b.ref_cnt == 0 for b in self.manager.block_pool.blocks if not b.is_null)
        TOTALS["hits"] += self.hits
        TOTALS["restored"] += self.restored


class RoomyMachine(ManagerMachine):
    """So many blocks that nothing is evicted: long-lived snapshots and many hits."""

    blocks = 600


TOTALS = {"hits": 0, "restored": 0}


@pytest.mark.parametrize("machine", [ManagerMachine, RoomyMachine])
def test_thousands_of_random_steps(machine):
    TOTALS.update(hits=0, restored=0)
    case = machine.TestCase()
    case.settings = settings(
        max_examples=40,
        stateful_step_count=60,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    case.runTest()
    assert TOTALS["hits"] > 20
    assert TOTALS["restored"] > 20 * SEGMENT
