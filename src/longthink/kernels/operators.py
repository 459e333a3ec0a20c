"""Functions that torch's compiler calls and does not look into."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def like_queries(query: Tensor, *others: Any) -> Tensor:
    """Return a new tensor of the shape and dtype of the first argument."""
    del others
    return query.new_empty(query.shape)


def operator(
    name: str, *, mutates: Sequence[str] = (), fake: Callable[..., Any] = like_queries
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function an operator ``longthink::name`` in compiled code; elsewhere it stays a plain call.

    For attention that launches Triton kernels. If the compiler traced the launches, it would have to find out which
    tensors the kernels write to: it errs on the safe side, and would copy keys and values in every step. It would
    also pass Python's floats in float64, which the kernels do not take.

    Parameters
    ----------
    name
        Name of the operator, without the namespace.
    mutates
        Names of the parameters to whose tensors the function writes; the compiler fails if all of them are None in
        a call. What the function returns must be new tensors.
    fake
        Returns, for the same arguments, tensors of the shapes and dtypes that the function returns.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.library.custom_op(f"longthink::{name}", function, mutates_args=mutates)
        compiled.register_fake(fake)

        @wraps(function)
        def call(*args: Any) -> Any:
            return compiled(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return register
