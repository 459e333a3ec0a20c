"""The dense caches of transformers, as a baseline for the policies."""

import time

import torch

from longthink.lab.bench.systems import CompiledSystem, DynamicSystem, System

from .models import build, prompts, weight_bytes
from .sheet import Sheet, note, seconds_since
from .timing import BLOCK, all_layers_ms, head_ms, peak_bytes, start_of_peak, time_steps


def measure_dense(sheet: Sheet) -> None:
    """Time the dynamic cache with each attention at every length, then the compiled static cache."""
    asked = sheet.settings
    model = build(asked["shape"], asked["layers"])
    ids_BN = prompts(model, asked["rows"], asked["prompt"])
    with sheet.quiet():
        sheet.put(weight_bytes=weight_bytes(model), outside_ms=head_ms(model, ids_BN[:, :1]))
    for name, attention in (("sdpa", "sdpa"), ("flash", "flash_attention_2")):
        if name == "flash" and not has_flash():
            sheet.put(flash="skipped: the package flash_attn is not installed or does not work here")
            continue
        model.set_attn_implementation(attention)
        _measure(sheet, DynamicSystem(model, ids_BN), f"growing, {name}", asked["lengths"])
    model.set_attn_implementation("sdpa")
    if asked["compile"]:
        room = BLOCK * (asked["blocks"] + 6)
        for length in reversed(asked["lengths"]):
            system = CompiledSystem(model, ids_BN, room=room)
            _measure(sheet, system, "fixed size, compiled, sdpa", [length])


def has_flash() -> bool:
    """Whether the package flash_attn works. SDPA may use the flash attention built into torch anyway."""
    from transformers.utils import is_flash_attn_2_available

    return torch.cuda.is_available() and is_flash_attn_2_available()


def _measure(sheet: Sheet, system: System, name: str, lengths: list[int]) -> None:
    asked = sheet.settings
    try:
        for length in lengths:
            started = time.perf_counter()
            system.go_to(length - asked["prompt"] if length > asked["prompt"] else 0, fast=True)
            system.decode(2 * BLOCK)
            ready_s = seconds_since(started)
            row = {key: asked[key] for key in ("shape", "layers", "layers_of", "rows")}
            row |= {"cache": name, "tokens": length, "ready_s": ready_s}
            start_of_peak()
            with sheet.quiet():
                row |= time_steps(system.decode, asked["blocks"])
            row["ms_all_layers"] = all_layers_ms(row["ms"], sheet.found["outside_ms"], asked)
            row["kv_bytes"] = system.kv_bytes
            row["gb_per_s"] = round((sheet.found["weight_bytes"] + system.kv_bytes) / row["ms"] / 1e6, 1)
            sheet.add(row | {"peak_bytes": peak_bytes()})
    except Exception as error:
        # Running out of memory at one length, or a compiler error, must not affect the other caches.
        note(f"{name}: {error!r}")
        sheet.put(errors=[*sheet.found.get("errors", []), f"{name}: {str(error).strip()[:200]}"])
    finally:
        system.cache = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
