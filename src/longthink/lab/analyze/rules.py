"""The numbers in the definitions of use, page classes and map classes; commands offer them as options."""

from dataclasses import dataclass

from longthink.config import check_int, check_range


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The numbers in the definitions of the classes.

    A page is *used* in a step when a head gives it more than `use` of its attention. It is *near* while the reading
    token is at most `local` tokens behind the page's last one.

    - lazy: never used.
    - sink: used in at least `sink` of all steps since its birth, and older than `gap` steps.
    - local: used, but only while it was near.
    - phoenix: used after more than `gap` steps without use (since its birth, if it was never used before).
    - milestone: the others: used beyond its neighbourhood, without a long rest. What is used up to the end of the
      text is a milestone too; whether it would have died nobody knows.

    Parameters
    ----------
    use
        Share of a head's attention above which it uses a page.
    local
        Tokens that count as near.
    gap
        Steps after which a use is a return.
    sink
        Share of the steps in which a sink is used.
    far
        Share of a map's reading that must go to milestones and phoenixes, or the map is sink-like.
    majority
        Share of that which decides between the two.
    """

    use: float = 0.5
    local: int = 32
    gap: int = 128
    sink: float = 0.5
    far: float = 0.1
    majority: float = 0.67

    def __post_init__(self) -> None:
        check_range("use", self.use, 0.0, 1.0)
        check_int("local", self.local, 0)
        check_int("gap", self.gap, 1)
        check_range("sink", self.sink, 0.0, 1.0)
        check_range("far", self.far, 0.0, 1.0)
        check_range("majority", self.majority, 0.0, 1.0)
