"""The registered architectures: any vLLM decoder, with memory in chosen layers.

``table``   which ``Pace*`` architecture stands on which vLLM class, and why others have none
``compared`` those whose memory was held to an independent computation
``pacify``  the subclass itself: gives memory, experts or both to chosen FFNs
``layers``  the decoder layers of a model
``ffn``     what a dense FFN is made of, and memory inside its activation
``whole``   the FFN of a layer as a whole, dense or routed, and memory of its outputs
``site``    which of the two an engine takes
``experts`` weights in expert order while they load
``routed``  FFNs of which each token computes some experts
``settings`` where the configuration is read from, and what is told of it
``checks``  what is refused before an engine starts

``Pace*ForCausalLM`` are attributes of this package, made on first use so that importing it
imports no model.
"""

from typing import Any

from pacellm_vllm.models.table import ARCHITECTURES


def __getattr__(name: str) -> Any:
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pacellm_vllm.models.pacify import pacify

    cls = pacify(ARCHITECTURES[name].load(), name)
    globals()[name] = cls
    return cls
