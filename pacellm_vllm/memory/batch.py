"""BatchSettings: which settings the requests of a worker's batch carry.

vLLM shows a worker the sampling parameters of a request in one place that plugins may stand in:
custom logits processors, which both model runners tell of every request that enters the batch or
changes its row. This one leaves logits alone.
"""

from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from pacellm_vllm.compat import load_with_drafts
from pacellm_vllm.config import PaceConfigError
from pacellm_vllm.memory.journal import Journal
from pacellm_vllm.request import RequestSettings, journal_key

# By the engine configuration they were made for, of which one process may hold several.
_BATCHES: WeakValueDictionary[int, "BatchSettings"] = WeakValueDictionary()


class Carried(NamedTuple):
    """What a request has set, None if nothing, and its ``Journal`` key, if it has one."""

    settings: RequestSettings | None
    key: str | None

    @classmethod
    def of(cls, params: SamplingParams, *_: Any) -> "Carried | None":
        """None where a request carries neither."""
        if not params.extra_args:
            return None
        settings, key = RequestSettings.of(params.extra_args), journal_key(params)
        if settings.differs():
            return cls(settings, key)
        return cls(None, key) if key else None


class BatchSettings(LogitsProcessorV1, LogitsProcessorV2):
    """What requests carry by row: of the batch in model runner V1, of the request table in V2.

    ``no_reports`` says why no request of this engine can have a report; empty if it can.
    """

    no_reports: ClassVar[str] = ""

    def __init__(self, vllm_config: VllmConfig, *runner: Any) -> None:
        self._config = vllm_config.compilation_config
        self._rows: dict[int, Carried] = {}
        self.journal = Journal()
        _BATCHES[id(self._config)] = self

    @classmethod
    def of_engine(cls, vllm_config: VllmConfig) -> "BatchSettings":
        """The one made for this engine; ``RuntimeError`` when vLLM made none."""
        found = _BATCHES.get(id(vllm_config.compilation_config))
        if found is None:
            raise RuntimeError(
                "pacellm: this worker's model runner loads no logits processors, which requests' "
                "own settings arrive through; serve with vLLM's model runner V1 or V2."
            )
        return found

    def get(self, row: int) -> RequestSettings | None:
        """The settings of the request in ``row``; None if it has set nothing."""
        return carried.settings if (carried := self._rows.get(row)) else None

    def asked(self, row: int) -> str | None:
        """The ``Journal`` key of the request in ``row``, if it has one."""
        return carried.key if (carried := self._rows.get(row)) else None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        cls.check(RequestSettings.of(sampling_params.extra_args), sampling_params.n)

    @classmethod
    def check(cls, settings: RequestSettings, n: int) -> None:
        """``PaceConfigError`` where a request for ``n`` answers asks for what cannot be told."""
        if not settings.report:
            return
        if cls.no_reports:
            raise PaceConfigError(f"pacellm: {cls.no_reports}; drop pacellm_report.")
        if n > 1:
            raise PaceConfigError(
                f"pacellm: a report is about one answer, not n = {n}; drop pacellm_report or n."
            )

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Model runner V1, before each forward."""
        process_dict_updates(self._rows, batch_update, Carried.of)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Model runner V2, when a request takes row ``req_idx``."""
        self._rows.pop(req_idx, None)
        if carried := Carried.of(sampling_params):
            self._rows[req_idx] = carried
        return False

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        return logits


class WithDrafts(BatchSettings):
    """For an engine with speculative decoding."""

    no_reports = "a report cannot tell drafts from what was kept of them"


class WithKernels(BatchSettings):
    """For an engine whose memory runs as kernels, where the host does not see what they decide."""

    no_reports = "kernels do not say what they decide for each token, so there are no reports here"


class NoSettings(BatchSettings):
    """For an engine that has experts and no memory: refuses what would silently do nothing."""

    @classmethod
    def check(cls, settings: RequestSettings, n: int) -> None:
        if settings.of_memory():
            raise PaceConfigError(
                "pacellm: this engine carries no memory that a request could set; serve it with "
                "layers, or drop the setting."
            )


# At import: a worker builds its logits processors before it loads the model, and what has reached
# it by then is the engine's configuration, which holds one of these classes.
load_with_drafts({BatchSettings, WithDrafts, WithKernels, NoSettings})
