"""nanochat's models in the form that Hugging Face's libraries read, and back. Used by scripts/export_hf and --from-hf.

`configuration_nanochat.py` and `modeling_nanochat.py` are copied beside exported weights, so they import nothing of ours.
"""
