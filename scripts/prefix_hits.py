"""How much of a shared prefix a second request finds in the cache, with memory and without.

    python scripts/prefix_hits.py [--model scripts/tiny] [--segment-size 512]

Two requests share a prefix and have 300 tokens of their own each. Prints a Markdown table: for each
length of the prefix in segments and each size of a forward, the tokens that the second request
found without memory and with it.
"""

import argparse
import os

os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams

SEGMENTS = (0.5, 1, 1.5, 2, 3, 5)
FORWARDS = (512, 2048, 8192)
OWN = 300


def hits(args: argparse.Namespace, forward: int, memory: bool) -> list[int]:
    """What the second of two requests found, for each of SEGMENTS."""
    settings = {}
    if memory:
        settings = {
            "hf_overrides": {"architectures": [args.architecture]},
            "additional_config": {
                "pacellm": {"segment_size": args.segment_size, "bank_size": args.bank_size}
            },
        }
    llm = LLM(
        args.model,
        dtype="float32",
        max_model_len=8192,
        max_num_batched_tokens=forward,
        enable_prefix_caching=True,
        block_size=16,
        **settings,
    )
    params = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    found = []
    for row, segments in enumerate(SEGMENTS):
        shared = [5 + (7 * i + row) % 200 for i in range(int(segments * args.segment_size))]
        for own in range(2):
            tail = [5 + (11 * i + row + own) % 190 for i in range(OWN)]
            [output] = llm.generate([{"prompt_token_ids": shared + tail}], params, use_tqdm=False)
        found.append(output.num_cached_tokens)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scripts/tiny")
    parser.add_argument("--architecture", default="PaceQwen2ForCausalLM")
    parser.add_argument("--segment-size", type=int, default=512)
    parser.add_argument("--bank-size", type=int, default=100)
    args = parser.parse_args()
    columns = [
        (forward, memory, hits(args, forward, memory))
        for forward in FORWARDS
        for memory in (False, True)
    ]
    heads = [f"{forward}, {'memory' if memory else 'without'}" for forward, memory, _ in columns]
    print(f"| shared prefix, segments of {args.segment_size} | {' | '.join(heads)} |")
    print("|---" * (len(columns) + 1) + "|")
    for row, segments in enumerate(SEGMENTS):
        cells = " | ".join(str(found[row]) for _, _, found in columns)
        print(f"| {segments:g} ({int(segments * args.segment_size)} tokens) | {cells} |")


if __name__ == "__main__":
    main()
