"""Which drafts are kept, case by case; and why the platform registers its kernels once."""

import sys
from types import ModuleType

import pytest
import torch
from vllm.triton_utils import dispatcher

from pacellm_vllm.platform import rejection

# Three requests with 3, 0 and 2 drafts; the tokens below are what the model itself would say.
CUMULATIVE = torch.tensor([3, 3, 5], dtype=torch.int32)
BEST = torch.tensor([5, 6, 7, 8, 9])
BONUS = torch.tensor([[50], [51], [52]])


def empty():
    return torch.full((3, 4), -1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("drafts", "kept"),
    [
        ([5, 6, 7, 8, 9], [[5, 6, 7, 50], [51, -1, -1, -1], [8, 9, 52, -1]]),
        ([5, 0, 7, 0, 9], [[5, 6, -1, -1], [51, -1, -1, -1], [8, -1, -1, -1]]),
        ([5, 6, -1, 8, -1], [[5, 6, 7, -1], [51, -1, -1, -1], [8, 9, -1, -1]]),
    ],
)
def test_greedy(drafts, kept):
    out = empty()
    args = (CUMULATIVE, torch.tensor(drafts, dtype=torch.int32), BEST, BONUS)
    rejection.rejection_greedy_sample_kernel(out, *args, None, 3, None, None, False)
    assert out.tolist() == kept
    out = empty()
    mixed = torch.tensor([False, True, True])
    rejection.rejection_greedy_sample_kernel(out, *args, mixed, 3, None, None, False)
    assert out.tolist() == [[-1] * 4, *kept[1:]]


def test_random_keeps_drafts_by_their_probability():
    drafts = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32)
    target = torch.zeros(5, 8)
    target[range(5), drafts.long()] = torch.tensor([0.9, 0.2, 1.0, 0.6, 0.6])
    out, chance = empty(), torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    recovered = torch.tensor([60, 61, 62, 63, 64], dtype=torch.int32)
    greedy = torch.tensor([False, True, False])
    args = (CUMULATIVE, drafts, None, target, BONUS, recovered, chance, greedy, 3, 8, None)
    rejection.rejection_random_sample_kernel(out, *args, True, False)
    assert out.tolist() == [[1, 61, -1, -1], [-1] * 4, [4, 5, 52, -1]]
    # Against a drafter's own probabilities: the share target / draft counts.
    out, draft = empty(), torch.full((5, 8), 0.25)
    args = (CUMULATIVE, drafts, draft, target, BONUS, recovered, chance, greedy, 3, 8, None)
    rejection.rejection_random_sample_kernel(out, *args, False, False)
    assert out.tolist() == [[1, 2, 3, 50], [-1] * 4, [4, 5, 52, -1]]


def test_recovered_tokens_are_never_the_rejected_draft():
    drafts = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32)
    target = torch.full((5, 8), 0.01)
    target[range(5), drafts.long()] = 0.9
    target[:, 7] = 0.05
    noise = torch.ones(3, 8)
    noise[2, 6] = 100.0
    for draft, kept in ((None, [7, 7, 7, 6, 6]), (target * 0.5, [1, 2, 3, 6, 6])):
        out = torch.empty(5, dtype=torch.int32)
        args = (CUMULATIVE, drafts, draft, target, noise, 8, 8, draft is None, False)
        rejection.sample_recovered_tokens_kernel(out, *args)
        assert out.tolist() == kept


def test_expand():
    out = torch.empty(5)
    rejection.expand_kernel(out, torch.tensor([0.0, 2.0, 3.0]), CUMULATIVE, 0.0, 1.0, 128)
    assert out.tolist() == [1, 1, 1, 3, 3]


def test_synthetic_acceptance_is_refused():
    with pytest.raises(NotImplementedError, match="Synthetic"):
        rejection.rejection_greedy_sample_kernel(
            empty(), CUMULATIVE, BEST, BEST, BONUS, None, 3, None, None, True
        )


class WithoutDict:
    """As some objects of llvmlite's are."""

    __dict__ = ()


def test_vllm_still_trips_over_objects_whose_attributes_are_no_dict(monkeypatch):
    """The reason for registering kernels once: with llvmlite loaded, a second time fails."""
    holder = ModuleType("holder")
    holder.value = WithoutDict()
    monkeypatch.setitem(sys.modules, "holder", holder)
    with pytest.raises(AttributeError, match="has no attribute 'get'"):
        dispatcher._rebind_kernels([])
