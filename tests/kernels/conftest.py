"""Run where Triton interprets kernels; ``test_kernels.py`` starts a process for that."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def multiply_in_double():
    """Dots whose bits depend on a row and a column alone, as on a GPU.

    NumPy's own depend on where in a matrix these stand, so twins of slots would differ; and Triton
    3.9's interpreter keeps bfloat16 as uint16, and multiplies those integers.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *_):
        wide = [self.create_fp_ext(each, tl.float32).data.astype(np.float64) for each in (a, b)]
        product = np.matmul(*wide).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def patch_once():
    """A kernel's launch patches all of Triton's language, and calls within it nothing again."""
    from types import SimpleNamespace

    import triton.language as tl
    from triton.runtime import interpreter

    whole = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patch = interpreter._patch_lang
    interpreter._patch_lang = lambda _: patch(whole)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(
        *args, **kwargs
    )


if INTERPRETED:
    multiply_in_double()
    patch_once()
