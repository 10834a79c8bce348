"""Converts nanochat's models to and from Hugging Face's format. Used by scripts/export_hf and --from-hf.

`configuration_nanochat.py` and `modeling_nanochat.py` are copied beside exported weights, so they import nothing of ours.
"""

from importlib import resources

TEMPLATE_FILE = "chat_template.jinja"


def read_resource(folder: str, name: str) -> str:
    """A file of the package, as text."""
    return (resources.files("nanochat") / folder / name).read_text(encoding="utf-8")
