"""The settings of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from longthink.config import check_flag, check_int, check_range
from longthink.reasoner.task import MAX_OPS, MIN_OPS


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run; the defaults made the shipped weights.

    Raises
    ------
    ValueError
        If a field is out of range; the message names field, value and range.
    """

    seed: int = 1
    """Seed of the initial weights and of every batch."""
    tokens: int = 16_000_000
    """Tokens to train on, padding included."""
    batch_tokens: int = 4096
    """Approximate number of tokens of a batch."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    warmup_steps: int = 100
    """Steps until the peak learning rate is reached."""
    decay_share: float = 0.3
    """Share of the tokens, at the end, over which the learning rate decays to zero."""
    first_ops: int = 4
    """Longest problem at the start of the curriculum, in lines."""
    last_ops: int = 78
    """Longest problem at the end of the curriculum, in lines."""
    promote_at: float = 0.98
    """Accuracy that every kind of token must reach before problems get longer."""
    longest_share: float = 0.5
    """Share of the batches with problems of the longest length; the others are of any length up to it."""
    recall_share: float = 0.3
    """Share of pure look-up batches while problems are short."""
    turns_share: float = 0.0
    """Share of the batches with conversations of two or three problems."""
    turns_ops: int = 40
    """Most lines of all problems of a conversation."""
    layers: int = 4
    """Transformer layers."""
    hidden: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key/value heads."""
    mlp: int = 384
    """Width of the feed-forward layers."""
    compile: bool = True
    """Compile the step with torch.compile: about twice as fast."""
    save_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0)
        check_int("tokens", self.tokens, 1)
        check_int("batch_tokens", self.batch_tokens, 64)
        check_range("learning_rate", self.learning_rate, 0, 1)
        check_range("weight_decay", self.weight_decay, 0, 1)
        check_int("warmup_steps", self.warmup_steps, 0)
        check_range("decay_share", self.decay_share, 0, 1)
        check_int("first_ops", self.first_ops, 2, MAX_OPS)
        check_int("last_ops", self.last_ops, self.first_ops, MAX_OPS)
        check_range("promote_at", self.promote_at, 0, 1)
        check_range("longest_share", self.longest_share, 0, 1)
        check_range("recall_share", self.recall_share, 0, 1)
        check_range("turns_share", self.turns_share, 0, 1)
        check_int("turns_ops", self.turns_ops, 3 * MIN_OPS, MAX_OPS)
        check_int("layers", self.layers, 2, 64)
        check_int("heads", self.heads, 1, 64)
        check_int("kv_heads", self.kv_heads, 1, self.heads)
        check_int("hidden", self.hidden, 1)
        check_int("mlp", self.mlp, 1)
        check_flag("compile", self.compile)
        check_int("save_every", self.save_every, 1)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads!r} must divide heads={self.heads!r}")
        if self.hidden % (16 * self.heads):
            raise ValueError(
                f"hidden={self.hidden!r} must be a multiple of 16 * heads = {16 * self.heads}: heads of 16, 32, ..."
            )

    def to_dict(self) -> dict[str, int | float | bool]:
        """Return the fields as plain data, for JSON."""
        return asdict(self)
