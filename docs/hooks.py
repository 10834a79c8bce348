"""What MkDocs does with every page beyond its plugins; named in mkdocs.yml.

Formulas become MathML while the site is built, so that they need no script and no font. Diagrams are drawn in the browser
by mermaid. Where npm can be had while the site is built, mermaid becomes a part of it, so that the site works without a
network; else Material loads it from a CDN.
"""

from __future__ import annotations

import html
import logging
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from nanochat.files import atomic_write

logger = logging.getLogger("mkdocs.hooks.nanochat")

MERMAID = "javascripts/mermaid.min.js"  # below docs/, not committed
MERMAID_VERSION = "11"  # what Material is made for
# As pymdownx.arithmatex leaves them: \(...\) within a line, \[...\] on lines of their own.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Load mermaid from the site itself if it is here or npm has it."""
    script = Path(config.docs_dir) / MERMAID
    if script.is_file() or fetch_mermaid(script):
        config.extra_javascript.append(MERMAID)
    return config


def fetch_mermaid(script: Path) -> bool:
    """Whether npm could be had, and had the script."""
    npm = shutil.which("npm")
    if npm is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"mermaid@{MERMAID_VERSION}", "--silent", "--fetch-retries=0"]
        try:
            subprocess.run(command, cwd=folder, timeout=60, check=True, capture_output=True)
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                source = archive.extractfile("package/dist/mermaid.min.js")
                assert source is not None  # KeyError tells of a missing one
                atomic_write(script, source.read())
        except (OSError, subprocess.SubprocessError, StopIteration, KeyError, tarfile.TarError) as error:
            logger.info("diagrams will need a network: npm has no mermaid for us (%s)", error)
            return False
    return True


def on_page_content(content: str, **kwargs: Any) -> str:
    """The page's HTML with its formulas as MathML."""
    return FORMULA.sub(_to_mathml, content)


def _to_mathml(formula: re.Match[str]) -> str:
    display = "block" if formula[2] == "[" else "inline"
    return convert(html.unescape(formula[3]).replace(r"\ln ", r"\ln\,"), display=display)  # or "ln p" becomes "lnp"
