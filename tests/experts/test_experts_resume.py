"""A run that was interrupted leaves nothing behind, and the next one continues."""

import multiprocessing
import os
import shutil
import signal
import sys
import time

import pytest
import torch
from clustered import SETTINGS, count_calls, digests, left_behind
from ffn_models import NEURONS
from safetensors.torch import load_file, save_file

from pacellm_vllm import cli
from pacellm_vllm.experts import folders, rewrite
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.rewrite import cluster_checkpoint
from pacellm_vllm.experts.settings import ClusterSettings


def test_an_interrupted_run_leaves_nothing_and_the_next_one_continues(
    save, run_cluster, tmp_path, monkeypatch
):
    source = save()
    with monkeypatch.context() as patch:
        count_calls(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            run_cluster(source)
    assert left_behind(tmp_path) == []
    calls = count_calls(monkeypatch)
    results = run_cluster(source)
    assert len(calls) == 1
    cold = cluster_checkpoint(
        source, tmp_path / "cold", SETTINGS, cache=tmp_path / "other", progress=False
    )
    assert len(calls) == 4
    assert all(torch.equal(results[i].order, cold[i].order) for i in range(3))
    assert digests(tmp_path / "out") == digests(tmp_path / "cold")


def test_the_cache_knows_weights_and_settings_apart(save, run_cluster, tmp_path, monkeypatch):
    source = save()
    run_cluster(source)
    calls = count_calls(monkeypatch)

    def again(settings=SETTINGS):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        before = len(calls)
        run_cluster(source, settings)
        return len(calls) - before

    assert again() == 0
    assert again(ClusterSettings(12)) == 3
    assert again(ClusterSettings(8, seed=1)) == 3
    assert again(ClusterSettings(8, "gate_up")) == 3
    shard = source / "model.safetensors"
    changed = load_file(shard)
    changed["model.layers.1.mlp.gate_proj.weight"][5, 5] += 1
    save_file(changed, shard)
    assert again() == 1


@pytest.mark.parametrize("damage", ["truncate", "wrong order", "no json", "floats", "pickle"])
def test_a_damaged_cache_is_not_trusted(save, run_cluster, tmp_path, monkeypatch, damage):
    source = save()
    run_cluster(source)
    shutil.rmtree(tmp_path / "out")
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 3
    if damage == "truncate":
        files[0].write_bytes(files[0].read_bytes()[:-8])
    elif damage == "wrong order":
        save_file({"order": torch.zeros(NEURONS, dtype=torch.int64)}, files[0])
    elif damage == "floats":
        save_file({"order": torch.arange(NEURONS).float()}, files[0])
    elif damage == "no json":
        files[0].with_suffix(".json").unlink()
    else:
        torch.save({"order": torch.arange(NEURONS)}, files[0])
    calls = count_calls(monkeypatch)
    run_cluster(source)
    assert len(calls) == 1


def write_slowly(arguments, errors, writing):
    """A process's main function: ``pacellm cluster``, which takes a minute where it writes."""

    def slow(*_):
        writing.set()
        time.sleep(60)

    # A test run in the background inherits that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rewrite.permute = slow
    with errors.open("w") as sys.stderr:
        status = cli.main(arguments)
    sys.exit(status)


def test_an_ordinary_kill_while_writing_leaves_nothing(save, tmp_path, tmp_path_factory):
    source, errors = save(), tmp_path_factory.mktemp("said") / "errors"
    arguments = ["cluster", str(source), str(tmp_path / "out"), "--experts", "8"]
    arguments += ["--cache", str(tmp_path / "cache"), "--quiet"]
    forked = multiprocessing.get_context("fork")

    def start():
        writing = forked.Event()
        process = forked.Process(target=write_slowly, args=(arguments, errors, writing))
        process.start()
        assert writing.wait(120)
        return process

    for number in (signal.SIGTERM, signal.SIGINT):
        process = start()
        assert len(left_behind(tmp_path)) == 1
        os.kill(process.pid, number)
        process.join(120)
        assert process.exitcode == 130
        assert "interrupted" in errors.read_text()
        assert left_behind(tmp_path) == []
    # Not even the kernel's kill makes a half-written output, and the next run cleans up.
    process = start()
    process.kill()
    process.join()
    assert [name.startswith(".out.partial-") for name in left_behind(tmp_path)] == [True]
    cluster_checkpoint(source, tmp_path / "out", SETTINGS, cache=tmp_path / "cache", progress=False)
    assert left_behind(tmp_path) == ["out"]


def test_a_run_that_is_writing_is_not_cleaned_up_by_another(tmp_path):
    with folders.whole_directory(tmp_path / "out") as first:
        with folders.whole_directory(tmp_path / "out") as second:
            assert first.exists()
            (second / "file").write_text("second")
        assert (tmp_path / "out" / "file").read_text() == "second"
        # The first to finish wins; the other one is told.
        with pytest.raises(ExpertsError, match="exists already"):
            folders.check_absent(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
