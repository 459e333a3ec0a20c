"""Linear layers of a compiled decode step on a CPU, for the few rows that a step has.

With one row, a linear layer spends all its time reading its weight. Written as a sum of products, it compiles into
one loop that reads each weight once, at memory speed; the matrix libraries that PyTorch calls stay far below that
(`benchmarks/2026-11-21-step.md` has the figures).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from torch.fx import GraphModule, Node
from torch.nn.functional import linear

from longthink.kernels.compiled import FEW_ROWS


def few_rows_backend(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Backend for ``torch.compile``: inductor, with linear layers for few rows."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is linear:
            _replace(node)
    module.graph.lint()
    module.recompile()
    compiled: Callable[..., Any] = lookup_backend("inductor")(module, inputs)
    return compiled


def _replace(node: Node) -> None:
    """Replace a linear layer by sums of products if it has few rows."""
    operands: dict[str, Any] = {
        **dict(zip(("input", "weight", "bias"), node.args, strict=False)),
        **node.kwargs,
    }
    value, weight, bias = (operands.get(name) for name in ("input", "weight", "bias"))
    assert isinstance(value, Node)
    *lead, width = value.meta["example_value"].shape
    rows = math.prod(lead)
    if not isinstance(rows, int) or rows > FEW_ROWS:
        return
    call = node.graph.call_function
    with node.graph.inserting_before(node):
        flat = call(torch.reshape, (value, (rows, width)))
        # One sum per row, not one for all: the compiler fuses them into a single loop over the weight.
        products = [call(torch.mul, (weight, call(torch.select, (flat, 0, row)))) for row in range(rows)]
        out = call(torch.stack, ([call(torch.sum, (product, -1)) for product in products],))
        if bias is not None:
            out = call(torch.add, (out, bias))
        node.replace_all_uses_with(call(torch.reshape, (out, (*lead, -1))))
    node.graph.erase_node(node)
