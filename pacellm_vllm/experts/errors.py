"""The one error of this folder."""

from pacellm_vllm.sentences import PaceError


class ExpertsError(PaceError):
    """Something that cannot be clustered, read or written: one sentence, with what to do."""
