"""Make a tiny random Qwen2 with a tokenizer that reads real text, and memory switched on.

    python scripts/make_tiny_model.py OUT

It knows nothing: its answers are noise. It is there to see an engine with memory at work. Token
embeddings dominate its residual stream, so that what was seen before is recognised as such.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "LICENSE"
VOCABULARY = 1000
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PACELLM = {"layers": [1, 3], "segment_size": 256}

# Standard deviation times sqrt(inputs), by the end of a weight's name; the rest keep 1.
GAINS = {"o_proj": 0.2, "down_proj": 0.5, "lm_head": 2.0}


def make_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.read_text()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=STOP, pad_token=END)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return fast


def make_weights(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            dtype="float32",
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                continue
            part = name.split(".")[-2]
            inputs = 1 if part == "embed_tokens" else weight.shape[1]
            weight.normal_(0, GAINS.get(part, 1.0) * inputs**-0.5, generator=generator)
    model.save_pretrained(directory)


def main(out: str) -> None:
    directory = Path(out)
    make_weights(directory, make_tokenizer(directory))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": ["PaceQwen2ForCausalLM"], "pacellm": PACELLM}
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/make_tiny_model.py OUT")
    main(sys.argv[1])
