"""What ``mkdocs.yml`` builds besides ``docs/``: README.md as first page, and pages of docstrings.

Docstrings are read, not imported: a site needs no vLLM.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def parts() -> list[str]:
    """Modules and packages right below ``pacellm_vllm``."""
    found = (ROOT / "pacellm_vllm").glob("[!_]*")
    return sorted(path.stem for path in found if path.suffix == ".py" or path.is_dir())


def on_config(config: Any) -> None:
    """Each part has its own place in the navigation."""
    pages: list[Any] = [{"pacellm_vllm": "api/index.md"}]
    pages += [{f"pacellm_vllm.{name}": f"api/{name}.md"} for name in parts()]
    [inside] = [entry["Inside"] for entry in config.nav if "Inside" in entry]
    inside[-1] = {"API": pages}


def on_files(files: Any, config: Any) -> None:
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    whole = "::: pacellm_vllm\n    options:\n      show_submodules: false\n"
    files.append(File.generated(config, "api/index.md", content=whole))
    for name in parts():
        content = f"::: pacellm_vllm.{name}\n"
        files.append(File.generated(config, f"api/{name}.md", content=content))


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings' roles are Sphinx's."""
    return re.sub(r":(?:func|meth|class):(?=<code>)", "", html)
