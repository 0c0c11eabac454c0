"""A tiny random model that sees pictures, its tokenizer and processor, pictures, and its oracle."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import SMALL, random_weight
from hf import load_model
from oracle import OracleModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

END, STOP, START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
PICTURE, AROUND, GLOBAL, UTTERANCE = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
)
SPECIAL = (END, STOP, START, PICTURE, AROUND, GLOBAL, UTTERANCE)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH, SIDE, SCALE = 14, 84, 2


def make_picture(seed: int) -> Image.Image:
    """A square picture of coarse random tiles."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(0, 256, (3, 3, 3), generator=generator)
    picture = Image.fromarray(tiles.byte().numpy())
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and those that stand around messages and pictures."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=STOP,
        pad_token=END,
        extra_special_tokens=[START, PICTURE, AROUND, GLOBAL, UTTERANCE],
        chat_template=CHAT_TEMPLATE,
    )


def make_seeing_checkpoint(directory: Any, seed: int = 0) -> Path:
    """Write a random fp32 Idefics 3 with all that a server of it needs; return its directory."""
    directory = Path(directory)
    tokenizer = make_tokenizer()
    text = {**SMALL, "model_type": "llama", "vocab_size": len(tokenizer)}
    vision = {
        # As many layers as the decoder has, which are told apart all the same.
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = AutoConfig.for_model(
        "idefics3",
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids(PICTURE),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=SCALE,
        tie_word_embeddings=False,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "vision_model" not in name and "connector" not in name:
                weight = random_weight(name, parameter.shape, config.get_text_config(), generator)
            elif parameter.ndim == 1:
                weight = torch.full(parameter.shape, float("norm" in name))
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                weight = noise / parameter[0].numel() ** 0.5
            parameter.copy_(weight)
    model.save_pretrained(directory, safe_serialization=True)
    Idefics3Processor(
        Idefics3ImageProcessor(
            size={"longest_edge": SIDE},
            max_image_size={"longest_edge": SIDE},
            do_image_splitting=False,
        ),
        tokenizer,
        image_seq_len=(SIDE // PATCH // SCALE) ** 2,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
    return directory


class SeeingOracle(OracleModel):
    """As the oracle, of prompts with one picture each."""

    load = staticmethod(partial(load_model, kind=AutoModelForImageTextToText))

    def __init__(self, path: Any, pace: dict[str, Any]):
        super().__init__(path, pace)
        self._processor = AutoProcessor.from_pretrained(path)

    def see(self, prompt: list[int], picture: Image.Image) -> tuple[list[int], torch.Tensor]:
        """``prompt`` with all places that its picture takes, and what the decoder reads [T, H]."""
        at = prompt.index(self.model.config.image_token_id)
        seen = self._processor(text=[PICTURE], images=[[picture]], return_tensors="pt")
        whole = [*prompt[:at], *seen.pop("input_ids")[0].tolist(), *prompt[at + 1 :]]
        del seen["attention_mask"]
        self.banks = {}
        read = []
        hook = self.model.model.text_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad():
            self.model(input_ids=torch.tensor([whole]), **seen)
        hook.remove()
        return whole, read[0][0]

    def answer(
        self, prompt: list[int], picture: Image.Image, max_tokens: int
    ) -> tuple[list[int], list[float]]:
        """As ``generate``."""
        whole, states = self.see(prompt, picture)
        self._reset({})
        logits = self._feed(states)
        logprobs = logits[:-1].log_softmax(dim=-1)
        prompt_logprobs = [logprobs[t, token].item() for t, token in enumerate(whole[1:])]
        tokens = [int(logits[-1].argmax())]
        embed = self.model.get_input_embeddings()
        while len(tokens) < max_tokens:
            tokens.append(int(self._feed(embed(torch.tensor(tokens[-1:])))[-1].argmax()))
        return tokens, prompt_logprobs

    def _logits(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self.model.model.text_model(
            inputs_embeds=states[None],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return self.model.lm_head(out.last_hidden_state)[0]
