"""Measuring what the memory changes: needles, benchmarks, sweeps, and what is in a bank.

Talks to engines as a user does, through the offline ``LLM`` or a server's HTTP API.
"""
