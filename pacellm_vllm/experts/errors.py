"""The one error of this folder."""


class ExpertsError(ValueError):
    """Something that cannot be clustered, read or written: one sentence, with what to do."""
