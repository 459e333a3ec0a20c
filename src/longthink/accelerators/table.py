"""The policies that have fused decode steps."""

from longthink.accelerators import layers
from longthink.policies import H2O, Milestone, Policy, Quest, RaaS, Recency

FUSED: dict[type[Policy], type[layers.FusedLayer]] = {
    H2O: layers.FusedH2O,
    Milestone: layers.FusedMilestone,
    Quest: layers.FusedQuest,
    RaaS: layers.FusedRaaS,
    Recency: layers.FusedRecency,
}
"""By exact class: a subclass may override any hook, so the kernels of its parent do not serve it."""
