"""The commands: python -m scripts.NAME, or nanochat NAME."""

import gc

# Imports create many objects and no garbage; collecting after every 700, Python's default, takes a tenth of the start-up.
gc.set_threshold(10_000)
