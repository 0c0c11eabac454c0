"""Tiny random models that see pictures, with tokenizer and processor; pictures; an oracle."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import torch
import transformers
from checkpoints import SMALL, random_weight
from hf import load_model, plain_classes
from oracle import OracleModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    PreTrainedTokenizerFast,
)

END, STOP, START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
PATCH, SIDE, SCALE = 14, 84, 2
TOKENS = (SIDE // PATCH // SCALE) ** 2


@dataclass(frozen=True)
class Family:
    """Models that see pictures.

    ``names`` are special tokens by what the processor calls them; ``asks`` is what a prompt has in
    place of a picture, as names in braces; ``processor(tokenizer)`` makes that.
    """

    names: dict[str, str]
    asks: str
    text: dict[str, Any]
    vision: dict[str, Any]
    processor: Callable[[Any], Any]
    config: Callable[[Any], dict[str, Any]] = lambda tokenizer: {}
    # Further tokens that vLLM looks for.
    more: tuple[str, ...] = ()
    # A part of weights' names, and what published checkpoints have in its place.
    published: tuple[str, str] = ("", "")

    @property
    def placeholder(self) -> str:
        return self.asks.format(**self.names)


_SQUARE = {"height": SIDE, "width": SIDE}
_SIGHT = {
    # As many layers as the decoder has, which are told apart all the same.
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_QWEN_SIGHT = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": SCALE,
    "out_hidden_size": 128,
}
_QWEN_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_QWEN_ASKS = "{vision_start_token}{image_token}{vision_end_token}"


def _qwen_text(**rope: Any) -> dict[str, Any]:
    return {
        "hidden_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **rope},
    }


def _qwen_processor(kind: str, video: str, tokenizer: Any) -> Any:
    settings = {"patch_size": PATCH, "merge_size": SCALE}
    size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    return getattr(transformers, kind)(
        transformers.Qwen2VLImageProcessor(size=size, **settings),
        tokenizer,
        getattr(transformers, video)(size=size, **settings),
    )


def _qwen_config(tokenizer: Any) -> dict[str, Any]:
    return {
        f"{name}_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in _QWEN_NAMES.items()
        if name != "image_token"
    }


FAMILIES = {
    "idefics3": Family(
        names={
            "image_token": "<image>",
            "around": "<fake_token_around_image>",
            "global": "<global-img>",
            "utterance": "<end_of_utterance>",
        },
        asks="{image_token}",
        text={"model_type": "llama"},
        vision=_SIGHT,
        config=lambda tokenizer: {"scale_factor": SCALE},
        processor=lambda tokenizer: transformers.Idefics3Processor(
            transformers.Idefics3ImageProcessor(
                size={"longest_edge": SIDE},
                max_image_size={"longest_edge": SIDE},
                do_image_splitting=False,
            ),
            tokenizer,
            image_seq_len=TOKENS,
        ),
    ),
    "qwen2_5_vl": Family(
        names=_QWEN_NAMES,
        asks=_QWEN_ASKS,
        text=_qwen_text(mrope_section=[8, 4, 4]),
        vision={**_QWEN_SIGHT, "window_size": 2 * SCALE * PATCH, "fullatt_block_indexes": [1, 3]},
        config=_qwen_config,
        processor=partial(_qwen_processor, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    ),
    "qwen3_vl": Family(
        names=_QWEN_NAMES,
        asks=_QWEN_ASKS,
        text=_qwen_text(mrope_section=[8, 4, 4], mrope_interleaved=True),
        vision={
            **_QWEN_SIGHT,
            "deepstack_visual_indexes": [0, 1, 2],
            "num_position_embeddings": (SIDE // PATCH) ** 2,
        },
        config=_qwen_config,
        processor=partial(_qwen_processor, "Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    ),
    "qwen3_5": Family(
        names=_QWEN_NAMES,
        asks=_QWEN_ASKS,
        text={
            **checkpoints._DELTA_NET,
            **_qwen_text(
                mrope_section=[8, 4, 4], mrope_interleaved=True, partial_rotary_factor=1.0
            ),
        },
        vision={**_QWEN_SIGHT, "num_position_embeddings": (SIDE // PATCH) ** 2},
        config=_qwen_config,
        processor=partial(_qwen_processor, "Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    ),
    "internvl": Family(
        names={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        asks="{context_image_token}",
        text={"model_type": "qwen2", "hidden_size": 128},
        vision=_SIGHT,
        config=lambda tokenizer: {"image_seq_length": TOKENS, "downsample_ratio": 1 / SCALE},
        processor=lambda tokenizer: transformers.InternVLProcessor(
            transformers.GotOcr2ImageProcessor(size=_SQUARE, crop_to_patches=False),
            tokenizer,
            transformers.InternVLVideoProcessor(size=_SQUARE),
            image_seq_length=TOKENS,
        ),
    ),
    "mistral3": Family(
        names={"image_token": "[IMG]", "row_end": "[IMG_BREAK]", "image_end": "[IMG_END]"},
        asks="{image_token}",
        text={"model_type": "mistral", "hidden_size": 128, "sliding_window": None},
        vision={**_SIGHT, "model_type": "pixtral", "head_dim": 32},
        config=lambda tokenizer: {
            "spatial_merge_size": SCALE,
            "vision_feature_layer": -1,
        },
        processor=lambda tokenizer: transformers.PixtralProcessor(
            transformers.PixtralImageProcessor(
                size={"longest_edge": SIDE}, patch_size={"height": PATCH, "width": PATCH}
            ),
            tokenizer,
            patch_size=PATCH,
            spatial_merge_size=SCALE,
        ),
    ),
    "llama4": Family(
        names={
            "image_token": "<|patch|>",
            "whole": "<|image|>",
            "start_of_image": "<|image_start|>",
            "end_of_image": "<|image_end|>",
            "across": "<|tile_x_separator|>",
            "down": "<|tile_y_separator|>",
        },
        asks="{whole}",
        text={**checkpoints.FAMILIES["llama4_text"], "pad_token_id": 0},
        vision={
            **_SIGHT,
            "intermediate_size": 64 * SCALE**2,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "pixel_shuffle_ratio": 1 / SCALE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        config=lambda tokenizer: {
            "boi_token_index": tokenizer.convert_tokens_to_ids("<|image_start|>"),
            "eoi_token_index": tokenizer.convert_tokens_to_ids("<|image_end|>"),
        },
        processor=lambda tokenizer: transformers.Llama4Processor(
            transformers.Llama4ImageProcessor(size=_SQUARE, max_patches=1),
            tokenizer,
            patch_size=PATCH,
            pixel_shuffle_ratio=1 / SCALE,
        ),
    ),
    "gemma3": Family(
        names={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        asks="{boi_token}",
        more=tuple("\n" * n for n in range(1, 5)),
        published=("vision_tower.", "vision_tower.vision_model."),
        text={
            "model_type": "gemma3_text",
            "tie_word_embeddings": True,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 32,
        },
        vision=_SIGHT,
        config=lambda tokenizer: {
            "mm_tokens_per_image": TOKENS,
            "boi_token_index": tokenizer.boi_token_id,
            "eoi_token_index": tokenizer.eoi_token_id,
        },
        processor=lambda tokenizer: transformers.Gemma3Processor(
            transformers.Gemma3ImageProcessor(size=_SQUARE),
            tokenizer,
            image_seq_length=TOKENS,
        ),
    ),
}
CHAT_TEMPLATE = (
    "{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n"
    "{{% if m['content'] is string %}}{{{{ m['content'] }}}}"
    "{{% else %}}{{% for part in m['content'] %}}"
    "{{% if part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% else %}}{}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}<|im_end|>\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


def make_picture(seed: int) -> Image.Image:
    """A square picture of coarse random tiles."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(0, 256, (3, 3, 3), generator=generator)
    picture = Image.fromarray(tiles.byte().numpy())
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A token for each byte, and those that stand around messages and pictures."""
    special = [END, STOP, START, *family.names.values(), *family.more]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=STOP,
        pad_token=END,
        extra_special_tokens={"start": START, **family.names},
        chat_template=CHAT_TEMPLATE.format(family.placeholder),
    )


def make_seeing_checkpoint(directory: Any, arch: str = "idefics3", seed: int = 0) -> Path:
    """Write a random fp32 model of FAMILIES with all that a server of it needs.

    Raises ImportError: for most processors where there is no torchvision.
    """
    directory, family = Path(directory), FAMILIES[arch]
    tokenizer = make_tokenizer(family)
    processor = family.processor(tokenizer)
    kind = type(AutoConfig.for_model(arch).text_config).model_type
    text = {**SMALL, "model_type": kind, "vocab_size": len(tokenizer), **family.text}
    picture = family.names.get("image_token") or family.names["context_image_token"]
    config = AutoConfig.for_model(
        arch,
        text_config=text,
        vision_config=family.vision,
        image_token_id=tokenizer.convert_tokens_to_ids(picture),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=text["tie_word_embeddings"],
        **family.config(tokenizer),
    )
    with plain_classes(config):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "language_model" in name or "text_model" in name or "lm_head" in name:
                # Llama 4 keeps matrices of experts as [experts, in, out].
                turned = arch == "llama4" and parameter.ndim == 3
                shape = parameter.mT.shape if turned else parameter.shape
                weight = random_weight(name, shape, config.get_text_config(), generator)
                weight = weight.mT if turned else weight
            elif parameter.ndim == 1:
                weight = torch.full(parameter.shape, float("bias" not in name))
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                weight = noise / parameter[0].numel() ** 0.5
            parameter.copy_(weight)
    model.save_pretrained(directory, safe_serialization=True)
    weights = load_file(directory / "model.safetensors")
    renamed = {name.replace(*family.published): weight for name, weight in weights.items()}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    processor.chat_template = tokenizer.chat_template
    processor.save_pretrained(directory)
    return directory


class SeeingOracle(OracleModel):
    """As the oracle, of prompts with one picture each, which the model reads in one piece."""

    load = staticmethod(partial(load_model, kind=AutoModelForImageTextToText))

    def __init__(self, path: Any, pace: dict[str, Any]):
        super().__init__(path, pace)
        self._processor = AutoProcessor.from_pretrained(path)
        self._family = FAMILIES[self.model.config.model_type]

    def place(self) -> list[int]:
        """Token ids of what a prompt has in place of a picture."""
        return self._processor.tokenizer.encode(self._family.placeholder, add_special_tokens=False)

    def answer(
        self, prompt: list[int], picture: Image.Image, max_tokens: int
    ) -> tuple[list[int], list[float]]:
        """As ``generate``."""
        whole, seen = self.expand(prompt, picture)
        self._reset({})
        logits = self._read(whole, **seen)
        logprobs = logits[:-1].log_softmax(dim=-1)
        prompt_logprobs = [logprobs[t, token].item() for t, token in enumerate(whole[1:])]
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < max_tokens:
            tokens.append(int(self._read(tokens[-1:])[-1].argmax()))
        return tokens, prompt_logprobs

    def expand(self, prompt: list[int], picture: Image.Image) -> tuple[list[int], dict[str, Any]]:
        """``prompt`` with all places that its picture takes, and what else the model is given."""
        place = self.place()
        at = next(i for i in range(len(prompt)) if prompt[i : i + len(place)] == place)
        seen = self._processor(
            text=[self._family.placeholder], images=[[picture]], return_tensors="pt"
        )
        inner = seen.pop("input_ids")[0].tolist()
        before, after = prompt[:at], prompt[at + len(place) :]
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in seen:
                kinds = [*[0] * len(before), *seen[name][0].tolist(), *[0] * len(after)]
                seen[name] = torch.tensor([kinds])
        del seen["attention_mask"]
        # Llama 4's processor rounds to bfloat16.
        seen = {name: x.float() if x.is_floating_point() else x for name, x in seen.items()}
        return [*before, *inner, *after], seen

    @torch.no_grad()
    def _read(self, token_ids: list[int], **more: Any) -> Tensor:
        out = self.model(
            input_ids=torch.tensor([token_ids]),
            past_key_values=self._cache,
            use_cache=True,
            **more,
        )
        return out.logits[0]

    def _reset(self, overrides: dict[str, Any]) -> None:
        super()._reset(overrides)
        self._cache = DynamicCache(config=self.model.config.get_text_config())
        self._read_by = dict.fromkeys(self.banks, 0)

    def _pass(self, index: int, a: Tensor) -> Tensor:
        """A layer sees all of a prompt before the next one does, so it can be cut in here."""
        flat, size, outputs = a.flatten(0, -2), self.rules.segment_size, []
        while len(flat):
            room = size - self._read_by[index] % size
            outputs.append(super()._pass(index, flat[:room]))
            self._read_by[index] += len(flat[:room])
            flat = flat[room:]
            if self._read_by[index] % size == 0:
                part = zip(*self._segment[index], strict=True)
                self.banks[index].update(*map(torch.cat, part))
                self._segment[index] = []
        return torch.cat(outputs).view(a.shape)
