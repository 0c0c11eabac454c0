"""torchvision beside a PyTorch that its wheel was not built for.

Its compiled operators then do not load, and its import stops where it describes two of them. What
processors of pictures use of it is written in PyTorch, so those two are declared here, without what
computes them, before the package itself is read, from where ``scripts/setup.sh`` put it.
"""

import sys
from pathlib import Path

import torch

for _name in ("nms", "qnms"):
    torch.library.define(
        f"torchvision::{_name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor"
    )
_real = Path(sys.prefix) / "torchvision" / "torchvision"
__path__ = [str(_real)]
__file__ = str(_real / "__init__.py")
exec(compile(Path(__file__).read_text(), __file__, "exec"))
