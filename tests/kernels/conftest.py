"""Triton's interpreter, several times as fast, with NaN in memory that nothing has written and maxima as on a GPU."""

import gc
import os

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Patch the language once for each launch and module, as the interpreter does it for each call of a helper."""
    if not os.environ.get("TRITON_INTERPRET"):
        yield
        return
    from triton.runtime import interpreter

    from longthink.accelerators import attention
    from longthink.kernels import triton_decode

    function, patched = interpreter.InterpretedFunction, set()
    run = function.run

    def fresh_run(self, *args, **kwargs):
        patched.clear()
        return run(self, *args, **kwargs)

    # Python maps and unmaps memory at each call that crosses a chunk of its stack: this frame asks for a large chunk.
    fresh_run.__code__ = fresh_run.__code__.replace(co_stacksize=1 << 15)
    # What was imported is never collected.
    gc.freeze()

    def quick_call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    def broken_floats(like, shape):
        return torch.full(shape, float("nan"), dtype=torch.float32, device=like.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "run", fresh_run)
        patch.setattr(function, "__call__", quick_call)
        # The interpreter propagates NaN whether it is asked to or not; a GPU takes the number.
        for name, number in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
            patch.setattr(
                interpreter.InterpreterBuilder,
                name,
                lambda self, lhs, rhs, number=number: self.binary_op(lhs, rhs, number),
            )
        for module in (triton_decode, attention):
            # What no program wrote is nothing that may be read.
            patch.setattr(module, "floats", broken_floats)
        yield
