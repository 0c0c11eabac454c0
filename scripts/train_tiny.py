"""Train a tiny Qwen2 that reads text and finds needles in it; CPU, one thread.

    python scripts/train_tiny.py OUT [--seed S] [--threads T] [--steps N]

scripts/tiny is what the default settings made; training.log is what that printed.

A sample is filler with statements ("The magic number of Paris is 48.") at random places, then the
same statements in another order, whose numbers are the answers. The loss is that of the answers
plus that of all other words. Text grows by one stage whenever the answers are right; in the last
stage, whose longest text is the training length, the learning rate then falls to zero. OUT is
rewritten after each stage, so an interrupted run leaves the last one. The same seed, threads and
machine give the same model.

The weights start near an induction circuit (seed_induction); nothing holds them there. Waiting for
it to form by itself takes longer on one core than all else.

Whatever the model says passes through its FFNs: attention writes to the first CARRIED channels of
the residual stream only, and the head reads the rest only (hold). Without this, attention alone
answers, FFNs do not matter to needles, and a memory in FFNs has nothing to gain or to lose.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pacellm_vllm.evals.text import KEYS, NEEDLE, sentences, vocabulary

VALUES = range(10, 100)
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
)
# (needles, filler tokens); the whole text is 16 tokens a needle longer.
STAGES = [(6, 0), (8, 48), (6, 192), (4, 256)]
MASTERED = 0.97
LAST_STEPS = 300
CARRIED = 96
TOKENS_PER_STEP = 3072
RATE = 2e-3
FILLER_WEIGHT = 0.5


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the text is one token, its space included; any other text falls back to bytes.

    Words are added tokens, because transformers reads only the vocabulary of a Qwen2 checkpoint's
    tokenizer.json and brings its own rules for splitting text, which cut numbers into digits.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [END, START, STOP, *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=STOP, pad_token=END)
    words = ["The", *(f" {word}" for word in [*vocabulary(), *VALUES])]
    fast.add_tokens([AddedToken(word, normalized=False) for word in words])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=8192,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            dtype=torch.float32,
        )
    )
    seed_induction(model, tokenizer.convert_tokens_to_ids([f" {value}" for value in VALUES]))
    hold(model)
    return model


@torch.no_grad()
def hold(model: Qwen2ForCausalLM) -> None:
    """Keep what attention writes and what the head reads apart; only FFNs carry across."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[CARRIED:] = 0
    model.model.norm.weight[:CARRIED] = 0


@torch.no_grad()
def seed_induction(model: Qwen2ForCausalLM, values: list[int]) -> None:
    """Start with a rough circuit that finds "Paris is 48" from "Paris is".

    Layer 0: head 0 copies the token one back, head 1 the token two back, each into directions of
    its own. Layer 1: head 0 compares what head 0 wrote with what head 1 wrote, and copies the
    token it finds. The last FFN: a neuron for each token of ``values`` answers to what layer 1
    copies of it, and says it. Every number here is a parameter that training goes on to change.
    """
    for layer in model.model.layers:  # quiet beside the circuit
        layer.self_attn.o_proj.weight *= 0.2
        layer.mlp.down_proj.weight *= 0.2
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    size, width = first.head_dim, model.config.hidden_size
    read = torch.zeros(size, width)
    read[:, CARRIED:] = torch.linalg.qr(torch.randn(size, width - CARRIED))[0]
    written = torch.zeros(3 * size, width)
    written[:, :CARRIED] = torch.linalg.qr(torch.randn(CARRIED, 3 * size))[0].T
    written = written.split(size)
    for head, back in ((0, 1), (1, 2)):
        look_back(model, head, back)
        rows = slice(head * size, (head + 1) * size)
        first.v_proj.weight[rows] = read
        first.o_proj.weight[:, rows] = 0.2 * written[head].T
    slow = slow_rows(model)
    second.q_proj.weight[:size] = second.k_proj.weight[:size] = 0
    second.q_proj.weight[slow] = 3 * written[0][: len(slow)]
    second.k_proj.weight[slow] = 3 * written[1][: len(slow)]
    second.v_proj.weight[:size] = read
    second.o_proj.weight[:, :size] = 0.4 * written[2].T
    tokens = torch.nn.functional.normalize(model.model.embed_tokens.weight[values], dim=1)
    copied = torch.nn.functional.normalize(tokens @ read.T @ written[2], dim=1)
    last = model.model.layers[-1].mlp
    last.gate_proj.weight[: len(values)] = last.up_proj.weight[: len(values)] = copied
    last.down_proj.weight[:, : len(values)] = tokens.T


def slow_rows(model: Qwen2ForCausalLM) -> torch.Tensor:
    """Rows of a head that rotary embedding turns by less than one radian in the longest text."""
    speeds = model.model.rotary_emb.inv_freq
    slow = (speeds * (STAGES[-1][1] + 16 * STAGES[-1][0]) < 1).nonzero().flatten()
    return torch.cat([slow, slow + len(speeds)])


def look_back(model: Qwen2ForCausalLM, head: int, back: int, strength: float = 6.0) -> None:
    """Bias a head of layer 0 towards the token ``back`` places earlier.

    Rotary embedding turns the pair (i, i + half) of q by its position times w_i; a constant query
    turned back by ``back * w_i`` meets the constant key best at that distance. Only the fast half
    of the frequencies tells neighbours apart.
    """
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    half, begin = size // 2, head * size
    speeds = model.model.rotary_emb.inv_freq[: half // 2]
    q, k = attention.q_proj.bias, attention.k_proj.bias
    index = torch.arange(begin, begin + len(speeds))
    k[index] = strength
    q[index] = strength * torch.cos(back * speeds)
    q[index + half] = -strength * torch.sin(back * speeds)


class Samples:
    """Batches of token ids and, for each, which tokens are answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.rng = random.Random(seed)
        self.text = sentences(self.rng)
        self.encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        self.cache: dict[str, list[int]] = {}
        [self.first] = self.encode("The")

    def ids(self, sentence: str) -> list[int]:
        if sentence not in self.cache:
            self.cache[sentence] = self.encode(sentence)
        return self.cache[sentence]

    def one(self, needles: int, filler: int) -> tuple[list[int], list[int], int]:
        """Token ids, the places of the answers, and where the questions begin."""
        rng = self.rng
        parts, used = [], 0
        while used < filler:
            parts.append(self.ids(" " + next(self.text)))
            used += len(parts[-1])
        facts = [
            self.ids(" " + NEEDLE.format(key=key, value=rng.choice(VALUES)))
            for key in rng.sample(KEYS, needles)
        ]
        for fact in facts:
            parts.insert(rng.randint(0, len(parts)), fact)
        tokens = [token for part in parts for token in part]
        tokens[0] = self.first
        begin, answers = len(tokens), []
        for fact in rng.sample(facts, needles):
            tokens += fact
            answers.append(len(tokens) - 2)
        return tokens, answers, begin

    def batch(self, size: int, needles: int, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [size, L] int64, kinds [size, L] int8: 0 padding, 1 text, 2 answer."""
        rows = [self.one(needles, filler) for _ in range(size)]
        length = max(len(tokens) for tokens, _, _ in rows)
        tokens = torch.zeros(size, length, dtype=torch.int64)
        kinds = torch.zeros(size, length, dtype=torch.int8)
        for row, (ids, answers, begin) in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            kinds[row, :begin] = 1
            kinds[row, answers] = 2
        return tokens, kinds


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    half = Qwen2ForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def answered(model: Qwen2ForCausalLM, samples: Samples, without: tuple[int, ...] = ()) -> float:
    """Share of right answers in texts of the last stage's full length, ``without`` some FFNs."""
    needles, filler = STAGES[-1]
    hooks = [
        model.model.layers[i].mlp.register_forward_hook(lambda *a: torch.zeros_like(a[-1]))
        for i in without
    ]
    tokens, kinds = samples.batch(64, needles, filler)
    hits = model(tokens).logits[:, :-1].argmax(-1) == tokens[:, 1:]
    for hook in hooks:
        hook.remove()
    return hits[kinds[:, 1:] == 2].float().mean().item()


def report(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Print how many answers are right in texts not trained on, and without FFNs."""
    layers = range(model.config.num_hidden_layers)
    for without in ((), *((i,) for i in layers), tuple(layers)):
        share = answered(model, Samples(tokenizer, seed + 1), without)
        print(f"answers at the training length without FFNs {[*without]}: {share:.3f}")


def train(out: Path, seed: int, steps: float) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    samples = Samples(tokenizer, seed)
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "mlp" not in n]
    kept = [p for n, p in model.named_parameters() if p.dim() == 1 or "mlp" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    start, step, stage, last, right = time.time(), 0, 0, 0, 0.0
    while last < LAST_STEPS and step < steps:
        needles, filler = STAGES[stage]
        if filler:
            filler = samples.rng.randint(filler // 2, filler)
        size = max(4, TOKENS_PER_STEP // (16 * needles + filler))
        tokens, kinds = samples.batch(size, needles, filler)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (1 - last / LAST_STEPS)
        logits, target, kinds = model(tokens).logits[:, :-1], tokens[:, 1:], kinds[:, 1:]
        answers, text = kinds == 2, kinds == 1
        answer_loss = torch.nn.functional.cross_entropy(logits[answers], target[answers])
        text_loss = torch.nn.functional.cross_entropy(logits[text], target[text])
        optimizer.zero_grad()
        (answer_loss + FILLER_WEIGHT * text_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        hold(model)
        step += 1
        hits = (logits[answers].argmax(-1) == target[answers]).float().mean().item()
        right = 0.97 * right + 0.03 * hits
        if last or (right > MASTERED and stage == len(STAGES) - 1):
            last += 1
        elif right > MASTERED:
            print(f"stage {stage} done at step {step}, {time.time() - start:.0f} s", flush=True)
            save(model, tokenizer, out)
            stage, right = stage + 1, 0.5
        if step % 50 == 0:
            print(
                f"step {step} stage {stage} {time.time() - start:.0f} s: right {right:.3f}, "
                f"answer loss {answer_loss.item():.3f}, text loss {text_loss.item():.3f}",
                flush=True,
            )
    save(model, tokenizer, out)
    print(f"done at step {step}, {time.time() - start:.0f} s")
    report(model, tokenizer, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=float, default=math.inf, help="stop after this many")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.seed, args.steps)
