"""Recurrent layers in PyTorch: the ``torch.ops._C`` operators of vLLM's convolutions and Mambas.

Importing this module registers them. Names, schemas and meaning are those of
csrc/cpu/torch_bindings.cpp, and of csrc/torch_bindings.cpp for ``selective_scan_fwd``; the callers
are in model_executor/layers/mamba/. Gated delta nets have a whole operator of vLLM's instead, see
``use_delta_rule``. Speculative decoding is not among what they do.

Heads h of p channels keep a state of n numbers a channel: [h, p, n]. A group of heads shares the
input and output matrices B and C.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name

from pacellm_vllm.platform.operators import operator

# As transformers and vLLM's GPU kernels have it.
_LENGTH_EPS = 1e-6


def _advance(
    state: Tensor, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each of R sequences: the new state [R, h, p, n] and what is read [R, h, p].

    x ``[R, h, p]``, dt and decay broadcast to ``[R, h, p]`` and ``[h, p, n]``, b and c
    ``[R, groups, n]``; all float32.
    """
    b, c = (part.repeat_interleave(x.shape[1] // part.shape[1], dim=1) for part in (b, c))
    state = state * (dt.unsqueeze(-1) * decay).exp() + (dt * x).unsqueeze(-1) * b.unsqueeze(2)
    return state, (state * c.unsqueeze(2)).sum(-1)


def _scan(
    state: Tensor, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens of one sequence, [T, ...] where :func:`_advance` has [R, ...], one by one.

    So the result does not depend on how a prompt is cut. state ``[h, p, n]``.
    """
    out = torch.empty_like(x)
    state = state.unsqueeze(0)
    for t in range(len(x)):
        at = slice(t, t + 1)
        state, out[at] = _advance(state, x[at], dt[at], decay, b[at], c[at])
    return state[0], out


def _finish(y: Tensor, x: Tensor, d: Tensor | None, z: Tensor | None) -> Tensor:
    """Add the skipped input, weighted by d ``[h]`` or ``[h, p]``, and gate by z like y."""
    if d is not None:
        y = y + x * (d.float().unsqueeze(-1) if d.dim() == 1 else d.float())
    return y if z is None else y * F.silu(z.float())


@operator(
    "causal_conv1d_update_cpu_vec(Tensor x, Tensor(a1!) conv_state, Tensor weight, "
    "Tensor? bias, str? activation, Tensor? conv_state_indices, Tensor? query_start_loc, "
    "int pad_slot_id) -> Tensor"
)
def _conv_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    conv_state_indices: Tensor | None,
    query_start_loc: Tensor | None,
    pad_slot_id: int,
) -> Tensor:
    """One token of each request: x ``[requests, dim]``, conv_state ``[blocks, dim, width - 1]``,
    weight ``[dim, width]``. Returns ``[requests, dim]``."""
    if query_start_loc is not None or x.dim() != 2:
        raise NotImplementedError(
            "Several tokens of a decoding request are not implemented on the torch CPU platform."
        )
    rows = slice(None) if conv_state_indices is None else conv_state_indices.flatten().long()
    window = torch.cat([conv_state[rows].to(x.dtype), x.unsqueeze(-1)], dim=-1)
    conv_state[rows] = window[..., 1:].to(conv_state.dtype)
    out = (window.to(weight.dtype) * weight).sum(-1)
    if bias is not None:
        out = out + bias
    return (F.silu(out) if activation in ("silu", "swish") else out).to(x.dtype)


@operator(
    "selective_state_update_cpu(Tensor(a0!) state, Tensor x, Tensor dt, Tensor A, Tensor B, "
    "Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "Tensor? state_batch_indices, Tensor? dst_state_batch_indices, int null_block_id, "
    "Tensor(a13!) out, Tensor? num_accepted_tokens, Tensor? cu_seqlens) -> ()"
)
def _state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    dst_state_batch_indices: Tensor | None,
    null_block_id: int,
    out: Tensor,
    num_accepted_tokens: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """One token of each request, in place: state ``[blocks, h, p, n]``, x and dt
    ``[requests, h, p]``, A ``[h, p, n]``, B and C ``[requests, groups, n]``, out like x; all
    without h where it is 1."""
    if num_accepted_tokens is not None:
        raise NotImplementedError("Draft tokens are not implemented on the torch CPU platform.")
    if state.dim() == 3:
        state, A = state.unsqueeze(1), A.unsqueeze(0)
        x, dt, B, C, out = (part.unsqueeze(1) for part in (x, dt, B, C, out))
        D, dt_bias = (part if part is None else part.unsqueeze(0) for part in (D, dt_bias))
        z = None if z is None else z.unsqueeze(1)
    assert state_batch_indices is not None
    assert dst_state_batch_indices is not None
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = F.softplus(dt) if dt_softplus else dt
    old = state[state_batch_indices.flatten().long()].float()
    new, y = _advance(old, x.float(), dt, A.float(), B.float(), C.float())
    state[dst_state_batch_indices.flatten().long()] = new.to(state.dtype)
    out.copy_(_finish(y, x.float(), D, z))


@operator(
    "mamba_chunk_scan_fwd_cpu(Tensor(a0!) out, Tensor(a1!) final_states, Tensor x, Tensor dt, "
    "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor cu_seqlens) -> ()"
)
def _chunk_scan(
    out: Tensor,
    final_states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor,
) -> None:
    """Prompts of Mamba2: out and x ``[tokens, h, p]``, final_states ``[requests, h, p, n]``, first
    the initial ones, dt ``[tokens, h]``, A ``[h]``, B and C ``[tokens, groups, n]``."""
    decay = A.float()[:, None, None]
    for i, (begin, end) in enumerate(_bounds(cu_seqlens)):
        at = slice(begin, end)
        tokens = x[at].float()
        final_states[i], y = _scan(
            final_states[i],
            tokens,
            dt[at].float().unsqueeze(-1),
            decay,
            B[at].float(),
            C[at].float(),
        )
        out[at] = _finish(y, tokens, D, None if z is None else z[at]).to(out.dtype)


@operator(
    "selective_scan_fwd(Tensor(a0!) u, Tensor(a1!) delta, Tensor A, Tensor B, Tensor C, "
    "Tensor? D_, Tensor(a6!)? z_, Tensor? delta_bias_, bool delta_softplus, "
    "Tensor? query_start_loc, Tensor? cache_indices, Tensor? has_initial_state, "
    "Tensor(a12!) ssm_states, int null_block_id, int block_size, "
    "Tensor? block_idx_first_scheduled_token, Tensor? block_idx_last_scheduled_token, "
    "Tensor? initial_state_idx, Tensor? cu_chunk_seqlen, Tensor? last_chunk_indices) -> ()"
)
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D_: Tensor | None,
    z_: Tensor | None,
    delta_bias_: Tensor | None,
    delta_softplus: bool,
    query_start_loc: Tensor | None,
    cache_indices: Tensor | None,
    has_initial_state: Tensor | None,
    ssm_states: Tensor,
    null_block_id: int,
    *_of_other_cache_modes: object,
) -> None:
    """Prompts of Mamba1, written over ``z_``, or over delta without it: u, delta and z_
    ``[dim, tokens]``, A ``[dim, n]``, B and C ``[groups, n, tokens]``, D_ and delta_bias_
    ``[dim]``, ssm_states ``[blocks, dim, n]``."""
    assert query_start_loc is not None
    assert cache_indices is not None
    assert has_initial_state is not None
    heads = B.shape[0]
    out = delta if z_ is None else z_

    def by_head(part: Tensor) -> Tensor:
        return part.float().T.unflatten(-1, (heads, -1))

    decay = A.float().unflatten(0, (heads, -1))
    dt = delta.float() if delta_bias_ is None else delta.float() + delta_bias_.float()[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    skip = None if D_ is None else D_.unflatten(0, (heads, -1))
    for i, (begin, end) in enumerate(_bounds(query_start_loc)):
        at, block = slice(begin, end), int(cache_indices.flatten()[i])
        x = by_head(u[:, at])
        state = ssm_states[block].float().unflatten(0, (heads, -1))
        state, y = _scan(
            state if has_initial_state[i] else torch.zeros_like(state),
            x,
            by_head(dt[:, at]),
            decay,
            B[..., at].float().permute(2, 0, 1),
            C[..., at].float().permute(2, 0, 1),
        )
        ssm_states[block] = state.flatten(0, 1).to(ssm_states.dtype)
        y = _finish(y, x, skip, None if z_ is None else by_head(z_[:, at]))
        out[:, at] = y.flatten(1).T.to(out.dtype)


def _delta_rule(
    mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: LayerNameType
) -> None:
    """Gated delta nets of Qwen3-Next and Qwen3.5: write ``core_attn_out [tokens, heads, V]``.

    mixed_qkv ``[tokens, channels]`` before its convolution, b and a ``[tokens, heads]``; states
    ``[blocks, heads, V, K]``.
    """
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
    from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu

    context: Any = get_forward_context()
    if context.attn_metadata is None:
        return
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    metadata = context.attn_metadata[layer.prefix]
    starts, blocks = metadata.non_spec_query_start_loc, metadata.non_spec_state_indices_tensor
    conv_state, states = layer.kv_cache
    known = metadata.has_initial_state
    if known is None:
        known = torch.ones(len(starts) - 1, dtype=torch.bool)
    tokens = int(starts[-1])
    mixed = causal_conv1d_fn_cpu(
        mixed_qkv[:tokens].T,
        layer.conv1d.weight.squeeze(1),
        layer.conv1d.bias,
        conv_state if is_conv_state_dim_first() else conv_state.mT,
        starts,
        blocks,
        known,
        layer.activation,
    ).T
    q, k, v = (part[0].float() for part in layer.rearrange_mixed_qkv(mixed))
    q, k = (part * (part.square().sum(-1, keepdim=True) + _LENGTH_EPS).rsqrt() for part in (q, k))
    q, k = (part.repeat_interleave(v.shape[1] // part.shape[1], dim=1) for part in (q, k))
    q = q * q.shape[-1] ** -0.5
    a, b = a[:tokens].float(), b[:tokens].float()
    kept = (-layer.A_log.float().exp() * F.softplus(a + layer.dt_bias.float())).exp()
    rate = b.sigmoid()
    for i, (begin, end) in enumerate(_bounds(starts)):
        block = int(blocks[i])
        state = states[block].float() if known[i] else torch.zeros_like(states[block].float())
        for t in range(begin, end):
            state = state * kept[t, :, None, None]
            error = v[t] - (state * k[t].unsqueeze(1)).sum(-1)
            state = state + (rate[t].unsqueeze(-1) * error).unsqueeze(-1) * k[t].unsqueeze(1)
            core_attn_out[t] = (state * q[t].unsqueeze(1)).sum(-1).to(core_attn_out.dtype)
        states[block] = state.to(states.dtype)


def use_delta_rule() -> None:
    """Have vLLM's CPU operator of gated delta nets be the one here, before a model registers it.

    vLLM 0.33: its own takes bfloat16 only. Can go when that one takes float32.
    """
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    gdn_attention.cpu_gdn_attention_core = _delta_rule


@operator("causal_conv1d_weight_pack(Tensor weight) -> Tensor")
def _weight_pack(weight: Tensor) -> Tensor:
    """``[dim, width]`` as it was, ``[dim, 1, width]``: PyTorch needs no packing."""
    return weight.unsqueeze(1).clone()


def _bounds(starts: Tensor) -> list[tuple[int, int]]:
    """Where each of a batch's sequences begins and ends; starts ``[sequences + 1]``."""
    return list(pairwise(starts.tolist()))
