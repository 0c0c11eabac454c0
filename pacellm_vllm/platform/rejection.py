"""Which draft tokens are kept: vLLM's rejection sampling kernels as PyTorch.

They stand in for the Triton kernels of v1/sample/rejection_sampler.py, whose parameters they must
name exactly: vLLM then passes them by name. Drafts of R requests lie side by side, ``tokens`` of
them, request r's up to ``cu_num_draft_tokens[r]``.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def _requests(cumulative: Tensor) -> Iterator[tuple[int, int, int]]:
    """Each request's index, and the first and past-the-last of its drafts."""
    begin = 0
    for request, end in enumerate(cumulative.tolist()):
        yield request, begin, end
        begin = end


def _refuse_synthetic(synthetic: bool) -> None:
    if synthetic:
        raise NotImplementedError(
            "Synthetic acceptance of drafts is not implemented on the torch CPU platform."
        )


def rejection_greedy_sample_kernel(
    output_token_ids_ptr: Tensor,
    cu_num_draft_tokens_ptr: Tensor,
    draft_token_ids_ptr: Tensor,
    target_argmax_ptr: Tensor,
    bonus_token_ids_ptr: Tensor,
    is_greedy_ptr: Tensor | None,
    max_spec_len: int,
    uniform_probs_ptr: Tensor | None,
    synthetic_conditional_rates_ptr: Tensor | None,
    SYNTHETIC_MODE: bool,
) -> None:
    """Drafts [tokens] as long as they are the likeliest tokens, then that one, or the bonus.

    ``output_token_ids`` [R, max_spec_len + 1] is written as far as tokens were kept.
    """
    _refuse_synthetic(SYNTHETIC_MODE)
    drafts, best = draft_token_ids_ptr.tolist(), target_argmax_ptr.tolist()
    for request, begin, end in _requests(cu_num_draft_tokens_ptr):
        if is_greedy_ptr is not None and not is_greedy_ptr[request]:
            continue
        said = best[begin:end]
        kept = next((i for i in range(end - begin) if drafts[begin + i] != said[i]), None)
        row = said + bonus_token_ids_ptr[request].tolist() if kept is None else said[: kept + 1]
        output_token_ids_ptr[request, : len(row)] = torch.tensor(row)


def rejection_random_sample_kernel(
    output_token_ids_ptr: Tensor,
    cu_num_draft_tokens_ptr: Tensor,
    draft_token_ids_ptr: Tensor,
    draft_probs_ptr: Tensor | None,
    target_probs_ptr: Tensor,
    bonus_token_ids_ptr: Tensor,
    recovered_token_ids_ptr: Tensor,
    uniform_probs_ptr: Tensor,
    is_greedy_ptr: Tensor,
    max_spec_len: int,
    vocab_size: int,
    synthetic_conditional_rates_ptr: Tensor | None,
    NO_DRAFT_PROBS: bool,
    SYNTHETIC_MODE: bool,
) -> None:
    """Drafts [tokens] with probability target / draft each, then a recovered one, or the bonus."""
    _refuse_synthetic(SYNTHETIC_MODE)
    drafts, recovered = draft_token_ids_ptr.tolist(), recovered_token_ids_ptr.tolist()
    chance = uniform_probs_ptr.tolist()
    for request, begin, end in _requests(cu_num_draft_tokens_ptr):
        if is_greedy_ptr[request]:
            continue
        row: list[int] = []
        for i in range(begin, end):
            token = drafts[i]
            draft = 1.0 if draft_probs_ptr is None else float(draft_probs_ptr[i, token])
            target = float(target_probs_ptr[i, token])
            if token < 0 or draft <= 0 or target / draft < chance[i]:
                row.append(recovered[i])
                break
            row.append(token)
        else:
            row += bonus_token_ids_ptr[request].tolist()
        output_token_ids_ptr[request, : len(row)] = torch.tensor(row)


def expand_kernel(
    output_ptr: Tensor,
    input_ptr: Tensor,
    cu_num_tokens_ptr: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int,
) -> None:
    """``input`` [R] repeated for each request's drafts [tokens], one value replaced."""
    values = torch.where(input_ptr == replace_from, replace_to, input_ptr)
    for request, begin, end in _requests(cu_num_tokens_ptr):
        output_ptr[begin:end] = values[request]


def sample_recovered_tokens_kernel(
    output_token_ids_ptr: Tensor,
    cu_num_draft_tokens_ptr: Tensor,
    draft_token_ids_ptr: Tensor,
    draft_probs_ptr: Tensor | None,
    target_probs_ptr: Tensor,
    inv_q_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    NO_DRAFT_PROBS: bool,
    USE_FP64_GUMBEL: bool,
) -> None:
    """What each draft [tokens] becomes if it is rejected: a sample of what it left over."""
    for request, begin, end in _requests(cu_num_draft_tokens_ptr):
        probs = target_probs_ptr[begin:end].clone()
        if draft_probs_ptr is None:
            probs.scatter_(1, draft_token_ids_ptr[begin:end, None].long().clamp_min(0), 0.0)
        else:
            probs = (probs - draft_probs_ptr[begin:end]).clamp_min(0)
        output_token_ids_ptr[begin:end] = (
            (probs * inv_q_ptr[request]).argmax(-1).to(output_token_ids_ptr.dtype)
        )


_MODULE = "vllm.v1.sample.rejection_sampler"
KERNELS: dict[str, Callable[..., None]] = {
    f"{_MODULE}.{kernel.__name__}": kernel
    for kernel in (
        rejection_greedy_sample_kernel,
        rejection_random_sample_kernel,
        expand_kernel,
        sample_recovered_tokens_kernel,
    )
}
