"""Run by ``test_experts_fused.py``: the GPU path's kernels, interpreted or compiled for a GPU.

Triton decides on import whether it interprets, so both need a process of their own.
"""

import json
import sys

import torch

from pacellm_vllm.compat import grouped_product_tiles
from pacellm_vllm.experts.ffn import FfnWeights, masked
from pacellm_vllm.experts.fused import fused_activations, fused_output
from pacellm_vllm.experts.routing import ExpertRouter

# Tokens, experts, neurons of an expert, hidden size: odd ones, one token, more than the few.
SHAPES = [(1, 4, 3, 10), (16, 8, 43, 128), (37, 11, 3, 20), (70, 1, 33, 16)]


def gated(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def plain(x):
    return torch.relu(x).square()


def difference(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


def interpret():
    """Relative errors against the masked dense FFN in float64, by dtype, act and shape."""
    errors = {}
    # Triton's interpreter multiplies bfloat16 as if it were integers.
    for dtype in (torch.float32, torch.float16):
        for act, blocks in ((gated, 2), (plain, 1)):
            for shape in SHAPES:
                tokens, experts, size, hidden = shape
                generator = torch.Generator().manual_seed(tokens)

                def rand(*sizes, dtype=dtype, generator=generator):
                    return (torch.randn(*sizes, generator=generator) / 3).to(dtype)

                width = experts * size
                inputs, down = rand(blocks * width, hidden), rand(hidden, width)
                x = rand(tokens, hidden)
                biases = rand(blocks * width), rand(hidden)
                chosen = torch.rand(tokens, experts, generator=generator) < 0.4
                if experts > 1:
                    chosen[:, 2], chosen[0, 1] = False, True
                exact = torch.nn.functional.linear(x.double(), inputs.double(), biases[0].double())
                a = masked(act(exact), chosen)
                out = torch.nn.functional.linear(a, down.double(), biases[1].double())
                if experts > 1:
                    # Nobody chose expert 2: what is not read may be NaN.
                    for block in range(blocks):
                        start = block * width + 2 * size
                        inputs[start : start + size] = torch.nan
                    if tokens <= 16:
                        down[:, 2 * size : 3 * size] = torch.nan
                w = FfnWeights(inputs, down, act, *biases)
                found = fused_activations(x, w, chosen)
                name = f"{dtype} {act.__name__} {shape}"
                assert not found[~chosen.repeat_interleave(size, dim=1)].any()
                errors[f"{name} activations"] = difference(found, a)
                errors[f"{name} output"] = difference(fused_output(x, w, chosen), out)
    return errors


def trace():
    """How many graphs torch.compile needs for both kinds of router and numbers of tokens."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    width, hidden = 24, 10
    generator = torch.Generator().manual_seed(0)
    w = FfnWeights(
        torch.randn(2 * width, hidden, generator=generator),
        torch.randn(hidden, width, generator=generator),
        gated,
    )
    for how in ({"top_k": 3}, {"mass": 0.6}):
        router = ExpertRouter(6, hidden, gated, **how)
        router.fill(*w.inputs.split(width))

        def run(x, router=router):
            return fused_output(x, w, router.choose(x))

        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
        for tokens in (5, 40):
            x = torch.randn(tokens, hidden, generator=generator)
            torch.testing.assert_close(compiled(x), run(x))
    return len(graphs)


def compile_for_hopper():
    """Bytes of machine code for sm_90a, by kernel and tiles, at the shape of a 7B FFN."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_moe_kernel

    from pacellm_vllm.experts import kernels

    def size_of(kernel, constants, **options):
        types = dict.fromkeys(kernel.arg_names, "i32")
        types |= dict.fromkeys(constants, "constexpr")
        pointers = {"a": "bf16", "down": "bf16", "chosen": "u8", "parts": "fp32"}
        pointers |= {"a_ptr": "bf16", "b_ptr": "bf16", "c_ptr": "bf16", "b_bias_ptr": "bf16"}
        for name in types:
            if name not in constants and (name in pointers or name.endswith("_ptr")):
                types[name] = f"*{pointers.get(name, 'i32')}"
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if types[name].startswith("*")
        }
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert ".target sm_90a" in made.asm["ptx"]
        return len(made.asm["cubin"])

    sizes = {}
    for tokens in (1, 64, 8192):
        for bias in (False, True):
            tiles = grouped_product_tiles(tokens, 128, 296, 3584)
            options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
            unused = ["group_n", "group_k", "naive_block_assignment", "MUL_ROUTED_WEIGHT"]
            unused += ["use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "per_channel_quant"]
            constants = dict.fromkeys([*unused, "SWAP_AB", "USE_TD"], 0)
            constants |= dict.fromkeys(("a_scale_ptr", "b_scale_ptr", "topk_weights_ptr"))
            constants |= dict.fromkeys(("stride_ak", "stride_bk", "stride_cn", "stride_bbn"), 1)
            constants |= {"top_k": 128, "compute_type": tl.bfloat16, "HAS_BIAS": bias, **tiles}
            if not bias:
                constants["b_bias_ptr"] = None
            sizes[f"inputs {tokens} {bias}"] = size_of(fused_moe_kernel, constants, **options)
    constants = {"K": 64, "SIZE": 296, "BT": kernels.BLOCK_TOKENS, "BH": kernels.BLOCK_OUT}
    constants["BI"] = kernels.BLOCK_IN
    sizes["outputs"] = size_of(kernels.outputs_kernel, constants)
    return sizes


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        print(json.dumps({"errors": interpret(), "graphs": trace()}))
    else:
        print(json.dumps(compile_for_hopper()))
