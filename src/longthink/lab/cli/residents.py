"""Which tokens a cache held over time, as a grid of shares: ``Y`` logical positions, ``X`` samples over time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from longthink.hf import PagedCache

Grid = NDArray[np.float64]


@dataclass
class ResidentLog:
    """Samples of what a cache holds: ``steps`` are their decode steps, ``prompt`` is the prompt's length."""

    prompt: int
    steps: list[int] = field(default_factory=list)
    _samples: list[Grid] = field(default_factory=list)

    def sample(self, cache: PagedCache, step: int) -> None:
        """Add what the first row of ``cache`` holds after ``step`` new tokens."""
        held = [head for layer in range(len(cache.layers)) for head in cache.resident_positions(layer)[0]]
        positions = np.concatenate([np.asarray(head, dtype=np.int64) for head in held])
        self.steps.append(step)
        self._samples.append(np.bincount(positions, minlength=cache.get_seq_length()) / len(held))

    def share_YX(self) -> Grid:
        """Return the share of page tables (layer and KV head) that hold a position; NaN before it is written."""
        grid = np.full((max(map(len, self._samples), default=0), len(self._samples)), np.nan)
        for x, sample in enumerate(self._samples):
            grid[: len(sample), x] = sample
        return grid


def pooled(log: ResidentLog, *, rows: int, columns: int, positions: int, steps: int) -> Grid:
    """Return a log as ``rows`` x ``columns`` cells that span ``positions`` tokens and ``steps`` decode steps.

    A cell is the mean over its positions at its last sample, NaN before they are written and after the text's end.
    """
    share_YX = log.share_YX()
    start_X = np.arange(columns) * steps / columns
    sample_X = np.searchsorted(log.steps, start_X + steps / columns, side="right") - 1
    shown_X = (sample_X >= 0) & (start_X < log.steps[-1])
    picked_YX = np.full((positions, columns), np.nan)
    picked_YX[: len(share_YX), shown_X] = share_YX[:, sample_X[shown_X]]
    member_RY = (np.arange(positions) * rows // positions == np.arange(rows)[:, None]).astype(float)
    with np.errstate(invalid="ignore"):
        return (member_RY @ np.nan_to_num(picked_YX)) / (member_RY @ ~np.isnan(picked_YX))
