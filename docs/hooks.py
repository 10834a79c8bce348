"""What MkDocs does with every page beyond its plugins; named in mkdocs.yml.

Formulas become MathML while the site is built, so that they need no script and no font. Diagrams are drawn in the browser
by mermaid, which Material loads from a CDN; a copy in docs/javascripts/mermaid.min.js is used instead, for a site that
works without a network: npm pack mermaid, and take dist/mermaid.min.js out of it.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

MERMAID = "javascripts/mermaid.min.js"
# As pymdownx.arithmatex leaves them: \(...\) within a line, \[...\] on lines of their own.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Load mermaid from here if it is here."""
    if (Path(config.docs_dir) / MERMAID).is_file():
        config.extra_javascript.append(MERMAID)
    return config


def on_page_content(content: str, **kwargs: Any) -> str:
    """The page's HTML with its formulas as MathML."""
    return FORMULA.sub(_to_mathml, content)


def _to_mathml(formula: re.Match[str]) -> str:
    display = "block" if formula[2] == "[" else "inline"
    return convert(html.unescape(formula[3]).replace(r"\ln ", r"\ln\,"), display=display)  # or "ln p" becomes "lnp"
