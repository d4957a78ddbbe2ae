"""A bounded set of open slides: a table of ten thousand never holds more than a few file handles."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any

from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.slide import Slide

__all__ = ["SlidePool"]


class SlidePool:
    """Least-recently-used pool of open slides. What falls out is closed.

    Safe in forked and spawned workers: a copy in another process starts empty and opens its own handles. Do not keep
    a slide beyond the next ``max_open`` calls of `get`: it may have been closed by then.

    Args:
        max_open: slides that are open at once, at least 1.
        backend: as for `open_slide`.
        device: as for `open_slide`.

    Raises:
        ValueError: when ``max_open`` is below 1.
    """

    def __init__(self, max_open: int = 16, backend: str = "auto", device: str = "cpu") -> None:
        if max_open < 1:
            raise ValueError(f"max_open must be at least 1, but is {max_open}")
        self.max_open = max_open
        self.backend = backend
        self.device = device
        self._slides: OrderedDict[tuple[str, float | None], Slide] = OrderedDict()
        self._pid = os.getpid()

    def get(self, path: str | os.PathLike[str], mpp: float | None = None) -> Slide:
        """The open slide of ``path``, opened now if need be.

        Args:
            path: the slide.
            mpp: micrometres per pixel of level 0, as for `open_slide`.

        Raises:
            SlideError: as `open_slide`.
        """
        if self._pid != os.getpid():
            # A forked copy: the slides reopen by themselves, but their number counts anew in this process.
            self._slides, self._pid = OrderedDict(), os.getpid()
        key = (str(Path(path)), mpp)
        slide = self._slides.pop(key, None)
        if slide is None or slide.closed:
            slide = open_slide(path, backend=self.backend, mpp=mpp, device=self.device)  # type: ignore[arg-type]
        self._slides[key] = slide
        while len(self._slides) > self.max_open:
            self._slides.popitem(last=False)[1].close()
        return slide

    def __len__(self) -> int:
        return len(self._slides) if self._pid == os.getpid() else 0

    def close(self) -> None:
        """Close all slides. The pool can be used again."""
        while self._slides:
            self._slides.popitem()[1].close()

    def __enter__(self) -> SlidePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slides": OrderedDict(), "_pid": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pid = os.getpid()
