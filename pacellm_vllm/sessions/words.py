"""Words: what text is looked up and compared by."""

import re

# Where words are not set apart, characters are words.
_CHARACTERS = r"\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")
