"""What the pages link to outside of docs/ is named on the site, but no part of it."""

import re
from typing import Any


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Turns links that leave docs/ into their text."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"`\1`", markdown)
