"""Cortical experts (PaceLLM, Sec. 3.2.2): FFN neurons in equal clusters, each contiguous.

``cluster``     balanced clustering of neurons, a pure function of their features
``layout``      which tensors of a checkpoint make an FFN, and where its neurons lie in them
``checkpoint``  rewrites a safetensors checkpoint in the clustered order, shard by shard
``command``     ``pacellm cluster``

A clustered checkpoint computes what the original computes: only the order of the sum over
neurons changes.
"""
