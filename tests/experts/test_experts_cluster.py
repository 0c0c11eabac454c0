"""Balanced clustering: equal clusters, near the optimum, the same each time, refusals."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pacellm_vllm.experts import cluster as module
from pacellm_vllm.experts.cluster import (
    assign_flow,
    assign_swaps,
    cluster,
    random_inertia,
)
from pacellm_vllm.experts.errors import ExpertsError


def mixture(seed, count, width, kinds, noise=0.5):
    """Rows [count, width] around ``kinds`` random directions, of very unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, width, generator=generator)
    share = torch.rand(kinds, generator=generator) ** 3
    kind = torch.multinomial(share, count, replacement=True, generator=generator)
    return centres[kind] + noise * torch.randn(count, width, generator=generator)


@pytest.fixture(params=["flow", "swaps"])
def assignment(request):
    if request.param == "flow":
        pytest.importorskip("ortools")
    return request.param


@pytest.mark.parametrize(("count", "experts"), [(96, 1), (96, 8), (344, 43), (63, 9), (40, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_is_a_permutation_into_equal_clusters(count, experts, dtype, assignment):
    features = mixture(0, count, 24, 7).to(dtype)
    found = cluster(features, experts, assignment=assignment)
    assert torch.equal(found.order.sort().values, torch.arange(count))
    assert torch.bincount(found.labels).tolist() == [count // experts] * experts
    size = count // experts
    for expert in range(experts):
        members = found.order[expert * size : (expert + 1) * size]
        assert torch.equal(members, (found.labels == expert).nonzero().squeeze(1))


def test_an_expert_for_each_neuron_needs_no_assignment(monkeypatch):
    """All pairs of neurons and experts would be 360 million at 7B."""
    for name in ("first_centres", "assign_flow", "assign_swaps"):
        monkeypatch.setattr(module, name, lambda *args: 1 / 0)
    found = cluster(mixture(0, 64, 8, 5), 64)
    assert torch.equal(found.order, torch.arange(64))
    assert (found.inertia, found.random_inertia) == (pytest.approx(0, abs=1e-5), 0)


def test_inertias_are_those_of_the_definition(assignment):
    features = mixture(1, 120, 16, 6)
    found = cluster(features, 6, assignment=assignment)
    rows = torch.nn.functional.normalize(features.double(), dim=1)

    def inertia(labels):
        parts = [rows[labels == label] for label in range(6)]
        return float(sum(((part - part.mean(0)) ** 2).sum() for part in parts))

    assert found.inertia == pytest.approx(inertia(found.labels), rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    splits = [inertia(torch.randperm(120, generator=generator) % 6) for _ in range(400)]
    assert found.random_inertia == pytest.approx(np.mean(splits), rel=2e-3)


def test_separate_clusters_are_found_whatever_the_lengths_of_rows(assignment):
    kind = torch.arange(8).repeat(12)
    rows = torch.eye(8).repeat_interleave(4, dim=1)[kind] + 0.01 * mixture(2, 96, 32, 1)
    features = rows * torch.logspace(-3, 3, 96)[:, None]
    best = min(cluster(features, 8, seed, assignment=assignment).inertia for seed in range(8))
    right = module.balanced_inertia(
        module.unit_rows(features), module.means(module.unit_rows(features), kind.numpy(), 8)
    )
    assert best == pytest.approx(right, rel=1e-3)


def test_the_same_seed_gives_the_same_order_and_another_seed_another(assignment):
    features = mixture(3, 256, 32, 12)
    first, second = (cluster(features, 16, 5, assignment=assignment) for _ in range(2))
    assert torch.equal(first.order, second.order)
    assert not torch.equal(first.order, cluster(features, 16, 6, assignment=assignment).order)


def test_neurons_are_not_held_by_their_own_share_of_the_mean(assignment):
    """Wide and noisy rows, where that share is as large as what tells kinds apart."""
    solve = {"flow": assign_flow, "swaps": assign_swaps}[assignment]
    gains = []
    for seed in range(6):
        features = mixture(seed, 240, 512, 24, noise=2.5)
        rows = module.unit_rows(features)
        centres = module.first_centres(rows, 12, seed)
        held = np.inf
        for _ in range(module.BALANCED_ITERATIONS):
            centres = module.means(rows, solve(rows @ centres.T), 12)
            held = min(held, module.balanced_inertia(rows, centres))
        random = random_inertia(rows, 12)
        found = cluster(features, 12, seed, assignment=assignment)
        gains.append((random - found.inertia) / (random - held))
    assert np.mean(gains) > 1.1
    assert min(gains) > 0.98


def total(scores, labels):
    return float(scores[np.arange(len(labels)), labels].sum(dtype=np.float64))


def cosines(seed, count, clusters):
    rows = module.unit_rows(mixture(seed, count, 32, 9))
    centres = rows[np.random.default_rng(seed).choice(count, clusters, replace=False)]
    return rows @ centres.T


@pytest.mark.parametrize("seed", range(3))
def test_flow_is_the_optimal_assignment(seed):
    pytest.importorskip("ortools")
    scores = cosines(seed, 120, 8)
    copies = np.repeat(scores, 15, axis=1)
    best = copies[linear_sum_assignment(copies, maximize=True)].sum(dtype=np.float64)
    labels = assign_flow(scores)
    assert np.bincount(labels).tolist() == [15] * 8
    assert total(scores, labels) == pytest.approx(best, abs=120e-6)


@pytest.mark.parametrize("seed", range(5))
def test_swaps_are_as_balanced_and_within_one_percent_of_the_optimum(seed):
    scores = cosines(seed, 240, 12)
    copies = np.repeat(scores, 20, axis=1)
    best = copies[linear_sum_assignment(copies, maximize=True)].sum(dtype=np.float64)
    labels = assign_swaps(scores)
    assert np.bincount(labels).tolist() == [20] * 12
    unordered = total(scores, np.arange(240) % 12)
    assert (total(scores, labels) - unordered) / (best - unordered) > 0.99


def test_clusters_are_far_better_than_a_random_split(assignment):
    found = cluster(mixture(4, 512, 32, 16), 16, assignment=assignment)
    assert found.inertia < 0.6 * found.random_inertia


def test_without_ortools_auto_falls_back_and_flow_is_refused(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    features = mixture(5, 96, 16, 5)
    found = cluster(features, 8)
    assert torch.equal(found.order, cluster(features, 8, assignment="swaps").order)
    with pytest.raises(ExpertsError, match=r"pip install 'pacellm-vllm\[experts\]'"):
        cluster(features, 8, assignment="flow")


def test_features_are_left_as_they_were():
    features = mixture(6, 64, 16, 4)
    before = features.clone()
    cluster(features, 8)
    assert torch.equal(features, before)


@pytest.mark.parametrize(
    ("experts", "suggested"),
    [(60, "37 or 64 would"), (0, "1 would"), (-3, "1 would"), (18945, "18944 would")],
)
def test_experts_that_do_not_divide_are_refused_with_those_that_do(experts, suggested):
    with pytest.raises(ExpertsError, match=suggested):
        cluster(torch.zeros(18944, 1), experts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    features = mixture(7, 64, 16, 4)
    features[41, 3] = value
    with pytest.raises(ExpertsError, match="neuron 41"):
        cluster(features, 8)


@pytest.mark.parametrize("features", [torch.zeros(64), torch.zeros(64, 4, dtype=torch.int8)])
def test_features_of_another_kind_are_refused(features):
    with pytest.raises(ExpertsError, match="floating point"):
        cluster(features, 8)


def test_identical_and_zero_rows_still_make_equal_clusters(assignment):
    features = torch.zeros(64, 16)
    features[:40] = 1
    found = cluster(features, 8, assignment=assignment)
    assert torch.bincount(found.labels).tolist() == [8] * 8
    assert found.random_inertia == pytest.approx(
        random_inertia(module.unit_rows(features), 8), rel=1e-6
    )
