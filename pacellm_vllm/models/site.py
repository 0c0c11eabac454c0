"""Where in the chosen layers' FFNs the memory sits: at their activations or at their outputs."""

from collections.abc import Iterable
from typing import Literal

import torch
from vllm.distributed import get_pp_group

from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.models.ffn import FeedForward

Site = Literal["activation", "output"]


def choose_site(config: PaceConfig, ffns: Iterable[FeedForward | PaceConfigError]) -> Site:
    """The one site of all memory layers, hence one width of all banks.

    ``ffns`` are the chosen layers' dense FFNs, or why a layer has none that activations could be
    remembered of: "auto" then takes outputs, in all layers and pipeline stages. Raises that
    ``PaceConfigError`` where the site is "activation".
    """
    mistakes = [found for found in ffns if isinstance(found, PaceConfigError)]
    if config.site == "activation" and mistakes:
        raise mistakes[0]
    if config.site != "auto":
        return config.site
    return "output" if any(over_stages(bool(mistakes))) else "activation"


def over_stages(mine: object) -> list:
    """What every pipeline stage says, this one ``mine``."""
    group = get_pp_group()
    said: list = [mine] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(said, mine, group=group.cpu_group)
    return said
