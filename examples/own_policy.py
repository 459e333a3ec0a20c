"""A policy of your own in one file: pages stay as long as some head has read them much, lately.

    python examples/own_policy.py

For a model of your own, load it as in one_line.py; the policy stays as it is. docs/write-your-own-policy.md
explains the contract, how to check a rule against a slow version of it, and how to ship it in a package of your
own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import longthink
from longthink.config import check_range
from longthink.kernels import page_mass
from longthink.policies import PageTable, Policy, PolicyInfo, Shape, Step, register
from longthink.reasoner import grade, load_reasoner, make_problem


@register("peak")
@dataclass(frozen=True, kw_only=True)
class Peak(Policy):
    """Keep the prompt and the pages with the highest peak of attention, which fades by `fade` in each step."""

    info = PolicyInfo(
        time="O(L)", memory="O(L)", keeps="prompt + pages that were once read much", source="own_policy.py"
    )
    needs = frozenset({"weights"})

    fade: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("fade", self.fade, 0.0, 1.0)

    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        return {"peak_BKP": torch.zeros(shape.B, shape.K, shape.P, device=device)}

    def worth(self, table: PageTable) -> Tensor:
        """The page with the least is evicted; the prompt is protected without our help."""
        return table.state["peak_BKP"]

    def observe(self, table: PageTable, step: Step) -> None:
        """After each step: a page's peak is what its tokens received from the head that read it most."""
        mass_BKP = page_mass(step.weights_BKGS, table.page_size).amax(2)
        peak_BKP = table.state["peak_BKP"]
        peak_BKP.copy_(torch.maximum(peak_BKP * (1 - self.fade), mass_BKP))


model, tokenizer = load_reasoner()
problem = make_problem(profile="chain", size="s", seed=1)
inputs = tokenizer(problem.prompt, return_tensors="pt").to(model.device)
for policy in ("peak:fade=0.02", Peak(fade=0.2), "recency"):  # its name with options, an object, a control
    tokens = longthink.generate(
        model, **inputs, policy=policy, decode_budget=96, max_new_tokens=300, do_sample=False
    )
    text = tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :])
    print(f"{policy}: right: {grade(problem, text)}")
