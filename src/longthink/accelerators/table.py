"""The policies that have fused decode steps."""

from longthink.accelerators.layers import (
    FusedH2O,
    FusedLayer,
    FusedMilestone,
    FusedQuest,
    FusedRaaS,
    FusedRecency,
)
from longthink.policies import H2O, Milestone, Policy, Quest, RaaS, Recency

FUSED: dict[type[Policy], type[FusedLayer]] = {
    H2O: FusedH2O,
    Milestone: FusedMilestone,
    Quest: FusedQuest,
    RaaS: FusedRaaS,
    Recency: FusedRecency,
}
"""By exact class: a subclass may override any hook, so the kernels of its parent do not serve it."""
