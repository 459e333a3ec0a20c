"""The operators write to what they say, and return what their fakes promise. Run by `test_in_interpreter`."""

import pytest
import torch
from torch.library import opcheck

from longthink.accelerators import attention
from longthink.policies import make_policy
from tests.kernels.cases import Shape, make_store, new_token

CHECKS = ("test_schema", "test_faketensor")
SHAPE = Shape(groups=2, rows=2, pages=5, dtype=torch.float16, seed=5)
SIDES = {
    "fifo": lambda state: attention.NOTHING,
    "raas": lambda state: attention.BOUND,
    "raas:used=alpha": lambda state: attention.BOUND_SHARE,
    "raas:score=exact": lambda state: attention.MASS,
    "milestone": lambda state: attention.marks(state["marked"], 0.05, 5),
    "h2o": lambda state: attention.sums(state["mass"]),
}


def held(spec):
    store, (query, *new) = make_store(make_policy(spec), SHAPE), new_token(SHAPE)
    return store, [query.unflatten(1, (SHAPE.heads, -1)), *new, *attention.slots_of(store)]


@pytest.mark.parametrize("spec", SIDES)
def test_of_a_step(spec):
    store, arguments = held(spec)
    score = torch.empty(SHAPE.rows, SHAPE.heads, SHAPE.pages) if spec.startswith("raas") else None
    side = SIDES[spec](store.table.state)
    opcheck(torch.ops.longthink.step_attention.default, (*arguments, 0.2, *side, score), test_utils=CHECKS)


def test_of_a_selection():
    store, arguments = held("quest")
    opcheck(
        torch.ops.longthink.select_attention.default, (*arguments, store.table.cap_B, 0.2), test_utils=CHECKS
    )


@pytest.mark.parametrize("with_weights", [False, True])
def test_of_reading(with_weights):
    store, (query, *_) = held("fifo")
    slots = store.keys_BKSD, store.values_BKSD, store.table.resident_BKS
    opcheck(
        torch.ops.longthink.decode_attention.default, (query, *slots, 0.2, with_weights), test_utils=CHECKS
    )
