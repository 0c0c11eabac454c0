"""Cortical experts (PaceLLM, Sec. 3.2.2): FFN neurons in equal clusters, each contiguous.

``settings``    ExpertsConfig, what is said about experts in a configuration
``cluster``     balanced clustering of neurons, a pure function of their features
``cache``       orders of layers already clustered
``layout``      which tensors of a checkpoint make an FFN, and where its neurons lie in them
``files``       its JSON files, and where tensors lie in a checkpoint's shards
``checkpoint``  reads a safetensors checkpoint
``rewrite``     writes it in the clustered order, shard by shard
``orders``      what is stored beside a clustered checkpoint, and for which weights it is
``folders``     directories that appear whole or not at all
``loading``     brings weights into the order while they stream into an engine
``routing``     which experts a token computes
``ffn``         an FFN of which each token computes some experts
``report``      measures what experts do on a text; ``picture`` draws it
``command``     ``pacellm cluster``
``inspect``     ``pacellm inspect experts``

A clustered checkpoint computes what the original computes: only the order of the sum over
neurons changes.
"""
