"""Results on disk: a JSON line per item, continued by the next run, refused for other settings."""

import fcntl
import json
import os
from collections.abc import Mapping
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import TracebackType
from typing import Any

from pacellm_vllm.sentences import PaceError


class EvalError(PaceError):
    """What was asked cannot be measured; the message says what, why and what to do instead."""


class Records:
    """``path`` holds a line of settings, then a line per result; ``done`` are those by key.

    A key is (configuration, item); ``engines`` says what answered for each configuration. Raises
    ``EvalError`` when the file is of other settings, no results file, or being written by another
    run. Use as a context manager: every line is flushed when it is added.
    """

    def __init__(self, path: Path, given: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[tuple[str, str], dict[str, Any]] = {}
        self.engines: dict[str, dict[str, Any]] = {}
        # As it will read back: tuples become lists, keys strings.
        settings: dict[str, Any] = json.loads(json.dumps(dict(given)))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of the directory, so that no file is left behind.
        self._lock = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole = self._read(settings) if path.exists() else 0
            self._file = path.open("r+b" if whole else "wb")
        except BlockingIOError:
            os.close(self._lock)
            raise EvalError(
                f"pacellm: another run is writing to {path}; wait for it, or name another output "
                "directory."
            ) from None
        except BaseException:
            os.close(self._lock)
            raise
        self._file.seek(whole)
        self._file.truncate()
        if not whole:
            self._write({"settings": settings})

    def _read(self, settings: dict[str, Any]) -> int:
        """Take in the whole lines; returns their bytes. A cut-off last line is measured again.

        A file without results is nobody's.
        """
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if not whole:
            return 0
        try:
            first, *lines = [json.loads(line) for line in data[:whole].splitlines()]
            before = first["settings"]
            for line in lines:
                if "engine" in line:
                    self.engines[line["config"]] = line["engine"]
                else:
                    self.done[line["config"], line["id"]] = line
        except (ValueError, KeyError, TypeError):
            raise EvalError(
                f"pacellm: {self.path} is not a results file; name another output directory."
            ) from None
        if not self.done:
            self.engines.clear()
            return 0
        self._compare(before, settings)
        return whole

    def _compare(self, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                raise EvalError(
                    f"pacellm: {self.path} was measured with {name} = {before.get(name)!r}, not "
                    f"{settings.get(name)!r}; name another output directory, or repeat that run's "
                    "settings to continue it."
                )

    def describe(self, config: str, engine: Mapping[str, Any]) -> None:
        """Say what answers for ``config``; ``EvalError`` if its earlier results are another's."""
        facts: dict[str, Any] = json.loads(json.dumps(dict(engine)))
        if config in self.engines:
            self._compare(self.engines[config], facts)
            return
        self._write({"config": config, "engine": facts})
        self.engines[config] = facts

    def add(self, result: dict[str, Any]) -> None:
        """Write one result, with its ``config`` and ``id``."""
        self._write(result)
        self.done[result["config"], result["id"]] = result

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "Records":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        os.close(self._lock)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds all of it or what it held before."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def version_of(module: str) -> str:
    """Of the distribution that has ``module``: vLLM's own CPU build has another name than vLLM.

    ``PackageNotFoundError`` where there is none.
    """
    names = packages_distributions().get(module, [module])
    return version(names[0])
