"""Which tokens stayed alive: residents sampled while a text is generated, as a picture of numbers.

Arrays are named with their axes: ``Y`` logical positions, ``X`` samples over time.
"""

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
    """Samples of what a cache holds.

    Attributes
    ----------
    prompt
        Prompt tokens.
    steps
        Decode step of each sample.
    """

    prompt: int
    steps: list[int] = field(default_factory=list)
    _samples: list[Grid] = field(default_factory=list)

    def sample(self, cache: PagedCache, step: int) -> None:
        """Add what the first row of ``cache`` holds now, after ``step`` new tokens."""
        held = [head for layer in range(len(cache.layers)) for head in cache.resident_positions(layer)[0]]
        positions = np.concatenate([np.asarray(head, dtype=np.int64) for head in held])
        counts = np.bincount(positions, minlength=cache.get_seq_length())
        self.steps.append(step)
        self._samples.append(counts / len(held))

    def share_YX(self) -> Grid:
        """Return the share of page tables (layer and KV head) that hold each position at each sample.

        NaN stands where a token has not been written yet.
        """
        grid = np.full((max(map(len, self._samples), default=0), len(self._samples)), np.nan)
        for x, sample in enumerate(self._samples):
            grid[: len(sample), x] = sample
        return grid


def pooled(log: ResidentLog, *, rows: int, columns: int, positions: int, steps: int) -> Grid:
    """Return a log as ``rows`` x ``columns`` cells that span ``positions`` tokens and ``steps`` decode steps.

    A cell is the mean over its positions at the last sample in its span of time, NaN where nothing was written yet
    or the text had ended.
    """
    share_YX = log.share_YX()
    grid = np.full((rows, columns), np.nan)
    for column in range(columns):
        sample = int(np.searchsorted(log.steps, (column + 1) * steps / columns, side="right")) - 1
        if sample < 0 or column * steps / columns >= log.steps[-1]:
            continue
        values = share_YX[:, sample]
        values = values[~np.isnan(values)]
        row = np.arange(len(values)) * rows // positions
        counts = np.bincount(row, minlength=rows)
        sums = np.bincount(row, values, minlength=rows)
        grid[counts > 0, column] = sums[counts > 0] / counts[counts > 0]
    return grid
