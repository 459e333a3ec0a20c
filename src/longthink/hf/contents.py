"""What a `PagedCache` holds: bytes, tokens and positions, summed over its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longthink.cache.window import Window
from longthink.config import Budget, KvBits
from longthink.errors import BudgetError
from longthink.hf.layer_kinds import states_of
from longthink.hf.windows import WindowLayer
from longthink.policies import Policy, grows, policy_spec, policy_to_dict

if TYPE_CHECKING:
    from longthink.hf.layer import PagedLayer


class CacheContents:
    """Read-only figures of a `PagedCache`."""

    paged: list[PagedLayer]
    natives: dict[int, Any]
    layers: list[Any]
    policy: Policy
    budget: Budget | None
    kv_dtype: str | None
    kv_bits: KvBits | None

    @property
    def settings(self) -> tuple[Policy, Budget | None, str | None, KvBits | None]:
        """What two caches must have in common to hold the same rows."""
        return self.policy, self.budget, self.kv_dtype, self.kv_bits

    @property
    def windows(self) -> dict[int, Window]:
        """Windows of the layers that have one, by layer."""
        return {i: layer.window for i, layer in self.natives.items() if isinstance(layer, WindowLayer)}

    @property
    def columns(self) -> int:
        """Columns of text seen, including padding."""
        return self.paged[0].columns

    @property
    def rows(self) -> int:
        """Number of rows, 0 before the prompt."""
        return len(self.paged[0].slots.length_B)

    @property
    def bound_tokens(self) -> int | None:
        """Most tokens that a bounded layer may hold in a row, in whole pages; None if no layer is bounded.

        With a decode budget it grows by the prompt of each turn, and by nothing else.
        """
        bounds = [layer.slots.bound_tokens for layer in self.paged]
        return max((bound for bound in bounds if bound is not None), default=None)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, windows and recurrent states included, all layers."""
        return sum(self.kv_bytes_parts.values())

    @property
    def kv_bytes_parts(self) -> dict[str, int]:
        """`kv_bytes` by kind of layer: ``bounded`` by the budget, ``windowed`` and ``recurrent`` by nature."""
        return {
            "bounded": sum(layer.slots.kv_bytes for layer in self.paged),
            "windowed": sum(window.kv_bytes for window in self.windows.values()),
            "recurrent": sum(state.nbytes for layer in self.layers for state in states_of(layer).values()),
        }

    @property
    def _native_bytes(self) -> int:
        """Bytes that a dense cache would take as well."""
        parts = self.kv_bytes_parts
        return parts["windowed"] + parts["recurrent"]

    @property
    def metadata_bytes(self) -> int:
        """Bytes allocated for positions, representatives and stamps, all layers."""
        return sum(layer.slots.metadata_bytes for layer in self.paged)

    @property
    def dense_kv_bytes(self) -> int:
        """Bytes that a dense cache would take for all tokens seen, all layers."""
        return sum(layer.slots.dense_kv_bytes for layer in self.paged) + self._native_bytes

    @property
    def break_even_tokens(self) -> int | None:
        """Length of text (tokens of a row) from which this cache takes no more bytes than a dense one.

        The slots of a bounded layer are allocated in full with the prompt, so on shorter texts `kv_bytes` is above
        `dense_kv_bytes`. None before the prompt, and for policies that evict nothing.
        """
        bounded = [layer.slots for layer in self.paged if not grows(layer.slots.policy)]
        dense = sum(slots.dense_kv_bytes for slots in bounded)
        if not dense:
            return None
        # Bytes of all rows over the bytes of one token in each row, rounded up.
        tokens = int(bounded[0].length_B.sum())
        return -(-sum(slots.kv_bytes for slots in bounded) * tokens // (dense * self.rows))

    @property
    def num_evicted(self) -> int:
        """Tokens seen and evicted, summed over layers, rows and KV heads."""
        return sum(layer.slots.num_evicted for layer in self.paged)

    def row_dense_kv_bytes(self, row: int) -> int:
        """`dense_kv_bytes` of one row."""
        paged = sum(layer.slots.row_dense_kv_bytes(row) for layer in self.paged)
        return paged + self._native_bytes // self.rows

    def row_held_kv_bytes(self, row: int) -> int:
        """Bytes of keys and values of the tokens that a row holds."""
        paged = sum(layer.slots.row_held_kv_bytes(row) for layer in self.paged)
        return paged + self._native_bytes // self.rows

    def has_room(self, tokens: int) -> bool:
        """Whether a first prompt of so many tokens fits."""
        try:
            for layer in self.paged:
                layer.slots.rows.first_caps([tokens])
        except BudgetError:
            return False
        return True

    def row_evicted(self, row: int) -> int:
        """`num_evicted` of one row."""
        return sum(layer.slots.row_evicted(row) for layer in self.paged)

    def resident_positions(self, layer: int) -> list[list[list[int]]]:
        """Logical positions (not counting padding) that a layer holds: a sorted list per row and KV head.

        Raises
        ------
        ValueError
            If the layer has no pages.
        """
        for paged in self.paged:
            if paged.index == layer:
                return paged.slots.resident_positions()
        raise ValueError(f"layer={layer} has no pages: allowed is {[paged.index for paged in self.paged]}")

    def summary(self) -> dict[str, Any]:
        """Policy, budget and sizes, ready for JSON."""
        return {
            "policy": policy_to_dict(self.policy),
            "budget": None if self.budget is None else self.budget.budget,
            "decode_budget": None if self.budget is None else self.budget.decode_budget,
            "kv_dtype": self.kv_dtype,
            "kv_bits": KvBits.shortest(self.kv_bits),
            "columns": self.columns,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_parts": self.kv_bytes_parts,
            "metadata_bytes": self.metadata_bytes,
            "dense_kv_bytes": self.dense_kv_bytes,
            "num_evicted": self.num_evicted,
        }

    def __repr__(self) -> str:
        figures = self.summary() | {
            "policy": policy_spec(self.policy),
            "break_even_tokens": self.break_even_tokens,
        }
        return f"PagedCache({', '.join(f'{k}={v!r}' for k, v in figures.items() if v is not None)})"
