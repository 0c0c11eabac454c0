"""Balanced clustering of one 7B layer's neurons: ours against four other ways, on the same data.

    python scripts/bench_clustering.py [--limit 300] [--json FILE]

Each method runs in a process of its own, so that its peak memory is its own, on data made from
the same seed. "Kept" is the share of plain k-means' gain over a random balanced split:
100 * (random - method) / (random - plain k-means).
"""

import argparse
import json
import multiprocessing
import resource
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import numpy as np
import torch
from sklearn.cluster import KMeans

from pacellm_vllm.experts.cluster import cluster, random_inertia, unit_rows

# The gate projection of Qwen2.5-7B, and the paper's number of experts.
NEURONS, HIDDEN, EXPERTS, LAYERS = 18944, 3584, 64, 28
# A mixture of 96 kinds of neurons of unequal frequency: its plain k-means and random split have
# about the inertias of the data that the project's target was set on, 17019 and 18836.
KINDS, STRENGTH = 96, 0.36
ITERATIONS = 30
PLAIN_ITERATIONS = 15


def make_rows(seed: int, neurons: int, hidden: int) -> torch.Tensor:
    """Rows [neurons, hidden] float32 of a Gaussian mixture, not normalised."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((KINDS, hidden), dtype=np.float32)
    kind = rng.choice(KINDS, size=neurons, p=rng.dirichlet(np.ones(KINDS)))
    rows = rng.standard_normal((neurons, hidden), dtype=np.float32)
    rows += STRENGTH * centres[kind]
    return torch.from_numpy(rows)


def inertia_of(rows: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances to each cluster's mean, whatever the sizes."""
    kept = 0.0
    for label in np.unique(labels):
        members = rows[labels == label]
        kept += float(np.square(members.sum(axis=0, dtype=np.float64)).sum()) / len(members)
    return float(np.square(rows, dtype=np.float64).sum()) - kept


def plain(features: torch.Tensor, experts: int, seed: int) -> np.ndarray:
    """Unbalanced k-means from random rows."""
    fitted = KMeans(
        experts, init="random", n_init=1, max_iter=PLAIN_ITERATIONS, tol=0, random_state=seed
    )
    return fitted.fit(unit_rows(features)).labels_


def flow(features: torch.Tensor, experts: int, seed: int) -> np.ndarray:
    return cluster(features, experts, seed, assignment="flow").labels.numpy()


def swaps(features: torch.Tensor, experts: int, seed: int) -> np.ndarray:
    return cluster(features, experts, seed, assignment="swaps").labels.numpy()


def greedy(features: torch.Tensor, experts: int, seed: int) -> np.ndarray:
    """The paper's greedy rule (Appendix D): who is surest of its centre chooses first.

    Neurons in order of how much closer their best centre is than their second-best take the best
    one that has room; centres are the normalised means.
    """
    rows = unit_rows(features)
    centres = rows[np.random.default_rng(seed).choice(len(rows), experts, replace=False)]
    labels = np.full(len(rows), -1)
    for _ in range(ITERATIONS):
        scores = rows @ centres.T
        ranking = np.argsort(-scores, axis=1)
        best = np.take_along_axis(scores, ranking[:, :2], axis=1)
        room = [len(rows) // experts] * experts
        chosen = np.empty(len(rows), dtype=np.int64)
        for neuron in np.argsort(best[:, 1] - best[:, 0]):
            expert = next(expert for expert in ranking[neuron].tolist() if room[expert])
            chosen[neuron] = expert
            room[expert] -= 1
        if np.array_equal(chosen, labels):
            break
        labels = chosen
        sums = np.stack([rows[labels == expert].sum(axis=0) for expert in range(experts)])
        centres = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return labels


def constrained(features: torch.Tensor, experts: int, seed: int) -> np.ndarray:
    """The package k-means-constrained, which the published code calls, with one start."""
    from k_means_constrained import KMeansConstrained

    size = len(features) // experts
    fitted = KMeansConstrained(
        experts, size_min=size, size_max=size, n_init=1, max_iter=10, random_state=seed
    )
    return fitted.fit(unit_rows(features)).labels_


METHODS = {
    "plain k-means (unbalanced)": (plain, "sklearn"),
    "ours, flow": (flow, "ortools"),
    "ours, swaps": (swaps, "sklearn"),
    "greedy, 30 rounds": (greedy, "sklearn"),
    "k-means-constrained": (constrained, "k_means_constrained"),
}


def measure(pipe, method, seed: int, data_seed: int, shape) -> None:
    features = make_rows(data_seed, *shape)
    start = time.perf_counter()
    labels = method(features, EXPERTS, seed)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = np.bincount(labels, minlength=EXPERTS)
    inertia = inertia_of(unit_rows(features), labels)
    pipe.send(
        {
            "inertia": inertia,
            "seconds": seconds,
            "peak_gb": peak / 1e9,
            "sizes": [int(sizes.min()), int(sizes.max())],
        }
    )


def run_limited(method, limit: float, *args) -> dict | str:
    """What ``measure`` sends from a fresh process, or why there is none."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(theirs, method, *args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            return f"not done after {limit:.0f} s"
        return ours.recv()
    except EOFError:
        process.join()
        return f"ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=float, default=300, help="seconds per method (300)")
    parser.add_argument("--neurons", type=int, default=NEURONS)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    args = parser.parse_args()
    shape = (args.neurons, args.hidden)

    found: dict[str, dict | str] = {}
    for name, (method, package) in METHODS.items():
        if find_spec(package) is None:
            found[name] = f"skipped: {package} is not installed"
        else:
            found[name] = run_limited(method, args.limit, args.seed, args.data_seed, shape)
        print(f"{name}: {found[name]}", flush=True)

    random = random_inertia(unit_rows(make_rows(args.data_seed, *shape)), EXPERTS)
    reference = found["plain k-means (unbalanced)"]
    print(f"\n{shape[0]} x {shape[1]}, {EXPERTS} clusters, seed {args.seed}")
    for package in ("numpy", "scikit-learn", "ortools", "k-means-constrained", "torch"):
        try:
            print(f"{package} {version(package)}", end="  ")
        except PackageNotFoundError:
            print(f"{package} absent", end="  ")
    print(f"\nrandom balanced split: inertia {random:.0f}\n")
    print("| method | inertia | kept | sizes | seconds | peak GB | 28 layers |")
    print("|---|---|---|---|---|---|---|")
    for name, result in found.items():
        if isinstance(result, str):
            print(f"| {name} | {result} | | | | | |")
            continue
        kept = 0.0
        if isinstance(reference, dict):
            kept = 100 * (random - result["inertia"]) / (random - reference["inertia"])
        result["kept"] = kept
        low, high = result["sizes"]
        print(
            f"| {name} | {result['inertia']:.0f} | {kept:.1f} % | {low} to {high} | "
            f"{result['seconds']:.1f} | {result['peak_gb']:.2f} | "
            f"{result['seconds'] * LAYERS / 60:.1f} min |"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"random": random, "methods": found}, file, indent=2)


if __name__ == "__main__":
    main()
