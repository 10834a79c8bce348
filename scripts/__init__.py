"""The commands: python -m scripts.NAME, or nanochat NAME."""

import gc
import sys
from types import TracebackType

# Imports create many objects and no garbage; collecting after every 700, Python's default, takes a tenth of the start-up.
gc.set_threshold(10_000)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C during the imports, before run_command could see it, needs no trace."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report
