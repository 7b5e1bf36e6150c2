"""One progress bar: tqdm's where it is installed and a person watches, nothing otherwise."""

from __future__ import annotations

import sys


class Progress:
    """A context with `advance(n)` and `note(**values)`.

    total: None where it is not known
    shown: False silences it; it is silent by itself outside terminals and notebooks
    """

    def __init__(self, description: str, total: int | None, *, shown: bool = True):
        self._bar = None
        if shown and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=description, leave=False, dynamic_ncols=True)

    def advance(self, n: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(n)

    def note(self, **values) -> None:
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()
