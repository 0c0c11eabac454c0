"""Run where Triton interprets kernels; ``test_kernels.py`` starts a process for that."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def multiply_bfloat16_as_numbers():
    """Triton 3.9's interpreter keeps bfloat16 as uint16, and its dot multiplies those integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.create_fp_ext(operand, tl.float32) for operand in (a, b))
        return plain(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    multiply_bfloat16_as_numbers()
