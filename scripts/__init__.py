"""The commands: python -m scripts.NAME, or nanochat NAME."""

import gc

# Imports make very many objects and no garbage: to look for some after each 700, as Python does, is a tenth of a start.
gc.set_threshold(10_000)
