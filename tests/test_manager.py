"""The scheduler's side of a bank: vLLM's own KV cache manager driving ours."""

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.request import Request

from pacellm_vllm.compat import key_hashes_of
from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.spec import PagedBankManager, PagedBankSpec

BLOCK = 16
SEGMENT = 64
ATTENTION, BANK = 0, 1
# Those of an engine with memory, and of one without.
HASHER, PLAIN_HASHER = (kv_cache_utils.get_request_block_hasher(BLOCK, sha256) for _ in range(2))
key_hashes_of(HASHER)


def bank_spec(page_bytes=4096, drafts=0):
    rules = PaceConfig.from_sources({"bank_size": 23, "segment_size": SEGMENT}).rules()
    return PagedBankSpec(
        block_size=BLOCK,
        num_kv_heads=1,
        head_size=page_bytes // 2,
        dtype=torch.uint8,
        layout=BankLayout.plan(rules, 344, torch.float32, page_bytes, drafts),
        num_layers=2,
        max_model_len=2048,
        summary="layers 1, 3 of 4, preset official",
    )


def make_manager(blocks, caching, drafts=0):
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
                [f"model.layers.{i}.mlp.memory" for i in (1, 3)], bank_spec(drafts=drafts)
            ),
        ],
    )
    return KVCacheManager(
        config,
        max_model_len=2048,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=caching,
    )


def make_request(name, tokens, caching, extra=None, max_tokens=64, resumable=False, hasher=HASHER):
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=max_tokens, extra_args=extra),
        pooling_params=None,
        resumable=resumable,
        block_hasher=hasher if caching else None,
    )


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
            assert len(pages) == layout.pages_for(request.num_computed_tokens)
            assert pages[: len(before)] == before
            assert list(new.get_block_ids()[BANK]) == pages[len(before) :]
            before = pages
        for block in before + held(manager, request, ATTENTION):
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
        # The last three of these tokens may be drafts, which the bank does not hold yet.
        (3, 100, 2 * SEGMENT, 0),
        (3, 100, 2 * SEGMENT + 2, 0),
        (3, 100, 2 * SEGMENT + 3, 2 * SEGMENT),
        (3, 100, 3 * SEGMENT - 1, 2 * SEGMENT),
        (3, 2 * SEGMENT, 2 * SEGMENT, 2 * SEGMENT),
    ],
)
def test_a_bank_that_drafts_may_be_missing_from_is_no_snapshot(drafts, prompt, computed, hit):
    manager = make_manager(400, True, drafts)
    tokens = list(range(4 * SEGMENT))
    request = make_request("first", tokens[:prompt], True, max_tokens=200)
    for length in sorted({prompt, computed}):
        request.append_output_token_ids(tokens[request.num_tokens : length + 1])
        manager.allocate_slots(request, length - request.num_computed_tokens)
        request.num_computed_tokens = length
    manager.free(request)
    again = make_request("again", tokens, True, max_tokens=200)
    assert manager.get_computed_blocks(again)[1] == hit


def test_a_snapshot_published_in_this_step_is_copied_from_its_source():
    manager = make_manager(400, caching=True)
    pages = bank_spec().layout.committed_pages
    tokens = list(range(8 * SEGMENT))
    first, second = (make_request(name, tokens, caching=True) for name in ("first", "second"))
    manager.new_step_starts()
    manager.allocate_slots(first, 6 * SEGMENT)
    first.num_computed_tokens = 6 * SEGMENT
    manager.new_step_starts()
    manager.allocate_slots(first, SEGMENT)
    blocks, hit, _ = manager.get_computed_blocks(second)
    assert hit == 6 * SEGMENT
    manager.allocate_slots(second, 1, hit, blocks)
    copies, retained = manager.take_kv_cache_block_copies()
    published, restored = copies[:pages], copies[pages:]
    mine, theirs = held(manager, first, BANK), held(manager, second, BANK)
    assert [copy.src_block_id for copy in published] == mine[:pages]
    assert [copy.src_block_id for copy in restored] == mine[:pages]
    assert [copy.dst_block_id for copy in restored] == theirs[:pages]
    manager.block_pool.free_blocks(retained)
    for request in (first, second):
        manager.free(request)
    assert all(block.ref_cnt == 0 for block in manager.block_pool.blocks if not block.is_null)


def test_tokens_still_in_flight_are_not_donated():
    manager = make_manager(400, caching=True)
    request = make_request("ahead", list(range(2 * SEGMENT - 1)), caching=True)
    manager.allocate_slots(request, 2 * SEGMENT)
    # An asynchronous step computes a token whose value the scheduler does not know yet.
    request.num_computed_tokens = 2 * SEGMENT
    manager.free(request)
    again = make_request("again", list(range(2 * SEGMENT + 5)), caching=True)
    assert manager.get_computed_blocks(again)[1] == 0


def test_snapshots_are_published_only_while_blocks_are_plenty():
    layout = bank_spec().layout
    length = 8 * SEGMENT
    need = length // BLOCK + layout.num_pages
    for spare, publishes in ((layout.committed_pages - 1, False), (100, True)):
        manager = make_manager(1 + need + spare, caching=True)
        request = make_request("only", list(range(length)), caching=True)
        manager.allocate_slots(request, length // 2)
        request.num_computed_tokens = length // 2
        manager.new_step_starts()
        assert manager.allocate_slots(request, length // 2) is not None
        copies, retained = manager.take_kv_cache_block_copies()
        assert bool(copies) is publishes
        manager.block_pool.free_blocks(retained)


def test_snapshots_take_no_more_blocks_than_they_make_reusable():
    manager = make_manager(2000, caching=True)
    pages = bank_spec().layout.committed_pages
    request = make_request("long", list(range(1900)), caching=True)
    copied = 0
    for start in range(0, 1900, 20):
        manager.new_step_starts()
        manager.allocate_slots(request, 20)
        request.num_computed_tokens = start + 20
        copies, retained = manager.take_kv_cache_block_copies()
        manager.block_pool.free_blocks(retained)
        copied += len(copies)
        assert copied <= request.num_computed_tokens // BLOCK
    assert copied >= 4 * pages


def test_a_session_may_still_grow_and_pays_from_the_start():
    manager = make_manager(400, caching=True)
    layout = bank_spec().layout
    for name, resumable in (("short", False), ("session", True)):
        request = make_request(name, [1] * 20, True, max_tokens=4, resumable=resumable)
        manager.allocate_slots(request, 20)
        pages = held(manager, request, BANK)
        if resumable:
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
    "extra", [{"pacellm_alpha": 0.5}, {"pacellm_alpha": 3}, {"pacellm": "[["}, {"pacellm_x": 1}]
)
def test_block_hashes_look_at_settings_in_engines_with_memory_only_and_never_raise(extra):
    make_manager(60, caching=True)
    prompt = list(range(2 * SEGMENT))
    plain = make_request("r", prompt, True).block_hashes
    assert make_request("r", prompt, True, extra, hasher=PLAIN_HASHER).block_hashes == plain
    assert set(make_request("r", prompt, True, extra).block_hashes).isdisjoint(plain)
