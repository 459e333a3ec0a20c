"""The thresholds in the definitions of use, page classes and map classes."""

from dataclasses import dataclass

from longthink.config import check_int, check_range


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Thresholds of the classes.

    A page is *used* in a step if a head gives it more than `use` of its attention. It is *near* while the reading
    token is at most `local` tokens behind the page's last one.

    - lazy: never used.
    - sink: used in at least `sink` of all steps since its birth, and older than `gap` steps.
    - local: used only while it was near.
    - phoenix: used after more than `gap` steps without use (since its birth, if never used before).
    - milestone: the others: used beyond its neighbourhood, without a long rest. Pages that are used up to the end of
      the text count, although their later life is unknown.
    """

    use: float = 0.5  # share of a head's attention
    local: int = 32  # tokens
    gap: int = 128  # steps
    sink: float = 0.5  # share of steps
    far: float = 0.1  # a map with at most this share of uses of milestones and phoenixes is sink-like
    majority: float = 0.67  # share of those that makes it a map of one of the two

    def __post_init__(self) -> None:
        check_int("local", self.local, 0)
        check_int("gap", self.gap, 1)
        for name in ("use", "sink", "far", "majority"):
            check_range(name, getattr(self, name), 0.0, 1.0)
