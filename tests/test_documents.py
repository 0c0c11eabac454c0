"""What documents point to is there: files, and flags of the commands that they show."""

import contextlib
import functools
import io
import re
from pathlib import Path

import pytest

from pacellm_vllm.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
FOLDERS = ("docs", "scripts", "tests", "configs", "pacellm_vllm")


@functools.cache
def help_of(*words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0, words
    return said.getvalue()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_points_to_is_there(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in link:
            assert (document.parent / link).exists(), link
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)", text):
        assert (ROOT / path.rstrip(".")).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_that_a_document_shows_are_known(document):
    for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split("#")[0].split()
            if command[:1] != ["pacellm"] or command[1] == "serve":
                continue  # serve passes on what it does not know
            words = [word for word in command[1:3] if word.islower()]
            for flag in re.findall(r"(--[a-z-]+)", " ".join(command)):
                assert flag in help_of(*words), line
