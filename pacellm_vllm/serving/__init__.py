"""Serving with memory: the command that starts a server, and what one can ask it.

``command``  builds the ``vllm serve`` command that ``pacellm serve`` runs
``routes``   ``GET /plugins/pacellm/memory`` on vLLM's API server
``viewer``   a page to look at requests with, in ``viewer/``
``report``   the worker method behind it: what each layer's memory did
``asking``   every engine asked for it
``metrics``  the same for Prometheus
``tracing``  and in the spans of vLLM's tracing
``middleware`` which adds that to vLLM's ``/metrics``
"""

MEMORY_ROUTE = "/plugins/pacellm/memory"
