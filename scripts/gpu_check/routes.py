"""One policy at one budget, by one of two routes: the general one, or the fused kernels."""

import torch

from .sheet import Sheet


def measure_route(sheet: Sheet) -> None:
    """Measure the route if it runs here; what that takes is imported only then."""
    if sheet.settings["route"] == "fused" and not torch.cuda.is_available():
        sheet.put(skipped="no GPU: the fused kernels run on one only")
        return
    from .far import measure

    measure(sheet)
