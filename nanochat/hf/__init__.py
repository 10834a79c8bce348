"""Converts nanochat's models to and from Hugging Face's format. Used by scripts/export_hf and --from-hf.

`configuration_nanochat.py` and `modeling_nanochat.py` are copied beside exported weights, so they import nothing of ours.
"""
