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
    remembered of: "auto" then takes outputs, in all layers and pipeline stages, and also where
    activations have several widths. Raises a ``PaceConfigError`` where the site is "activation".
    """
    if config.site == "output":
        return "output"
    found = [*ffns]
    mistakes = [each for each in found if isinstance(each, PaceConfigError)]
    widths = {each.width for each in found if isinstance(each, FeedForward)}
    stages = over_stages((bool(mistakes), widths))
    widths = {width for _, of_stage in stages for width in of_stage}
    if len(widths) > 1:
        mistakes.append(
            PaceConfigError(
                f"pacellm: the chosen layers have FFNs of widths {sorted(widths)}, and banks have "
                "one width; set site to output, or choose layers whose FFNs are alike."
            )
        )
    if config.site == "activation" and mistakes:
        raise mistakes[0]
    if mistakes or any(mistaken for mistaken, _ in stages):
        return "output"
    return "activation"


def over_stages(mine: object) -> list:
    """What every pipeline stage says, this one ``mine``."""
    group = get_pp_group()
    said: list = [mine] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(said, mine, group=group.cpu_group)
    return said
