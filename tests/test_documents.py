"""What documents point to is there: files, headings, and commands with the flags that they show."""

import contextlib
import functools
import importlib.util
import io
import re
from pathlib import Path

import pytest
import yaml

from pacellm_vllm.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
# Where paths in documents begin; the last one is vLLM's.
VLLM = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
BEGIN = [ROOT, *(ROOT / name for name in ("pacellm_vllm", "tests", "docs")), VLLM]

of_every_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


@functools.cache
def file_names():
    """All names of files of ours and of vLLM's."""
    ours = [path for folder in ROOT.glob("[!.]*/") for path in folder.rglob("*.*")]
    return {path.name for path in [*ROOT.glob("*"), *ours, *VLLM.rglob("*.py")]}


@functools.cache
def help_of(*words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0, words
    return said.getvalue()


@functools.cache
def anchors(document):
    """Of its headings, as GitHub and mkdocs write them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def code(document):
    """Lines of its blocks of code, and what it has between backticks."""
    text = document.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    ([^`\n]+)$", rest, re.MULTILINE)
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", rest)]
    return [line for block in blocks for line in block.splitlines()] + indented + spans


@of_every_document
def test_what_a_document_points_to_is_there(document):
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", document.read_text()):
        if "://" not in link:
            target = document.parent / link if link else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f"{link}#{anchor}"
    for path in code(document):
        if re.fullmatch(r"[\w-]+\.py", path):
            assert path in file_names(), path
        elif re.fullmatch(r"[\w-]+/[\w./-]+\.(py|md|sh|yaml|json|yml)", path):
            assert any((begin / path).exists() for begin in BEGIN), path


@of_every_document
def test_commands_that_a_document_shows_are_known(document):
    for line in code(document):
        line = re.split(r"\s#\s", line)[0]
        flags = re.findall(r"(?<!\S)(--[a-z][a-z-]*)", line)
        if script := re.search(r"(?:python|bash) ((?:scripts|research)/[\w./-]+)", line):
            path = ROOT / script[1]
            assert path.exists(), line
            if path.suffix == ".sh":
                continue  # they pass arguments on
            parts = [path, *path.with_suffix("").glob("*.py"), *ROOT.glob("scripts/soaking/*.py")]
            if "add_engine(" in path.read_text():
                parts.append(ROOT / "pacellm_vllm/evals/arguments.py")
            source = "".join(part.read_text() for part in parts)
            for flag in flags:
                assert f'"{flag}"' in source, line
        elif command := re.match(r"(?:\w+=\S+ )*pacellm ((?:[a-z]+ ?)+)", line):
            words = command[1].split()[:2]
            said = help_of(*words)
            # serve passes on what it does not know.
            assert words[0] == "serve" or all(flag in said for flag in flags), line


def test_the_site_has_every_document():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    parts = [part for entry in nav if isinstance(entry, dict) for part in entry.values()]
    named = {page for part in parts for page in part if isinstance(page, str)}
    assert named == {path.name for path in ROOT.glob("docs/*.md")}
