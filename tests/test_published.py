"""Driven in forwards of exactly S tokens, the published rules give our state slot by slot."""

import pytest
import torch
from published import PublishedBank
from test_ops import activations, paged_store

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.ops.update import Header, advance


@pytest.mark.parametrize(("bank_size", "segment", "width"), [(7, 24, 62), (23, 48, 344)])
def test_state_equals_the_published_algorithm(bank_size, segment, width):
    settings = {
        "preset": "official",
        "bank_size": bank_size,
        "segment_size": segment,
        "max_insertions": bank_size,
    }
    rules = PaceConfig.from_sources(settings).rules()
    layout = BankLayout.plan(rules, width, torch.float32, page_bytes=4096)
    store = paged_store(layout, torch.float32)
    published = PublishedBank(bank_size, width)
    kinds = torch.zeros(3)
    for start in range(0, 12 * segment, segment):
        # Topics come and go, each with a share of its tokens that are much alike.
        topic = start // (3 * segment)
        a = activations(segment, width, seed=topic) + 0.3 * activations(segment, width, start)
        a[segment // 3 :] += 6 * activations(1, width, seed=100 + topic)
        o, progress = advance(store, a, start, rules)
        torch.testing.assert_close(o, published.step(a), rtol=1e-5, atol=2e-6)
        header = Header.unpack(store.read_words())
        valid = int(published.valid.sum())
        assert int(header.valid) == progress.committed.valid == valid
        assert header.usage[:valid].tolist() == published.usage[:valid].tolist()
        keys, values = store.read_keys(valid), store.read_values(valid)
        torch.testing.assert_close(keys, published.keys[:valid], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(values, published.values[:valid], rtol=1e-5, atol=2e-6)
        kinds += torch.tensor([progress.high, progress.mid, progress.low])
    assert kinds.min() > 0
    assert valid == bank_size
