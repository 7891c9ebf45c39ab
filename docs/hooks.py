"""What MkDocs calls while it builds the site."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):<code>~?(?:[\w.]+\.)?(\w+)</code>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Examples that tests do not run, or only where a library is installed, are Python all the same."""
    return re.sub(r"^```python [\w-]+$", "```python", markdown, flags=re.MULTILINE)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other objects by Sphinx roles; the site shows the name alone."""
    return _ROLE.sub(r"<code>\1</code>", html)
