"""pacify: the subclass of a vLLM decoder whose chosen FFNs carry memory, experts or both."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size

from pacellm_vllm.compat import (
    pack_cpu_attention,
    place_shared_layers,
    start_state_updates,
    with_final_blocks,
)
from pacellm_vllm.config import PaceConfigError
from pacellm_vllm.memory.layer import PaceMemory, memory_layers
from pacellm_vllm.memory.plan import plan_spec
from pacellm_vllm.memory.stage import StageWithoutMemory
from pacellm_vllm.models.experts import ModelExperts
from pacellm_vllm.models.ffn import FeedForward, check_shared_out, find_feed_forward, remember
from pacellm_vllm.models.layers import DecoderLayer, DecoderLayers
from pacellm_vllm.models.routed import route
from pacellm_vllm.models.settings import read_config
from pacellm_vllm.models.site import choose_site, over_stages
from pacellm_vllm.models.whole import check_reduced, find_whole, remember_output


@contextmanager
def _as_architecture(hf_config: Any, architecture: str) -> Iterator[None]:
    """Show the base class the name it knows: transformers keeps renamings of weights by it."""
    ours = hf_config.architectures
    hf_config.architectures = [architecture]
    try:
        yield
    finally:
        hf_config.architectures = ours


def _dense(layer: DecoderLayer) -> FeedForward | PaceConfigError:
    """The dense FFN of ``layer`` whose activations ranks share out, or why there is none."""
    try:
        ffn = find_feed_forward(layer)
        check_shared_out(ffn, get_tensor_model_parallel_world_size())
    except PaceConfigError as error:
        return error
    return ffn


def pacify(base: Any, name: str) -> type[nn.Module]:
    """Subclass a vLLM decoder so that the configured layers' FFNs carry memory and experts.

    Weight names, loaders, quantisation, LoRA and sharding stay those of ``base``.
    """

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with _as_architecture(vllm_config.model_config.hf_config, name.removeprefix("Pace")):
            base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        config = read_config(vllm_config)
        model = vllm_config.model_config
        layers = config.resolve_layers(model.get_total_num_hidden_layers())
        if layers:
            pack_cpu_attention(vllm_config)
            start_state_updates(vllm_config)
            place_shared_layers()
        experts = ModelExperts(vllm_config, config.experts) if config.experts else None
        with_experts = experts.plan.layers if experts else ()
        # The decoder layers of this pipeline stage.
        here = range(*model.get_layers_start_end_indices(vllm_config.parallel_config))
        decoder = DecoderLayers(self, model.get_total_num_hidden_layers(), prefix)
        dense = {i: _dense(decoder[i]) for i in sorted({*layers, *with_experts} & {*here})}
        if layers:
            config = config.at(choose_site(config, [dense[i] for i in layers if i in dense]))
        width = None
        for index, ffn in dense.items():
            memory = None
            if index in layers and config.site == "output":
                whole = find_whole(decoder[index])
                check_reduced(whole, get_tensor_model_parallel_world_size())
                width = model.get_hidden_size()
                memory = PaceMemory(config, index, width, f"{whole.name}.memory", whole=True)
                remember_output(whole, memory)
                continue
            if isinstance(ffn, PaceConfigError):
                raise ffn
            if index in layers:
                width = ffn.width
                memory = PaceMemory(config, index, width, f"{ffn.name}.memory")
            routed = experts.attach(ffn, index) if experts and index in with_experts else None
            if routed:
                route(ffn, routed, memory)
            elif memory:
                remember(ffn, memory)
        if layers and not all(widths := over_stages(width)):
            width = next(filter(None, widths))
            if not {*layers} & {*here}:
                StageWithoutMemory(vllm_config, config, width, f"{decoder[here[0]].name}.stage")
        if width:
            # What stands in the way of banks is said before weights are loaded.
            plan_spec(with_final_blocks(vllm_config), config, width)
        self._pace_experts = experts
        self._pace_memories = memory_layers(vllm_config)

    def load_weights(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        experts = self._pace_experts
        return base.load_weights(self, experts.reorder(weights) if experts else weights)

    def compute_logits(self: Any, *args: Any, **kwargs: Any) -> Any:
        # After a forward, if only a profiling one.
        for memory in self._pace_memories:
            memory.check_called()
        return base.compute_logits(self, *args, **kwargs)

    body: dict[str, Any] = {
        "__init__": __init__,
        "load_weights": load_weights,
        "compute_logits": compute_logits,
        "__module__": "pacellm_vllm.models",
    }
    return type(name, (base,), body)
