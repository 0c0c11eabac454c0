"""The scheduler's side of a bank: vLLM's own KV cache manager driving ours."""

import pytest
import torch
from vllm.distributed.kv_events import BlockStored
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from pacellm_vllm.compat import key_hashes_of
from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.memory.cache import SnapshotCache
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.spec import PagedBankManager, PagedBankSpec
from pacellm_vllm.request import RequestSettings

BLOCK = 16
SEGMENT = 64
ATTENTION, BANK = 0, 1
# Those of an engine with memory, and of one without.
HASHER, PLAIN_HASHER = (kv_cache_utils.get_request_block_hasher(BLOCK, sha256) for _ in range(2))
key_hashes_of(HASHER)


def bank_spec(page_bytes=4096, drafts=0, bank_size=23, segment=SEGMENT, caching=True, layers=2):
    rules = PaceConfig.from_sources({"bank_size": bank_size, "segment_size": segment}).rules()
    return PagedBankSpec(
        block_size=BLOCK,
        num_kv_heads=1,
        head_size=page_bytes // 2,
        dtype=torch.uint8,
        layout=BankLayout.plan(rules, 344, torch.float32, page_bytes, drafts),
        rules=rules,
        num_layers=layers,
        max_model_len=2048,
        max_step_tokens=512,
        copied=caching,
        summary="layers 1, 3 of 4, preset gentle",
    )


def make_manager(blocks, caching, drafts=0, groups=1, events=False, watermark=0.0, **sizes):
    kv_cache_utils.init_none_hash(sha256)
    attention = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32
    )
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec([f"model.layers.{i}.self_attn.attn" for i in range(4)], attention),
            KVCacheGroupSpec(
                [f"model.layers.{i}.mlp.memory" for i in (1, 3)],
                bank_spec(drafts=drafts, caching=caching, **sizes),
            ),
            *(
                KVCacheGroupSpec([f"model.layers.{i}.self_attn.attn"], window(4096 + i))
                for i in range(1, groups)
            ),
        ],
    )
    return KVCacheManager(
        config,
        max_model_len=2048,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=caching,
        enable_kv_cache_events=events,
        watermark=watermark,
    )


def window(tokens):
    return SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=tokens
    )


def place(manager, request, tokens, until=None):
    """Look a new request up and place ``tokens`` of it; how many it found, None if it must wait."""
    found, hit, _ = manager.get_computed_blocks(request)
    tokens = min(tokens, (until or request.num_tokens) - hit)
    if manager.allocate_slots(request, tokens, hit, found, full_sequence_must_fit=True) is None:
        return None
    request.num_computed_tokens = hit + tokens
    return hit


def run(manager, request, chunk):
    """Place a request and read all of it in forwards of ``chunk`` tokens, and end it."""
    manager.new_step_starts()
    hit = place(manager, request, chunk)
    if hit is None:
        return None
    while True:
        _, retained = manager.take_kv_cache_block_copies()
        manager.block_pool.free_blocks(retained)
        left = min(chunk, request.num_tokens - request.num_computed_tokens)
        if not left:
            break
        manager.new_step_starts()
        assert manager.allocate_slots(request, left) is not None
        request.num_computed_tokens += left
    manager.free(request)
    return hit


def make_request(
    name, tokens, caching, extra=None, max_tokens=64, resumable=False, hasher=HASHER, **more
):
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=max_tokens, extra_args=extra),
        pooling_params=None,
        resumable=resumable,
        block_hasher=hasher if caching else None,
        **more,
    )


def picture(name):
    return MultiModalFeatureSpec(None, "image", name, PlaceholderRange(0, SEGMENT))


def held(manager, request, group):
    table = manager.coordinator.single_type_managers[group].req_to_blocks
    return [block.block_id for block in table.get(request.request_id, ())]


@pytest.mark.parametrize("caching", [False, True])
def test_pages_grow_front_to_back_never_move_and_all_come_back(caching):
    manager = make_manager(400, caching)
    pool = manager.block_pool
    free = pool.get_num_free_blocks()
    layout = bank_spec().layout
    assert isinstance(manager.coordinator.single_type_managers[BANK], PagedBankManager)
    requests = [make_request(f"r{i}", [i] * 150, caching) for i in range(5)]
    owner = {}
    for request in requests:
        blocks, hit, _ = manager.get_computed_blocks(request)
        assert hit == 0
        before = []
        for step, tokens in enumerate((10, 30, 24, 1, 70, 1, 1)):
            new = manager.allocate_slots(request, tokens, 0, blocks if step == 0 else None)
            request.num_computed_tokens += tokens
            pages = held(manager, request, BANK)
            own = [page for page in pages if page]
            assert len(own) == layout.pages_for(request.num_computed_tokens)
            assert own == pages[: len(own)]
            assert pages[: len(before)] == before
            assert list(new.get_block_ids()[BANK]) == pages[len(before) :]
            before = pages
        for block in own + held(manager, request, ATTENTION):
            assert block not in owner, "two requests hold one block"
            owner[block] = request.request_id
    assert 0 not in owner
    assert free - pool.get_num_free_blocks() == len(owner)
    for request in requests:
        manager.free(request)
    assert pool.get_num_free_blocks() == free


def test_a_request_that_does_not_fit_takes_nothing():
    layout = bank_spec().layout
    need = -(-SEGMENT // BLOCK) + layout.pages_for(SEGMENT)
    manager = make_manager(2 * need, caching=False)
    pool = manager.block_pool
    first = make_request("first", [1] * SEGMENT, caching=False)
    assert manager.allocate_slots(first, SEGMENT) is not None
    left = pool.get_num_free_blocks()
    second = make_request("second", [2] * SEGMENT, caching=False)
    assert manager.allocate_slots(second, SEGMENT) is None
    assert pool.get_num_free_blocks() == left
    assert held(manager, second, BANK) == []
    manager.free(first)
    assert manager.allocate_slots(second, SEGMENT) is not None


@pytest.mark.parametrize(
    ("drafts", "prompt", "computed", "hit"),
    [
        (0, 100, 2 * SEGMENT, 2 * SEGMENT),
        # A turn of streamed input makes what was answered before part of the prompt.
        (0, -100, 2 * SEGMENT, 2 * SEGMENT),
        (3, -100, 2 * SEGMENT, 0),
        (3, -100, 2 * SEGMENT + 3, 2 * SEGMENT),
        # The last three of these tokens may be drafts, which the bank does not hold yet.
        (3, 100, 2 * SEGMENT, 0),
        (3, 100, 2 * SEGMENT + 2, 0),
        (3, 100, 2 * SEGMENT + 3, 2 * SEGMENT),
        (3, 100, 3 * SEGMENT - 1, 2 * SEGMENT),
        # Nor what came in a last step of the prompt that is as short as one of drafts.
        (3, 2 * SEGMENT, 2 * SEGMENT, 0),
    ],
)
def test_a_bank_that_drafts_may_be_missing_from_is_no_snapshot(drafts, prompt, computed, hit):
    manager = make_manager(400, True, drafts)
    tokens = list(range(4 * SEGMENT))
    streamed, prompt = prompt < 0, abs(prompt)
    request = make_request("first", tokens[:prompt], True, max_tokens=200, resumable=streamed)
    for length in sorted({prompt, computed}):
        request.append_output_token_ids(tokens[request.num_tokens : length + 1])
        manager.allocate_slots(request, length - request.num_computed_tokens)
        request.num_computed_tokens = length
    if streamed:
        request.num_prompt_tokens = computed + 40
    manager.free(request)
    again = make_request("again", tokens, True, max_tokens=200)
    assert manager.get_computed_blocks(again)[1] == hit


def columns(manager, request):
    """What stands behind a request's own pages in its row."""
    return held(manager, request, BANK)[bank_spec().layout.num_pages :]


def test_copies_made_in_this_step_are_found_in_the_next():
    manager = make_manager(400, caching=True)
    spec = bank_spec()
    pages, every = spec.layout.committed_pages(8 * SEGMENT), spec.grid.interval
    assert (pages, every) == (16, 4 * SEGMENT)
    tokens = list(range(3 * every))
    first, second, third = (make_request(name, tokens, caching=True) for name in "abc")
    manager.new_step_starts()
    assert place(manager, first, 2 * every + 1) == 0
    assert place(manager, second, 2 * every + 1) == 0
    copies = columns(manager, first)
    assert len(copies) == 2 * pages
    assert len(set(copies)) == 2 * pages
    # What a neighbour copies in this very step is not copied twice.
    assert columns(manager, second) == [0] * 2 * pages
    manager.new_step_starts()
    assert columns(manager, first) == [0] * 2 * pages
    assert place(manager, third, every) == 2 * every
    moved, retained = manager.take_kv_cache_block_copies()
    assert [copy.src_block_id for copy in moved] == copies[pages:]
    assert [copy.dst_block_id for copy in moved] == held(manager, third, BANK)[:pages]
    manager.block_pool.free_blocks(retained)
    for request in (first, second, third):
        manager.free(request)
    manager.new_step_starts()
    assert all(block.ref_cnt == 0 for block in manager.block_pool.blocks if not block.is_null)


@pytest.mark.parametrize("spare", range(0, 60, 10))
def test_copies_keep_no_request_waiting_behind_the_watermark(spare):
    layout, tokens = bank_spec().layout, 8 * SEGMENT
    need = tokens // BLOCK + layout.pages_for(tokens)
    blocks = 1 + need + 20 + spare
    manager = make_manager(blocks, caching=True, watermark=20 / blocks)
    assert manager.watermark_blocks == 20
    request = make_request("r", list(range(tokens)), caching=True)
    manager.new_step_starts()
    assert manager.allocate_slots(request, tokens, has_scheduled_reqs=True) is not None


@pytest.mark.parametrize("caching", [False, True])
def test_streamed_requests_are_counted(caching):
    manager = make_manager(400, caching)
    ours = manager.coordinator.single_type_managers[BANK]
    requests = [make_request(name, [1] * 99, caching, resumable=name != "c") for name in "abc"]
    for request in requests:
        manager.allocate_slots(request, 99)
    assert ours.counts().streams == 2
    manager.free(requests[0])
    assert ours.counts().streams == 1


def test_copies_of_a_forward_that_never_ran_are_not_found():
    manager = make_manager(400, caching=True)
    tokens = list(range(8 * SEGMENT))
    victim = make_request("victim", tokens, caching=True)
    manager.new_step_starts()
    manager.allocate_slots(victim, 5 * SEGMENT)
    assert any(columns(manager, victim))
    # Preempted in the step that placed it: what it has computed was not advanced.
    manager.free(victim)
    manager.new_step_starts()
    assert manager.get_computed_blocks(make_request("again", tokens, True))[1] == 0
    assert all(block.ref_cnt == 0 for block in manager.block_pool.blocks if not block.is_null)


def test_copies_at_a_boundary_that_no_forward_has_crossed_are_not_found():
    manager = make_manager(400, caching=True)
    every = bank_spec().grid.interval
    tokens = list(range(2 * every))
    victim = make_request("victim", tokens, caching=True)
    manager.new_step_starts()
    place(manager, victim, every)
    own = held(manager, victim, BANK)[: bank_spec().layout.committed_pages(every)]
    manager.new_step_starts()
    manager.allocate_slots(victim, every)
    assert any(columns(manager, victim))
    # Preempted in the step that would have made the copies.
    manager.free(victim)
    found, hit, _ = manager.get_computed_blocks(make_request("again", tokens, caching=True))
    assert hit == every
    assert found.get_block_ids()[BANK] == own


@pytest.mark.parametrize("chunk", [2, 7, 64, 100, 512, 2000])
@pytest.mark.parametrize(("bank_size", "segment"), [(23, 64), (100, 64), (23, 512), (60, 16)])
def test_a_shared_prefix_is_found_however_it_was_read(chunk, bank_size, segment):
    """Up to the last boundary inside it; boundaries are as far apart as copies are large."""
    manager = make_manager(3000, True, bank_size=bank_size, segment=segment)
    spec = bank_spec(bank_size=bank_size, segment=segment)
    units = (spec.layout.header_rows + 2 * bank_size) * spec.layout.parts
    blocks = -(-units // spec.layout.units_per_page)
    every = -(-blocks * BLOCK // segment) * segment
    for shared in (segment // 2, segment + 3, every, every + 1, min(5 * segment + 9, 1600), 1100):
        system = [100 * shared + i for i in range(shared)]
        first = make_request("first", system + [7] * 130, True, max_tokens=1000)
        second = make_request("second", system + [8] * 90, True, max_tokens=1000)
        assert run(manager, first, chunk) == 0
        assert run(manager, second, chunk) == shared // every * every


def test_what_fits_alone_is_scheduled_whatever_the_cache_holds():
    """From one block too few to plenty: warm exactly where cold, and what was hit comes back."""
    layout = bank_spec().layout
    tokens = list(range(500))
    need = -(-500 // BLOCK) + layout.num_pages
    for blocks in range(need - 1, need + 4 * layout.num_pages):
        for chunk in (48, 500):
            manager = make_manager(1 + blocks, caching=True)
            hits = [run(manager, make_request(f"{i}", tokens, True), chunk) for i in range(4)]
            assert (None in hits) is (blocks < need), (blocks, chunk, hits)
            if blocks >= need:
                assert hits[1] > 0
                free = manager.block_pool.get_num_free_blocks()
                assert free == blocks, (blocks, chunk)


def test_restores_in_one_step_are_few_and_the_rest_come_next():
    manager = make_manager(4000, caching=True)
    bank = manager.coordinator.single_type_managers[BANK]
    tokens = list(range(9 * SEGMENT))
    run(manager, make_request("first", tokens, True), 512)
    bank._max_restored_a_step = 3
    requests = [make_request(f"r{i}", tokens, True) for i in range(7)]
    waiting, steps = list(requests), []
    while waiting:
        manager.new_step_starts()
        placed = []
        for request in list(waiting):
            if place(manager, request, 512) is None:
                break
            placed.append(request)
            waiting.remove(request)
        copies, retained = manager.take_kv_cache_block_copies()
        manager.block_pool.free_blocks(retained)
        steps.append((len(placed), len(copies)))
    pages = bank_spec().layout.committed_pages(8 * SEGMENT)
    assert steps == [(3, 3 * pages), (3, 3 * pages), (1, pages)]


def test_snapshots_larger_than_a_step_may_restore_come_one_a_step():
    manager = make_manager(4000, caching=True, layers=10**6)
    tokens = list(range(9 * SEGMENT))
    run(manager, make_request("first", tokens, True), 512)
    second, third = (make_request(name, tokens, True) for name in ("second", "third"))
    manager.new_step_starts()
    assert place(manager, second, 512) == 8 * SEGMENT
    assert place(manager, third, 512) is None
    manager.new_step_starts()
    assert place(manager, third, 512) == 8 * SEGMENT


def test_snapshots_are_counted_one_by_one():
    manager = make_manager(400, caching=True)
    bank = manager.coordinator.single_type_managers[BANK]
    every, tokens = bank_spec().grid.interval, list(range(9 * SEGMENT))
    assert len(tokens) // every == 2
    for i in range(2):
        run(manager, make_request(f"{i}", tokens, True), 512)
        counts = bank.counts()
        # At two boundaries of the prompt, and at its end.
        assert (counts.published, counts.evicted) == (3, 0)
    assert (counts.hit, counts.hit_tokens) == (1, 2 * every)
    manager.block_pool.get_new_blocks(manager.block_pool.get_num_free_blocks())
    assert bank.counts().evicted == 3


@pytest.mark.parametrize("groups", [1, 6])
def test_copies_preempt_nobody(groups):
    """Whoever could be placed beside a reader without caching can be placed beside one with it."""

    def placed(blocks, caching):
        manager = make_manager(blocks, caching, groups=groups)
        reader = make_request("reader", list(range(1900)), True)
        other = make_request("other", [5000 + i for i in range(300)], True)
        outcome = []
        for tokens in (100, 400, 400, 300):
            manager.new_step_starts()
            for request in (reader, other):
                step = min(tokens, request.num_tokens - request.num_computed_tokens)
                if not step:
                    continue
                outcome.append(manager.allocate_slots(request, step) is not None)
                if outcome[-1]:
                    request.num_computed_tokens += step
        return outcome

    need = 1 + groups * (-(-1200 // BLOCK) + -(-300 // BLOCK)) + 2 * bank_spec().layout.num_pages
    for blocks in range(need - 40, need + 60):
        assert placed(blocks, True) == placed(blocks, False), blocks


def test_events_never_mention_bank_pages():
    manager = make_manager(60, caching=True, events=True)
    known = set()
    for i in range(12):
        tokens = [1000 * (i % 3) + j for j in range(5 * SEGMENT)]
        request = make_request(f"r{i}", tokens, True, extra={"kv_cache_report_mode": "full"})
        assert run(manager, request, 512) is not None
        for event in manager.take_events():
            assert event.group_idx == ATTENTION
            if isinstance(event, BlockStored):
                known |= set(event.block_hashes)
            else:
                assert set(event.block_hashes) <= known
    assert known


def test_what_a_request_put_into_the_cache_is_counted_as_without_memory():
    manager = make_manager(400, caching=True)
    request = make_request("r", list(range(333)), True)
    manager.allocate_slots(request, 333)
    assert manager.estimate_cached_tokens(request) == 333 // BLOCK * BLOCK


def test_tokens_still_in_flight_are_not_donated():
    manager = make_manager(400, caching=True)
    request = make_request("ahead", list(range(2 * SEGMENT - 1)), caching=True)
    manager.allocate_slots(request, 2 * SEGMENT)
    # An asynchronous step computes a token whose value the scheduler does not know yet.
    request.num_computed_tokens = 2 * SEGMENT
    manager.free(request)
    again = make_request("again", list(range(2 * SEGMENT + 5)), caching=True)
    assert manager.get_computed_blocks(again)[1] == 0


def test_streamed_input_may_still_grow_and_pays_from_the_start():
    manager = make_manager(400, caching=True)
    layout = bank_spec().layout
    off = {"pacellm_enabled": False}
    for name, resumable, extra in (
        ("short", False, None),
        ("streamed", True, None),
        ("off", True, off),
    ):
        request = make_request(name, [1] * 20, True, extra, max_tokens=4, resumable=resumable)
        manager.allocate_slots(request, 20)
        pages = held(manager, request, BANK)
        if name == "streamed":
            assert len(pages) == layout.pages_for(20)
            assert 0 not in pages
        else:
            assert pages == [0] * layout.num_pages


def test_requests_without_a_bank_give_back_what_they_took():
    manager = make_manager(400, caching=True)
    free = manager.block_pool.get_num_free_blocks()
    for extra, tokens in (({"pacellm_enabled": False}, 6 * SEGMENT), (None, 1)):
        request = make_request("r", list(range(tokens)), True, extra, max_tokens=3)
        for start in range(0, tokens, SEGMENT):
            manager.new_step_starts()
            manager.allocate_slots(request, min(SEGMENT, tokens))
            request.num_computed_tokens = start + SEGMENT
            assert held(manager, request, BANK) == [0] * bank_spec().layout.num_pages
        assert manager.take_kv_cache_block_copies()[0] == []
        manager.free(request)
        assert manager.block_pool.get_num_free_blocks() == free


def test_block_hashes_tell_settings_apart():
    make_manager(60, caching=True)
    prompt = list(range(3 * SEGMENT))
    asks = [None, {"pacellm_alpha": 0.5}, {"pacellm_noise": 0.5}, {"pacellm_enabled": False}]
    asks += [{"pacellm": {"alpha": 0.5}}, {"other": 1}, {"pacellm_enabled": True}]
    hashes = [tuple(make_request("r", prompt, True, extra).block_hashes) for extra in asks]
    assert hashes[4] == hashes[1]
    assert hashes[5] == hashes[6] == hashes[0]
    for i in range(len(hashes[0])):
        assert len({blocks[i] for blocks in hashes[:4]}) == 4


@pytest.mark.parametrize(
    "keys",
    [
        [{"cache_salt": salt} for salt in ("one", "two")],
        [{"lora_request": LoRARequest(name, i, name)} for i, name in enumerate("ab", 1)],
        [{"mm_features": [picture(name)]} for name in "ab"],
    ],
    ids=["salt", "LoRA", "picture"],
)
def test_a_requests_own_settings_do_not_hide_what_else_its_hashes_tell_apart(keys):
    make_manager(60, caching=True)
    extra = {"pacellm_alpha": 0.5}
    one, two = (make_request("r", [7] * SEGMENT, True, extra, **key).block_hashes for key in keys)
    assert set(one).isdisjoint(two)


def test_a_requests_settings_are_read_once(monkeypatch):
    """And not at every block: a prompt of 200,000 tokens has 12,500."""
    read, of = [], RequestSettings.of
    monkeypatch.setattr(RequestSettings, "of", lambda given: read.append(given) or of(given))
    manager = make_manager(200, caching=True)
    request = make_request("it", list(range(1000)), True, {"pacellm_alpha": 0.5})
    assert len(request.block_hashes) == 1000 // BLOCK
    manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, 100) is not None
    assert len(read) == 1


@pytest.mark.parametrize(
    "extra", [{"pacellm_alpha": 0.5}, {"pacellm_alpha": 3}, {"pacellm": "[["}, {"pacellm_x": 1}]
)
def test_block_hashes_look_at_settings_in_engines_with_memory_only_and_never_raise(extra):
    make_manager(60, caching=True)
    prompt = list(range(2 * SEGMENT))
    plain = make_request("r", prompt, True).block_hashes
    assert make_request("r", prompt, True, extra, hasher=PLAIN_HASHER).block_hashes == plain
    assert set(make_request("r", prompt, True, extra).block_hashes).isdisjoint(plain)


def test_what_the_scheduler_refuses_names_the_request():
    manager = make_manager(blocks=64, caching=True)
    ours = manager.coordinator.single_type_managers[BANK]
    with pytest.raises(
        NotImplementedError, match=r"serve without KV transfer \(request 'one'\)\.$"
    ):
        ours.allocate_external_computed_blocks("one", 0, 64)
    # Settings that no front end has looked at.
    unchecked = Request(
        "another",
        [1] * 200,
        SamplingParams(max_tokens=8, extra_args={"pacellm_alpha": 7}),
        None,
        block_hasher=None,
    )
    with pytest.raises(PaceConfigError, match=r"alpha = 7 .*from 0 to 1 \(request 'another'\)\.$"):
        manager.get_computed_blocks(unchecked)


def test_a_hit_is_of_one_snapshot_where_another_of_its_prefix_was_evicted_in_part():
    kv_cache_utils.init_none_hash(sha256)
    layout = bank_spec().layout
    pages = layout.committed_pages(SEGMENT)
    pool = BlockPool(3 * pages, True, BLOCK)
    cache = SnapshotCache(pool, layout, [BANK])
    hashes = make_request("any", list(range(SEGMENT)), True).block_hashes
    first = pool.get_new_blocks(pages)
    cache.publish(first, hashes, SEGMENT)
    pool.free_blocks(reversed(first))
    # All but the first page of it: what is evicted first is what was freed first.
    others = pool.get_new_blocks(pool.get_num_free_blocks() - 1)
    assert cache.find(hashes, SEGMENT) is None
    pool.free_blocks(others)
    second = pool.get_new_blocks(pages)
    cache.publish(second, hashes, SEGMENT)
    found = cache.find(hashes, SEGMENT)
    assert [block for [block] in found] == second
