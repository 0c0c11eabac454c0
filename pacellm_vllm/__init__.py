"""PaceLLM for vLLM: a per-request activation memory for the FFN layers of decoder LLMs.

``cli``       ``pacellm serve | cluster | inspect | eval | verify``
``config``    PaceConfig, the one configuration object, and its presets; ``flags`` of it
``request``   what one request may set for itself
``sentences`` what is said about a setting that is not allowed
``plugin``    what vLLM's entry points call
``ops``       the memory's arithmetic on plain tensors; knows nothing of vLLM
``memory``    where a bank lives: page layout, KV cache spec and manager, the vLLM layer
``experts``   balanced clusters of FFN neurons, and checkpoints rewritten in their order
``models``    ``pacify`` and the registered ``Pace*ForCausalLM`` architectures
``sessions``  text of earlier requests, found by its words and read again before scheduling
``serving``   the server command, the page, HTTP routes and metrics
``evals``     needles, benchmarks, questions, sweeps, intervals and pictures
``verify``    an installation held to the plain truth
``platform``  a pure-PyTorch CPU platform for machines without a GPU
``compat``    everything that leans on vLLM internals
"""

__version__ = "0.1.0"

# Where our settings stand: in a checkpoint's config.json, in --additional-config, in a request.
CONFIG_KEY = "pacellm"
