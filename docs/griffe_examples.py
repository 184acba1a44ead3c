"""Extension of griffe: our docstrings head one example with `Example:`, where griffe knows `Examples:`."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Let griffe read a section `Example:` as examples, which are shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
