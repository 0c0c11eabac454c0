"""PaceMemory: the memory of one FFN as a vLLM layer that owns pages of the KV cache pool."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from pacellm_vllm.compat import (
    add_splitting_op,
    eager_in_graphs,
    in_graph_piece,
    layer_in_step,
    layers_by_name,
    metadata_of_step,
    register_custom_op,
)
from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.backend import (
    BankBackend,
    BankMetadata,
    most_requests,
    takes_kernels,
)
from pacellm_vllm.memory.counts import MemoryCounts, PlainCounts
from pacellm_vllm.memory.plain import Done
from pacellm_vllm.memory.plan import plan_spec
from pacellm_vllm.memory.store import PagedStore, unit_view
from pacellm_vllm.ops.lookup import nearest_slots
from pacellm_vllm.ops.update import Progress

if TYPE_CHECKING:
    from pacellm_vllm.memory.device import DeviceStep

OP_NAME = "pacellm_memory"


class PaceMemory(nn.Module, AttentionLayerBase):
    """Looks activations up in their requests' banks and updates the banks.

    ``index`` is the decoder layer, ``width`` this rank's share of the intermediate size, or the
    whole hidden size where every rank holds the ``whole`` of what is remembered. It has no
    parameters, so weight loading does not see it. ``observers`` are told of each piece that the
    plain ops have advanced, with the step's activations, before the next one.
    """

    supports_dcp = False

    def __init__(
        self, config: PaceConfig, index: int, width: int, prefix: str, *, whole: bool = False
    ) -> None:
        super().__init__()
        vllm_config = get_current_vllm_config()
        layers = layers_by_name(vllm_config)
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self
        add_splitting_op(vllm_config, OP_NAME)

        self.index = index
        self.prefix = prefix
        self.config = config
        self.rules = config.rules()
        self.width = width
        self._plain_counts = MemoryCounts(plain=PlainCounts())
        self._tally: torch.Tensor | None = None
        if takes_kernels(vllm_config.device_config.device_type):
            from pacellm_vllm.memory.device import new_tally

            device = torch.device(vllm_config.device_config.device_type)
            self._tally = new_tally(most_requests(vllm_config), device)
        self.observers: list[Callable[[torch.Tensor, Done], None]] = []
        self.kv_cache = torch.tensor([])
        shared_out = get_tensor_model_parallel_world_size() > 1
        self._reduce = tensor_model_parallel_all_reduce if shared_out and not whole else None
        self._to_check = shared_out and whole
        self.was_called = False

    def get_attn_backend(self) -> type[AttentionBackend]:
        return BankBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        self.spec = plan_spec(vllm_config, self.config, self.width)
        return self.spec

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """Enhanced activations, or outputs, [..., tokens, width] in the dtype of ``a``."""
        # Models of vLLM's Transformers backend have a batch of one.
        flat = a.reshape(-1, self.width)
        out = torch.empty_like(flat)
        torch.ops.vllm.pacellm_memory(flat, out, self.prefix)
        return out.view(a.shape)

    def run(self, a: torch.Tensor, out: torch.Tensor, metadata: BankMetadata) -> None:
        """Advance every request's bank by its tokens of this step.

        ``RuntimeError`` where ``a`` has fewer rows than the step has tokens.
        """
        step = metadata.device or metadata.plain
        assert step is not None
        if step.num_tokens > len(a):
            raise RuntimeError(
                f"pacellm: {self.prefix} was given {len(a)} of the step's {step.num_tokens} "
                "tokens, and cannot tell which; serve the model without pacellm."
            )
        if metadata.device is not None:
            self._run_kernels(a, out, metadata.device)
        else:
            self._run_plain(a, out, metadata)

    def _run_kernels(self, a: torch.Tensor, out: torch.Tensor, step: "DeviceStep") -> None:
        assert self._tally is not None
        layout, stored = self.spec.layout, self.config.stored_dtype(a.dtype)
        step.run(self.kv_cache, layout, stored, self.rules, a, out, self._tally, self._reduce)

    def _run_plain(self, a: torch.Tensor, out: torch.Tensor, metadata: BankMetadata) -> None:
        step, journal = metadata.plain, metadata.journal
        assert step is not None
        # A fresh view each time: CUDA-graph memory profiling unbinds and rebinds the cache.
        units = unit_view(self.kv_cache, self.spec.layout, self.config.stored_dtype(a.dtype))
        for done in step.run(units, self.spec.layout, a, out, self._reduce):
            piece, progress, bank = done
            self._plain_counts.add(progress)
            for observe in self.observers:
                observe(a, done)
            if piece.asked and journal:
                near = self._nearest(bank, progress)
                journal.note(piece.asked, self.index, piece.position, piece.rules, progress, near)
        if journal:
            for asked, position, count in step.asked_idle:
                journal.note_idle(asked, self.index, position, count)

    def _nearest(self, bank: PagedStore, progress: Progress) -> list[tuple[int, float]]:
        """See ``nearest_slots``; empty where the bank has not changed."""
        if progress.committed is None or not progress.committed.valid:
            return []
        return nearest_slots(bank.read_keys(progress.committed.valid), self._reduce)

    def check_whole(self, a: torch.Tensor) -> None:
        """In the first step, mostly one without requests: whether all ranks hold the same ``a``.

        ``RuntimeError`` where each holds a part of a sum: some models add it up over ranks later,
        together with other parts, and banks of ranks would then differ.
        """
        if not self._to_check:
            return
        self._to_check = False
        # On a CPU the sum takes the place of what is summed.
        total = tensor_model_parallel_all_reduce(a.float().clone())
        mean = total / get_tensor_model_parallel_world_size()
        if (mean - a).norm() > 0.01 * a.float().norm():
            raise RuntimeError(
                f"pacellm: {self.prefix.removesuffix('.memory')} returns on each tensor parallel "
                "rank a part of its output only, which memory of outputs cannot compare; set site "
                "to activation, or --tensor-parallel-size to 1."
            )

    def check_called(self) -> None:
        """``RuntimeError`` where a forward has passed this layer by: a memory that does nothing."""
        if not self.was_called:
            raise RuntimeError(
                f"pacellm: the model does not call {self.prefix.removesuffix('.memory')} as a "
                "module, so its memory would do nothing; serve the model without pacellm."
            )

    @property
    def runs_kernels(self) -> bool:
        return self._tally is not None

    @property
    def counts(self) -> MemoryCounts:
        """What the memory did so far; with kernels, reading it waits for the device."""
        if self._tally is None:
            return self._plain_counts
        from pacellm_vllm.memory.device import counts_of

        return counts_of(self._tally)


def memory_layers(vllm_config: VllmConfig) -> list[PaceMemory]:
    """The memory layers of an engine, on this rank."""
    return [
        layer for layer in layers_by_name(vllm_config).values() if isinstance(layer, PaceMemory)
    ]


def note_experts(layer: int, chosen: torch.Tensor) -> None:
    """Into the ``Journal``: the experts [tokens, K] bool that this step's tokens computed."""
    metadata = metadata_of_step()
    steps = metadata.values() if isinstance(metadata, dict) else ()
    mine = next((one for one in steps if isinstance(one, BankMetadata)), None)
    if mine is None or mine.journal is None or mine.plain is None:
        return
    for asked, position, tokens in mine.plain.asked:
        mine.journal.note_experts(asked, layer, position, chosen[tokens])


@eager_in_graphs
def _memory_op(a: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    layer, metadata = layer_in_step(layer_name), metadata_of_step()
    layer.was_called = True
    if a.is_cuda and in_graph_piece():
        raise RuntimeError(
            f"pacellm: {layer_name} would be captured in a CUDA graph together with other layers, "
            "where it sees no requests; pass --enforce-eager."
        )
    layer.check_whole(a)
    # None is all a profiling run has: no pages exist yet.
    if metadata is None:
        out.copy_(a)
        return
    layer.run(a, out, _metadata_of(layer_name, metadata))


def _metadata_of(layer_name: str, metadata: Any) -> BankMetadata:
    """The layer's part of a step's metadata; ``RuntimeError`` where there is none.

    Passing through instead would be an answer without memory that nobody asked for.
    """
    if not isinstance(metadata, dict) or layer_name not in metadata:
        raise RuntimeError(
            f"pacellm: vLLM ran {layer_name} with attention metadata of type "
            f"{type(metadata).__name__} that does not say whose tokens these are, so its banks "
            "cannot be found; serve with vLLM 0.32 or 0.33, without --enable-dbo and --ubatch-size."
        )
    return metadata[layer_name]


register_custom_op(OP_NAME, _memory_op, mutates=["out"])
