"""Results of a device come to the host in order, whole, and without the device standing still in between."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from cytossl_monai.utils import device_results


def test_a_result_is_waited_for_after_the_next_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a device stands still in between. Its copy is queued before the next work, behind which it would wait."""
    events: list[str] = []

    class Coming(device_results._Coming):
        def __init__(self, result: Tensor) -> None:
            super().__init__(result)
            self.number = int(result[0])
            events.append(f"copy {self.number}")

        def wait(self) -> np.ndarray:
            events.append(f"wait {self.number}")
            return super().wait()

    def work() -> Iterator[Tensor]:
        for i in range(3):
            events.append(f"start {i}")
            yield torch.full((2,), float(i), dtype=torch.float16)

    monkeypatch.setattr(device_results, "_Coming", Coming)
    arrays = list(device_results.one_behind(work()))
    order = "start 0, copy 0, start 1, copy 1, wait 0, start 2, copy 2, wait 1, wait 2"
    assert ", ".join(events) == order
    assert [array.tolist() for array in arrays] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert arrays[0].dtype == np.float32
    assert list(device_results.one_behind([])) == []


def test_memory_that_is_used_again_does_not_change_what_came_before() -> None:
    place = torch.empty(3)

    def work() -> Iterator[Tensor]:
        for i in range(4):
            yield place.fill_(i)

    assert [array.tolist() for array in device_results.one_behind(work())] == [[float(i)] * 3 for i in range(4)]
