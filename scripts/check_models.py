"""Hold memory in every architecture that transformers can make small to the oracle.

    python scripts/check_models.py [ARCHITECTURE ...]

Each in a process of its own: a small random checkpoint (``tests/any_checkpoint.py``), a real
engine, texts of several lengths. What came of it goes to ``scripts/checked_models.json``, from
which ``list_models.py`` tells how an architecture was checked; what is there already is not done
again unless it is named. Half a minute each.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))
os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")

RESULTS = Path(__file__).parent / "checked_models.json"
LIMIT_S = 420
PACE = {"layers": [1, 3], "preset": "official", "bank_size": 23, "segment_size": 32}
PACE |= {"max_insertions": 5, "site": "auto"}
LENGTHS, MAX_TOKENS = (20, 110), 16


def check(architecture: str, folder: Path) -> tuple[str, str]:
    """What came of holding ``architecture`` to the oracle, and what is to be said about it.

    One of "equal", "texts equal" (of a model that sees or hears, too), "refused", "differs" (as
    vLLM without memory does, too), "not run" (nor does it without memory) and "not built". Raises
    ``AssertionError`` where only memory makes the difference.
    """
    from any_checkpoint import NotBuilt, make_any_checkpoint, transformers_class
    from engines import engine

    try:
        path = make_any_checkpoint(folder, architecture)
    except NotBuilt as why:
        return "not built", str(why)
    cls = transformers_class(architecture)
    try:
        with engine(path, PACE, **_settings(path, f"Pace{architecture}")) as running:
            [site] = {memory.config.site for memory in running.memories().values()}
            wrong = _difference(running, _cases(path, cls, {**PACE, "site": site}))
            has_pictures = running.core.vllm_config.model_config.is_multimodal_model
            counts = [memory.counts for memory in running.memories().values()]
    except NotBuilt as why:
        return "not built", str(why)
    except Exception as error:
        if "pacellm: " in str(error):
            sentence = str(error).partition("pacellm: ")[2]
            # Pydantic says more.
            return "refused", _said(sentence.partition(" [type=")[0])
        return "not run", _why_not_even_plain(path, architecture, error)
    if wrong is None:
        acted = all(min(one.commits, one.mid + one.high) > 0 for one in counts)
        what = "texts equal" if has_pictures else "equal"
        return (what, site) if acted else ("not built", "memory does not act on these weights")
    with engine(path, **_settings(path, architecture)) as running:
        plain = _difference(running, _cases(path, cls, {**PACE, "site": site, "layers": []}))
    assert plain, f"{wrong}, and only with memory"
    return "differs", plain


def _settings(path: Path, architecture: str) -> dict[str, Any]:
    """Of an engine that asks a model about texts only, without its processor."""
    from test_engine_oracle import ENGINE_CONFIG
    from transformers import AutoConfig

    composite = "text_config" in (path / "config.json").read_text()
    text = AutoConfig.from_pretrained(path).get_text_config()
    changed = ENGINE_CONFIG.get(text.model_type, {})
    return {
        "hf_overrides": {
            "architectures": [architecture],
            **({"text_config": changed} if composite and changed else changed),
        },
        "max_num_batched_tokens": 80,
        **({"language_model_only": True} if composite else {}),
    }


def _why_not_even_plain(path: Path, architecture: str, error: Exception) -> str:
    from engines import engine

    try:
        with engine(path, **_settings(path, architecture)) as running:
            running.tokens([[1, 2, 3]], 2)
    except Exception as plain:
        return f"{type(plain).__name__}: {_said(str(plain))}"
    raise AssertionError(f"it runs without memory, and with it: {error}") from error


def _cases(path: Path, cls: Any, pace: dict[str, Any]) -> list[Any]:
    """Prompts with the oracle's answers, clear of ties."""
    from any_checkpoint import NotBuilt
    from checkpoints import make_prompt
    from hf import load_model
    from oracle import OracleModel
    from test_engine_oracle import clearest

    class Oracle(OracleModel):
        load = staticmethod(partial(load_model, kind=cls))

    try:
        oracle = Oracle(path, pace)

        def case(seed: int, length: int) -> Any:
            prompt = make_prompt(seed, length)
            return (prompt, *oracle.generate(prompt, MAX_TOKENS))

        if not pace["layers"]:
            return [case(0, length) for length in LENGTHS]
        return [clearest(oracle, length, case) for length in LENGTHS]
    except Exception as error:
        said = f"{type(error).__name__}: {_said(str(error))}"
        raise NotBuilt(f"the oracle does not run on transformers' modules ({said})") from error


def _difference(running: Any, cases: list[Any]) -> str | None:
    from engines import prompt_logprobs

    outputs = running.generate([case[0] for case in cases], MAX_TOKENS, prompt_logprobs=0)
    pairs = [
        abs(got - want)
        for output, (_, _, logprobs) in zip(outputs, cases, strict=True)
        for got, want in zip(prompt_logprobs(output), logprobs, strict=True)
    ]
    if not max(pairs) <= 1e-3:
        return f"log-probabilities differ by up to {max(pairs):.1g}"
    said = [list(output.outputs[0].token_ids) for output in outputs]
    return None if said == [tokens for _, tokens, _ in cases] else "other tokens"


def _said(text: str) -> str:
    return " ".join(text.split())[:200]


def _inspect_here(architecture: str) -> None:
    """Spare vLLM a process for each class that it looks at."""
    from vllm.model_executor.models import ModelRegistry

    import pacellm_vllm.models
    from pacellm_vllm.models.table import ARCHITECTURES

    name = f"Pace{architecture}"
    try:
        ModelRegistry.register_model(architecture, ARCHITECTURES[name].load())
        ModelRegistry.register_model(name, getattr(pacellm_vllm.models, name))
    except ImportError:
        # vLLM says so itself.
        return


def _check_in_child(architecture: str) -> dict[str, str]:
    from any_checkpoint import NotBuilt, transformers_class

    try:
        transformers_class(architecture)
    except NotBuilt as why:
        return {"result": "not built", "said": str(why)}
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("fork").Process(
            target=_answer, args=(architecture, Path(folder))
        )
        child.start()
        child.join(LIMIT_S)
        if child.is_alive():
            child.kill()
            return {"result": "not built", "said": f"it takes longer than {LIMIT_S} s"}
        return json.loads((Path(folder) / "answer.json").read_text())


def _answer(architecture: str, folder: Path) -> None:
    try:
        _inspect_here(architecture)
        result, said = check(architecture, folder / "model")
    except BaseException:
        result, said = "FAULT", traceback.format_exc()
    (folder / "answer.json").write_text(json.dumps({"result": result, "said": said}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    # What children share: they are forked.
    import engines  # noqa: F401
    import oracle  # noqa: F401

    from pacellm_vllm.models.compared import TESTED
    from pacellm_vllm.models.table import ARCHITECTURES

    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    wanted = arguments.architectures or [
        base.architecture
        for base in ARCHITECTURES.values()
        if base.architecture not in known.keys() | TESTED
    ]
    for architecture in wanted:
        known[architecture] = _check_in_child(architecture)
        print(architecture, known[architecture], flush=True)
        arguments.results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
