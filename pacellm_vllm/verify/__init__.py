"""``pacellm verify MODEL``: whether this installation computes what it should, on one's own model.

``truth``   one layer's memory in float64, from its activations alone
``replay``  what an engine's memory gave, held to that
``engines`` the same requests under one schedule after another
``command`` the command, its table and what goes into a bug report
"""
