"""The memory's arithmetic on plain tensors. Nothing here knows of vLLM.

``rules``   MemoryRules, the numbers of Enhance and Update
``lookup``  Enhance: similarities, the tokens' regimes, the blend
``update``  Update: what a running segment gathers, and the commit at its end
``steps``   Update and Enhance for one token of each of many banks, as in decoding
``sums``    sums over tokens whose bits do not depend on how the tokens are cut
``kernels`` all of it for a GPU, in Triton; imported where that is installed only
"""
