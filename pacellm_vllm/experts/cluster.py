"""Balanced clustering of FFN neurons: equal experts whose neurons respond to like inputs.

PaceLLM, Sec. 3.2.2 and Algorithm 2. Centres come from scikit-learn's k-means, then exact balanced
assignments (a minimum-cost flow) and new centres alternate until nothing moves.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.settings import Assignment, check_num_experts

KMEANS_ITERATIONS = 15
BALANCED_ITERATIONS = 20
# A neuron is 1 / size of its cluster's mean, and counted with that share it would stay where it is
# although an exchange pays. But exchanges are many at once, and without it small clusters can end
# worse than before: a round that lowers the inertia by less than TOLERANCE of it leaves more of the
# share in, and the last one is when LEAST_OWN_SHARE is reached.
TOLERANCE = 2e-5
OWN_SHARE_DECAY, LEAST_OWN_SHARE = 0.7, 0.2
# Costs are integers in the flow: similarities are at most 1 and keep six digits.
COST_SCALE = 1_000_000
MAX_SWEEPS = 20


@dataclass(frozen=True)
class Clustering:
    """Equal clusters of D neurons.

    ``order`` [D] int64 lists the neurons expert by expert, ascending within each; ``labels`` [D]
    int64 is the expert of each neuron; ``inertia`` is the sum of squared distances of the
    normalised features to their expert's mean, ``random_inertia`` what a random balanced split
    has on average.
    """

    order: torch.Tensor
    labels: torch.Tensor
    inertia: float
    random_inertia: float


def cluster(
    features: torch.Tensor,
    num_experts: int,
    seed: int = 0,
    *,
    assignment: Assignment = "auto",
) -> Clustering:
    """Split D neurons into ``num_experts`` clusters of D / num_experts each.

    Args:
        features: [D, F], any floating dtype; rows are compared after L2 normalisation.
        num_experts: K, a divisor of D.
        seed: fixes the first centres. The same input, seed, assignment and thread count of the
            linear algebra give the same result.
        assignment: ``flow`` is exact and needs OR-tools, ``swaps`` is the fallback, ``auto`` the
            best one installed.

    Raises ``ExpertsError`` if K does not divide D, if a feature is not finite, or if OR-tools is
    asked for and missing.
    """
    check_num_experts(num_experts, features.shape[0])
    rows = unit_rows(features)
    solve = assign_flow if resolve_assignment(assignment) == "flow" else assign_swaps
    # One expert, or one for each neuron: nothing to choose.
    labels = np.arange(len(rows)) if num_experts == len(rows) else np.zeros(len(rows), np.int64)
    inertia, share = np.inf, 1.0
    if 1 < num_experts < len(rows):
        centres = first_centres(rows, num_experts, seed)
        for number in range(BALANCED_ITERATIONS):
            # Rows have one length and clusters one size: the nearest centres in sum are those
            # of the largest inner products, however long the centres are.
            scores = rows @ centres.T
            if number:
                scores[np.arange(len(rows)), labels] -= share * num_experts / len(rows)
            found = solve(scores)
            moved = means(rows, found, num_experts)
            reached = balanced_inertia(rows, moved)
            if reached >= inertia * (1 - TOLERANCE):
                share *= OWN_SHARE_DECAY
            if reached < inertia:
                labels, centres, inertia = found, moved, reached
            if share < LEAST_OWN_SHARE:
                break
    inertia = balanced_inertia(rows, means(rows, labels, num_experts))
    return Clustering(
        order=torch.from_numpy(np.argsort(labels, kind="stable")),
        labels=torch.from_numpy(labels),
        inertia=inertia,
        random_inertia=random_inertia(rows, num_experts),
    )


def resolve_assignment(assignment: Assignment) -> str:
    """``flow`` or ``swaps``; ``ExpertsError`` if flow is asked for and OR-tools is missing."""
    installed = find_spec("ortools") is not None
    if assignment == "auto":
        return "flow" if installed else "swaps"
    if assignment == "flow" and not installed:
        raise ExpertsError(
            "pacellm: the exact assignment needs OR-tools: pip install 'pacellm-vllm[experts]', "
            "or choose the assignment 'swaps'."
        )
    return assignment


def unit_rows(features: torch.Tensor) -> np.ndarray:
    """``features`` [D, F] as float32 rows of length 1 (zero rows stay zero).

    Raises ``ExpertsError`` if one is NaN or infinite.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ExpertsError(
            f"pacellm: features must be floating point of shape [neurons, features], not "
            f"{features.dtype} of shape {list(features.shape)}."
        )
    rows = features.float()
    wrong = ~torch.isfinite(rows).all(dim=1)
    if wrong.any():
        raise ExpertsError(
            f"pacellm: {int(wrong.sum())} neurons have NaN or infinite features, the first is "
            f"neuron {int(wrong.nonzero()[0])}; the checkpoint is damaged."
        )
    return torch.nn.functional.normalize(rows, dim=1).numpy()


def first_centres(rows: np.ndarray, num_experts: int, seed: int) -> np.ndarray:
    """Centres [K, F] float32 of unbalanced k-means on rows [D, F] from random rows.

    Raises ``ExpertsError`` if scikit-learn is missing.
    """
    # Only who clusters needs it: engines without experts, or with a clustered checkpoint, do not.
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ExpertsError(
            f"pacellm: clustering needs scikit-learn, which cannot be imported ({error}): pip "
            "install scikit-learn, or serve a checkpoint that pacellm cluster has written."
        ) from None
    # One OpenMP thread: with more, partial sums meet in whatever order threads end.
    # Random rows, not k-means++: for wide rows that takes longer than everything else together.
    with threadpool_limits(limits=1, user_api="openmp"):
        fitted = KMeans(
            num_experts, init="random", n_init=1, max_iter=KMEANS_ITERATIONS, random_state=seed
        ).fit(rows)
    return fitted.cluster_centers_.astype(np.float32)


def means(rows: np.ndarray, labels: np.ndarray, num_experts: int) -> np.ndarray:
    """Mean row of each cluster, [K, F] float32."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(num_experts))
    sums = np.stack([rows[part].sum(axis=0) for part in np.split(order, starts[1:])])
    return sums / np.bincount(labels, minlength=num_experts)[:, None].astype(np.float32)


def balanced_inertia(rows: np.ndarray, centres: np.ndarray) -> float:
    """Sum of squared distances to the ``centres`` [K, F], the means of equal clusters of rows."""
    size = len(rows) // len(centres)
    return float(
        np.square(rows).sum(dtype=np.float64) - size * np.square(centres, dtype="f8").sum()
    )


def random_inertia(rows: np.ndarray, num_experts: int) -> float:
    """Mean inertia of a random balanced split of ``rows`` [D, F] into K clusters."""
    count = len(rows)
    total = balanced_inertia(rows, rows.mean(axis=0, dtype=np.float64, keepdims=True))
    return total * (count - num_experts) / max(count - 1, 1)


def assign_flow(scores: np.ndarray) -> np.ndarray:
    """Labels [D] of equal clusters with the largest total of ``scores`` [D, K], exactly.

    Scores of at most 1 in size, rounded to six decimals; a minimum-cost flow by OR-tools.
    """
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

    count, clusters = scores.shape
    flow = SimpleMinCostFlow()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(
        np.repeat(np.arange(count), clusters),
        np.tile(np.arange(count, count + clusters), count),
        np.ones(count * clusters, dtype=np.int64),
        np.rint(scores.ravel() * -COST_SCALE).astype(np.int64),
    )
    flow.set_nodes_supplies(
        np.arange(count + clusters),
        np.repeat([1, -(count // clusters)], [count, clusters]),
    )
    status = flow.solve()
    if status != flow.OPTIMAL:
        raise RuntimeError(f"OR-tools ended with {status}")
    return flow.flows(arcs).reshape(count, clusters).argmax(axis=1)


def assign_swaps(scores: np.ndarray) -> np.ndarray:
    """Labels [D] of equal clusters with a nearly largest total of ``scores`` [D, K].

    Greedy by regret (what a neuron loses by its second-best open cluster), then for each pair of
    clusters all exchanges of a neuron for a neuron that pay, until none does.
    """
    labels = _greedy_by_regret(scores)
    clusters = scores.shape[1]
    for _ in range(MAX_SWEEPS):
        swapped = False
        for a in range(clusters):
            for b in range(a + 1, clusters):
                swapped |= _swap_pair(scores, labels, a, b)
        if not swapped:
            break
    return labels


def _greedy_by_regret(scores: np.ndarray) -> np.ndarray:
    count, clusters = scores.shape
    room = np.full(clusters, count // clusters)
    labels = np.full(count, -1)
    waiting = np.arange(count)
    remaining = scores.astype(np.float64)
    while waiting.size:
        if np.count_nonzero(room) == 1:
            labels[waiting] = room.argmax()
            break
        ranked = np.partition(remaining, -2, axis=1)
        regret = ranked[:, -1] - ranked[:, -2]
        wanted = remaining.argmax(axis=1)
        # Regrets hold until a cluster is full: up to there, take all in order at once.
        order = np.argsort(-regret, kind="stable")
        taken = len(order)
        for cluster_id in np.flatnonzero(room):
            asking = np.flatnonzero(wanted[order] == cluster_id)
            if asking.size >= room[cluster_id]:
                taken = min(taken, asking[room[cluster_id] - 1] + 1)
        chosen = order[:taken]
        labels[waiting[chosen]] = wanted[chosen]
        room -= np.bincount(wanted[chosen], minlength=clusters)
        keep = np.delete(np.arange(len(waiting)), chosen)
        waiting, remaining = waiting[keep], remaining[keep]
        remaining[:, room == 0] = -np.inf
    return labels


def _swap_pair(scores: np.ndarray, labels: np.ndarray, a: int, b: int) -> bool:
    """Exchange members of clusters a and b in ``labels`` while that raises the total."""
    in_a, in_b = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
    gain_a = scores[in_a, b] - scores[in_a, a]
    gain_b = scores[in_b, a] - scores[in_b, b]
    best_a, best_b = np.argsort(-gain_a, kind="stable"), np.argsort(-gain_b, kind="stable")
    # float32 noise must not swap two neurons back and forth.
    paying = int(np.count_nonzero(gain_a[best_a] + gain_b[best_b] > 1e-6))
    labels[in_a[best_a[:paying]]] = b
    labels[in_b[best_b[:paying]]] = a
    return paying > 0
