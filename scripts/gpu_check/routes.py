"""One policy at one budget, by one of two routes: the general one, or the fused kernels."""

import time
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
from .parts import LAYERS
from .sheet import Sheet, note, seconds_since
from .timing import BLOCK, head_ms, kernel_times, scaled, time_steps

WARM_PAGES = 4
"""Pages decoded before anything is timed: both programs are then compiled, warm and recorded as graphs."""


class Route:
    """A cache far in a text, and the step that goes on from there."""

    def __init__(self, sheet: Sheet) -> None:
        asked = sheet.settings
        self.replays = 0
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
        self.step = DecodeStep(self.model, self.cache, compile=asked["compile"])

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

    Time and memory of a step do not hang on what the slots hold, and one layer takes a fraction of the time of all.
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
    """Time the step, and write down what it reads and what it holds."""
    asked = sheet.settings
    if asked["route"] == "fused" and not torch.cuda.is_available():
        sheet.put(skipped="no GPU: the fused kernels run on one only")
        return
    count_replays(sheet)
    route = Route(sheet)
    started = time.perf_counter()
    first = seconds(lambda: route.decode(1))
    route.decode(WARM_PAGES * BLOCK)
    sheet.put(first_step_s=round(first, 2), warm_up_s=seconds_since(started), compiled=route.step.compiled)
    if torch.cuda.is_available():
        sheet.put(peak_bytes_before=torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
    outside = head_ms(sheet, route.model, route.token_B1)
    replayed = sheet.found.get("graph_replays", 0)
    row = {key: asked[key] for key in ("shape", "layers", "policy", "budget", "rows", "route")}
    row |= time_steps(sheet, route.decode, asked["blocks"])
    row |= {"outside_ms": outside, "ms_all_layers": all_layers_ms(row["ms"], outside, asked)}
    held = {"kv_bytes": route.cache.kv_bytes, "metadata_bytes": route.cache.metadata_bytes}
    row |= held | {"read_bytes": sheet.found["weight_bytes"] + sum(held.values())}
    row["gb_per_s"] = round(row["read_bytes"] / row["ms"] / 1e6, 1)
    row["is_fused"] = all(layer.slots.is_fused for layer in route.cache.layers)
    row |= graphs(sheet, replayed, asked["blocks"])
    if torch.cuda.is_available():
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    sheet.add(row)
    if asked["profile"]:
        try:
            sheet.put(kernels=kernel_times(route.decode))
        except Exception as error:  # A profiler that does not work here takes nothing from the times.
            note(f"no profile: {error!r}")


def all_layers_ms(ms: float, outside_ms: float, asked: dict[str, Any]) -> float:
    """Milliseconds with all layers, measured or scaled."""
    return ms if asked["layers"] == LAYERS else scaled(ms, outside_ms, asked["layers"], LAYERS)


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
