"""Times of decode steps at a long context, by one of two routes: the general step, or the fused kernels."""

import time
import traceback
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from longthink.accelerators import fused_steps
from longthink.cache.forward import fast_forward
from longthink.config import Budget
from longthink.hf import DecodeStep, PagedCache, step
from longthink.policies import make_policy

from .models import build, device, prompts, seconds, weight_bytes
from .parts import ONCE
from .sheet import Sheet, note, seconds_since
from .timing import BLOCK, all_layers_ms, head_ms, kernel_times, peak_bytes, start_of_peak, time_steps

WARM_PAGES = 4
"""Pages decoded before timing: by then both programs are compiled, warm and captured as CUDA graphs."""


class Route:
    """A cache at a long context, and its decode step."""

    def __init__(self, sheet: Sheet, *, compile: bool) -> None:
        asked = sheet.settings
        self.model = build(asked["shape"], asked["layers"])
        sheet.put(weight_bytes=weight_bytes(self.model))
        fused = fused_steps(device()) if asked["route"] == "fused" else {}
        self.cache = PagedCache(
            self.model, make_policy(asked["policy"]), Budget(budget=asked["budget"]), fused=fused
        )
        ids_BN = prompts(self.model, asked["rows"], asked["prompt"])
        started = time.perf_counter()
        self.token_B1 = first_tokens(self.model, self.cache, ids_BN)
        sheet.put(prefill_s=seconds_since(started))
        started = time.perf_counter()
        fill_to(self.model, self.cache, ids_BN[:1], asked["context"])
        sheet.put(fast_forward_s=seconds_since(started))
        self.step = DecodeStep(self.model, self.cache, compile=compile)

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        """Decode greedily."""
        for _ in range(steps):
            self.token_B1 = self.step(self.token_B1).argmax(-1, keepdim=True)


@torch.no_grad()
def first_tokens(model: Any, cache: PagedCache, ids_BN: Tensor) -> Tensor:
    """Prefill the prompts; return the most likely next tokens, B x 1."""
    out = model(input_ids=ids_BN, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1, keepdim=True)


@torch.no_grad()
def fill_to(model: Any, cache: PagedCache, ids_1N: Tensor, context: int) -> None:
    """Fill every row and layer to `context` tokens by decoding one row of one layer, and copying its slots.

    Time and memory of a step hardly depend on the contents of the slots, and one layer takes a fraction of the time.
    """
    alone, tokens = cache.fresh(), context - ids_1N.shape[1]
    first_tokens(model, alone, ids_1N)
    far = alone.layers[0].slots
    seed = torch.Generator(ids_1N.device).manual_seed(0)
    fast_forward(far, tokens, heads=model.config.num_attention_heads, generator=seed)
    for layer in cache.layers:
        for row in range(cache.rows):
            layer.slots.adopt(row, far)
        layer.columns += tokens
    alone.close()


def measure_route(sheet: Sheet) -> None:
    """Time the step, and record the bytes that it reads and holds."""
    asked = sheet.settings
    if asked["route"] == "fused" and not torch.cuda.is_available():
        sheet.put(skipped="no GPU: fused kernels run on GPUs only")
        return
    if asked["route"] == ONCE:
        step._StaticLayer = step._SharedLayer  # type: ignore[misc]
    count_replays(sheet)
    route = warm_route(sheet)
    fused = [layer.slots.is_fused for layer in route.cache.layers]
    if any(fused) != (asked["route"] == "fused"):
        raise RuntimeError(f"asked for the {asked['route']} route, and {sum(fused)} layers are fused")
    sheet.put(peak_bytes_before=peak_bytes())
    start_of_peak()
    keys = ("shape", "layers", "layers_of", "policy", "budget", "rows", "route")
    with sheet.quiet():
        outside = head_ms(route.model, route.token_B1)
        replayed = sheet.found.get("graph_replays", 0)
        row = {key: asked[key] for key in keys} | time_steps(route.decode, asked["blocks"])
    row |= {"outside_ms": outside, "ms_all_layers": all_layers_ms(row["ms"], outside, asked)}
    held = {"kv_bytes": route.cache.kv_bytes, "metadata_bytes": route.cache.metadata_bytes}
    row |= held | {"read_bytes": sheet.found["weight_bytes"] + sum(held.values())}
    row["gb_per_s"] = round(row["read_bytes"] / row["ms"] / 1e6, 1)
    sheet.add(row | graphs(sheet, replayed, asked["blocks"]) | {"peak_bytes": peak_bytes()})
    if asked["profile"]:
        try:
            with sheet.quiet():
                kernels = kernel_times(route.decode)
            sheet.put(kernels=kernels)
        except Exception as error:  # The times are valid without a profile.
            note(f"no profile: {error!r}")


def warm_route(sheet: Sheet) -> Route:
    """Return a compiled route, or an eager one if compilation fails: its times are better than none."""
    asked = sheet.settings
    route = Route(sheet, compile=asked["compile"])
    started = time.perf_counter()
    try:
        first = seconds(lambda: route.decode(1))
        route.decode(WARM_PAGES * BLOCK)
    except Exception as error:
        if not asked["compile"]:
            raise
        traceback.print_exc()
        sheet.put(compile_error=f"{type(error).__name__}: {str(error).strip()[:300]}")
        route = Route(sheet, compile=False)
        started = time.perf_counter()
        first = seconds(lambda: route.decode(1))
        route.decode(WARM_PAGES * BLOCK)
    sheet.put(first_step_s=round(first, 2), warm_up_s=seconds_since(started), compiled=route.step.compiled)
    return route


def count_replays(sheet: Sheet) -> None:
    """Count the replays of CUDA graphs from now on."""
    if not torch.cuda.is_available():
        return
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        sheet.found["graph_replays"] = sheet.found.get("graph_replays", 0) + 1
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted  # type: ignore[method-assign]


def graphs(sheet: Sheet, before: int, blocks: int) -> dict[str, Any]:
    """CUDA graphs replayed per step, and how often the compiler refused to capture one."""
    steps = BLOCK * (blocks + 2)
    return {
        "replays_per_step": round((sheet.found.get("graph_replays", 0) - before) / steps, 3),
        "graphs_refused": counters["inductor"]["cudagraph_skips"],
    }
