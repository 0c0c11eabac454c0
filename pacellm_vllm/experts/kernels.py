"""The Triton kernel that reads only chosen experts' columns of a down projection."""

import torch
import triton
import triton.language as tl

BLOCK_TOKENS, BLOCK_OUT, BLOCK_IN = 16, 64, 64


@triton.jit
def outputs_kernel(  # type: ignore[no-untyped-def]
    a, down, chosen, parts, tokens, hidden,
    K: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """``parts[e] = a[:, e] down[:, e]^T``, zeros and nothing read where no token chose e.

    ``a`` [tokens, K SIZE], ``down`` [hidden, K SIZE], ``chosen`` [tokens, K] bytes, ``parts``
    [K, tokens, hidden] float32; at most BT tokens. Columns of an expert start at a multiple of
    SIZE, known when compiling, so that loads can be wide.
    """
    expert = tl.program_id(0)
    t = tl.arange(0, BT)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    wanted = tl.load(chosen + t * K + expert, mask=t < tokens, other=0)
    total = tl.zeros([BT, BH], dtype=tl.float32)
    if tl.max(wanted.to(tl.int32)) > 0:
        a_rows = a + t[:, None] * (K * SIZE) + expert * SIZE
        down_rows = down + h[None, :].to(tl.int64) * (K * SIZE) + expert * SIZE
        for first in range(0, SIZE, BI):
            i = first + tl.arange(0, BI)
            left = tl.load(
                a_rows + i[None, :], mask=(t < tokens)[:, None] & (i < SIZE)[None, :], other=0.0
            )
            right = tl.load(
                down_rows + i[:, None], mask=(h < hidden)[None, :] & (i < SIZE)[:, None], other=0.0
            )
            total = tl.dot(left, right, total, input_precision="ieee")
    out = parts + (expert.to(tl.int64) * tokens + t[:, None]) * hidden + h[None, :]
    tl.store(out, total, mask=(t < tokens)[:, None] & (h < hidden)[None, :])


def expert_outputs(
    a: torch.Tensor, down: torch.Tensor, chosen: torch.Tensor, parts: torch.Tensor
) -> None:
    """Fill ``parts`` [K, tokens, H] float32: what each expert's activations add to the output.

    ``a`` [tokens, D], ``down`` [H, D] and ``chosen`` [tokens, K] bool are contiguous; at most
    BLOCK_TOKENS tokens.
    """
    experts, tokens, hidden = parts.shape
    assert tokens <= BLOCK_TOKENS
    assert all(t.is_contiguous() for t in (a, down, chosen, parts))
    outputs_kernel[(experts, triton.cdiv(hidden, BLOCK_OUT))](
        a,
        down,
        chosen.view(torch.uint8),
        parts,
        tokens,
        hidden,
        K=experts,
        SIZE=a.shape[1] // experts,
        BT=BLOCK_TOKENS,
        BH=BLOCK_OUT,
        BI=BLOCK_IN,
    )
