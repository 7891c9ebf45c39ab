"""What MkDocs calls while it builds the site."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):<code>~?(?:[\w.]+\.)?(\w+)</code>")
TYPE = re.compile(r"(?<=<code>)\(((?:[^()\n]|\([^()\n]*\))*)\)(?=</code>)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
BAR = re.compile(r"<mo>(&#x02016;|&#x0007C;)</mo>")  # of norms and absolute values


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Examples that tests do not run, or only where a library is installed, are Python all the same."""
    return re.sub(r"^```python [\w-]+$", "```python", markdown, flags=re.MULTILINE)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Convert formulas to MathML, which browsers draw without a script, and tidy up what docstrings became."""
    if page.file.src_uri == "api.md":
        html = ROLE.sub(r"<code>\1</code>", html)  # docstrings name other objects by Sphinx roles
        html = TYPE.sub(_as_written, html).replace(" - like</code>", "-like</code>")
    return FORMULA.sub(_mathml, html)


def _as_written(match: re.Match[str]) -> str:
    """A type such as "ndarray, shape (n, 2)", which was read as the Python expression "(ndarray, shape(n, 2))"."""
    return match[1].replace("shape(", "shape (")


def _mathml(formula: re.Match[str]) -> str:
    tag, tex = formula.groups()
    drawn = convert(unescape(tex), display="block" if tag == "div" else "inline")
    if "\\" in drawn:
        raise ValueError(f"latex2mathml left a command of this formula as it is: {tex}")
    drawn = BAR.sub(r'<mo stretchy="false">\1</mo>', drawn)  # otherwise the two of a pair may differ in height
    return f'<{tag} class="formula">{drawn}</{tag}>'
