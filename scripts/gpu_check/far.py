"""A cache far in a text, the step that goes on from there, and how long it takes."""

import time
import traceback
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from longthink.accelerators import fused_steps
from longthink.cache.forward import fast_forward
from longthink.config import Budget
from longthink.hf import DecodeStep, PagedCache
from longthink.policies import make_policy

from .models import build, device, prompts, seconds, weight_bytes
from .sheet import Sheet, note, seconds_since
from .timing import BLOCK, all_layers_ms, head_ms, kernel_times, peak_bytes, start_of_peak, time_steps

WARM_PAGES = 4
"""Pages decoded before anything is timed: both programs are then compiled, warm and recorded as graphs."""


class Route:
    """A cache far in a text, and the step that goes on from there."""

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
        go_far(self.model, self.cache, ids_BN[:1], asked["context"])
        sheet.put(fast_forward_s=seconds_since(started))
        self.step = DecodeStep(self.model, self.cache, compile=compile)

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        """Decode so many tokens, each the most likely after the one before."""
        for _ in range(steps):
            self.token_B1 = self.step(self.token_B1).argmax(-1, keepdim=True)


@torch.no_grad()
def first_tokens(model: Any, cache: PagedCache, ids_BN: Tensor) -> Tensor:
    """Read the prompts, and return the most likely next tokens, B x 1."""
    out = model(input_ids=ids_BN, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1, keepdim=True)


@torch.no_grad()
def go_far(model: Any, cache: PagedCache, ids_1N: Tensor, context: int) -> None:
    """Bring every row and layer to `context` tokens: one layer of one row goes there, and the others become like it.

    Time and memory of a step hardly hang on what the slots hold, and one layer takes a fraction of the time of all.
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


def measure(sheet: Sheet) -> None:
    """Time the step, and write down what it reads and what it holds."""
    asked = sheet.settings
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
        except Exception as error:  # A profiler that does not work here takes nothing from the times.
            note(f"no profile: {error!r}")


def warm_route(sheet: Sheet) -> Route:
    """Return a route that has compiled; where that fails, an eager one: its times say less, but more than none."""
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
    """Count from now on how often CUDA graphs are replayed."""
    if not torch.cuda.is_available():
        return
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        sheet.found["graph_replays"] = sheet.found.get("graph_replays", 0) + 1
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted  # type: ignore[method-assign]


def graphs(sheet: Sheet, before: int, blocks: int) -> dict[str, Any]:
    """How many CUDA graphs a step replays, and how often the compiler would not record one."""
    steps = BLOCK * (blocks + 2)
    return {
        "replays_per_step": round((sheet.found.get("graph_replays", 0) - before) / steps, 3),
        "graphs_refused": counters["inductor"]["cudagraph_skips"],
    }
