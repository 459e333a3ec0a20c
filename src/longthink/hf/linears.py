"""Linear layers of a compiled step on a CPU: a step multiplies few rows, and libraries are made for many.

With one row, all the time of a linear layer goes into reading its weight. As a sum of products the compiler makes one
loop of it that reads each weight once, at the speed of the memory; the matrix libraries that PyTorch calls stay far
below that (`benchmarks/2026-11-21-step.md` has the figures).
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
    """Compile as inductor does, with linear layers made for few rows: a backend of ``torch.compile``."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is linear:
            _replace(node)
    module.graph.lint()
    module.recompile()
    compiled: Callable[..., Any] = lookup_backend("inductor")(module, inputs)
    return compiled


def _replace(node: Node) -> None:
    """Put in what is faster than a linear layer for so many rows, if anything is."""
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
        # A sum for each row, and not one for all: the compiler makes a single loop over the weight of them.
        products = [call(torch.mul, (weight, call(torch.select, (flat, 0, row)))) for row in range(rows)]
        out = call(torch.stack, ([call(torch.sum, (product, -1)) for product in products],))
        if bias is not None:
            out = call(torch.add, (out, bias))
        node.replace_all_uses_with(call(torch.reshape, (out, (*lead, -1))))
    node.graph.erase_node(node)
