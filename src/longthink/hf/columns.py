"""Which columns of a text are padding: kept for all turns, because the mask of a later turn speaks of them all.

Shape suffixes: B batch rows, Q new columns, N columns so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longthink.cache import LayerCache
from longthink.errors import UnsupportedFeatureError


class Columns:
    """The columns that the layers of a cache have read.

    In a batch, a row that has ended goes on with padding, which is read like text as it comes. The mask of the next
    turn hides it, and then the rows are rewound to where they ended.

    Parameters
    ----------
    layers
        The caches of all layers with pages.
    rewinds
        Whether rows can be rewound: not where a layer has read padding into a state.
    """

    def __init__(self, layers: list[LayerCache], *, rewinds: bool = True) -> None:
        self._layers = layers
        self._rewinds = rewinds
        self.reset()

    def reset(self) -> None:
        self.count = 0
        # Blocks that are real in all rows, most of them single tokens, are counted only.
        self._blocks: list[Tensor | int] = []
        self._lengths: list[int] | None = None
        self._comparable = True

    def begin(
        self, start: int, new_BQ: Tensor | None, columns: int, seen_BN: Tensor | None
    ) -> list[int] | None:
        """Take in new columns, once for all layers, if every layer has room for them.

        Parameters
        ----------
        start
            Columns that the layer has read before.
        new_BQ
            False for padding; None if there is none.
        seen_BN
            What the mask says of the columns before; None if it says nothing.

        Returns
        -------
        list of int or None
            Lengths to rewind the rows to; None for no change.

        Raises
        ------
        BudgetError
            If a layer has no room.
        UnsupportedFeatureError
            If the mask shows padding, or hides text before other text.
        """
        if start < self.count:
            return self._lengths
        lengths, real_BN = None, None
        if seen_BN is not None and self._comparable:
            real_BN = self._real(len(seen_BN), seen_BN.device)
            lengths = _ends(real_BN, seen_BN)
            if lengths is not None and not self._rewinds:
                raise UnsupportedFeatureError(
                    "attention_mask hides the end of a row that the model's recurrent layers have read, such as "
                    "padding after its end token, and a state cannot be taken back: continue such a text alone, in a "
                    "cache of its own"
                )
        if columns > 1 or self._layers[0].in_chunked_prefill:
            counts = None if new_BQ is None else new_BQ.sum(1).tolist()
            for layer in self._layers:
                layer.check_room(lengths, counts, columns)
        if lengths is not None and real_BN is not None and seen_BN is not None:
            self._blocks = [real_BN & seen_BN]
        self._add(new_BQ, columns)
        self._lengths = lengths
        return lengths

    def start_with(self, columns: int) -> None:
        """Take so many columns, all of them real, for what has been read."""
        self.reset()
        self._add(None, columns)

    def add_tokens(self, columns: int) -> None:
        """Count columns that are real in all rows."""
        self._add(None, columns)

    def select_rows(self, layer: LayerCache, rows: Tensor) -> None:
        """Reorder rows as a layer does: row i becomes the old row ``rows[i]``. Only the first layer counts."""
        if layer is not self._layers[0]:
            return
        self._blocks = [
            block if isinstance(block, int) else block.index_select(0, rows.to(block.device))
            for block in self._blocks
        ]

    def forget(self) -> None:
        """Stop comparing masks: rows of different texts have no columns in common."""
        self._comparable = False

    def contents(self) -> tuple[int, bool, Tensor | None]:
        """Number of columns, whether masks are compared, and the real columns (BN; None if there is no padding)."""
        masks = [block for block in self._blocks if not isinstance(block, int)]
        real_BN = self._real(len(masks[0]), masks[0].device) if masks and self._comparable else None
        return self.count, self._comparable, real_BN

    def restore(self, count: int, comparable: bool, real_BN: Tensor | None) -> None:
        """Set what `contents` has returned."""
        self.count, self._comparable, self._lengths = count, comparable, None
        self._blocks = [] if count == 0 else [count if real_BN is None else real_BN]

    def _add(self, new_BQ: Tensor | None, columns: int) -> None:
        self.count += columns
        if new_BQ is not None:
            self._blocks.append(new_BQ)
        elif self._blocks and isinstance(self._blocks[-1], int):
            self._blocks[-1] += columns
        else:
            self._blocks.append(columns)

    def _real(self, rows: int, device: torch.device) -> Tensor:
        blocks = [
            torch.ones(rows, block, dtype=torch.bool, device=device) if isinstance(block, int) else block
            for block in self._blocks
        ]
        return torch.cat(blocks, 1)


def _ends(real_BN: Tensor, seen_BN: Tensor) -> list[int] | None:
    """Lengths of the rows without the text that is now hidden, None if nothing is."""
    hidden_BN, kept_BN = real_BN & ~seen_BN, real_BN & seen_BN
    if bool((seen_BN & ~real_BN).any()):
        raise UnsupportedFeatureError(
            "attention_mask shows columns that were hidden as padding when they were read: they are not in the cache"
        )
    if not bool(hidden_BN.any()):
        return None
    if bool((kept_BN & (hidden_BN.cumsum(1) > 0)).any()):
        raise UnsupportedFeatureError(
            "attention_mask hides columns in the middle of a row's text: only the end of a row, such as its padding "
            "after the end token, can be hidden later"
        )
    lengths: list[int] = kept_BN.sum(1).tolist()
    return lengths
