"""The parts of a check, most important first: if time runs out, the last ones are skipped."""

from dataclasses import dataclass, field, replace
from typing import Any

TESTS = "scripts.gpu_check.testing:run_tests"
DEVICE = "scripts.gpu_check.device:look_at_device"
ROUTE = "scripts.gpu_check.routes:measure_route"
DENSE = "scripts.gpu_check.dense:measure_dense"

CELLS = ((4096, 16), (1024, 16), (4096, 64), (1024, 1), (4096, 1), (1024, 64))
"""Budgets and rows, most informative first."""
ROUTES = ("general", "fused")
CASES = (*((policy, route) for policy in ("raas", "milestone") for route in ROUTES), ("recall", "general"))
"""Policies and routes: `recall` has no kernels of its own."""
ONCE = "once"
"""The general route with one program for all layers of a kind, as on a CPU, and not one for each layer."""
LAYERS = 28
"""Layers of both shapes."""
FEW_LAYERS = 7
"""Layers with which the larger shape is measured: compiling all of them for every cell takes too long."""
LENGTHS = (2048, 16384, 32768)
GROUPS = {"kernels": 3, "float32": 1, "policies": 2, "graphs": 4, "memory": 2}
"""Test files, and the number of processes for each."""
FEW = 20
"""The self-test runs one in this many tests of a file."""


@dataclass(frozen=True)
class Part:
    """One process of a check.

    Attributes
    ----------
    name
        Name in the report.
    call
        ``module:function`` to call with a `scripts.gpu_check.sheet.Sheet`.
    settings
        Settings of the sheet.
    limit_s
        Seconds after which it is killed.
    least_s
        It is skipped if less time than this is left.
    gigabytes
        GPU memory that it may use. Parts run in parallel only while they fit together.
    """

    name: str
    call: str
    settings: dict[str, Any] = field(default_factory=dict)
    limit_s: float = 150.0
    least_s: float = 30.0
    gigabytes: float = 3.0


def full_plan() -> list[Part]:
    """Parts for a GPU."""
    parts = [Part("device", DEVICE, limit_s=120.0)]
    for group, shards in GROUPS.items():
        parts += [_tests(group, [group], shard, shards) for shard in range(shards)]
    parts += _routes("1.5B", LAYERS, CELLS[:1])
    parts += [_route("1.5B", LAYERS, policy, *CELLS[0], ONCE) for policy in ("recall", "raas")]
    # Both numbers of layers, to check how well few layers predict all.
    parts += [_route("1.5B", FEW_LAYERS, "raas", *CELLS[0], route) for route in ROUTES]
    parts += [_dense("1.5B", LAYERS, 16), *_routes("7B", FEW_LAYERS, CELLS), _dense("7B", FEW_LAYERS, 16)]
    # To compile a cell with all layers takes minutes: of nine, little is left for these.
    parts += _routes("1.5B", LAYERS, CELLS[1:])
    sizes = (("1.5B", LAYERS), ("7B", FEW_LAYERS))
    parts += [_dense(shape, layers, rows) for shape, layers in sizes for rows in (1, 64)]
    return parts


def small_plan() -> list[Part]:
    """The same parts with tiny models for a CPU, to test the command before there is a GPU."""
    tiny = {
        "shape": "tiny", "layers": 2, "layers_of": 2, "rows": 2, "prompt": 20, "context": 150, "blocks": 2,
        "compile": False,
    }  # fmt: skip
    parts = [Part("device", DEVICE)]
    parts.append(_tests("all groups", list(GROUPS), 0, FEW, rehearse=True))
    for policy, route in CASES:
        cell = {"policy": policy, "budget": 64, "route": route, "profile": True}
        parts.append(Part(f"tiny {policy} {route}", ROUTE, tiny | cell))
    few = {"layers": 1, "policy": "raas", "budget": 64, "route": "general", "profile": False}
    parts.append(Part("tiny raas general, 1 of 2 layers", ROUTE, tiny | few))
    parts.append(Part("tiny dense", DENSE, tiny | {"lengths": (40, 200)}))
    # A small machine may be busy.
    return [replace(part, limit_s=400.0) for part in parts]


def _tests(name: str, groups: list[str], shard: int, shards: int, *, rehearse: bool = False) -> Part:
    share = f" {shard + 1}/{shards}" if shards > 1 else ""
    settings = {"groups": groups, "shard": shard, "shards": shards, "rehearse": rehearse}
    return Part(f"tests of {name}{share}", TESTS, settings, limit_s=170.0)


def _routes(shape: str, layers: int, cells: tuple[tuple[int, int], ...]) -> list[Part]:
    return [
        _route(shape, layers, policy, budget, rows, route)
        for budget, rows in cells
        for policy, route in CASES
    ]


def _route(shape: str, layers: int, policy: str, budget: int, rows: int, route: str) -> Part:
    settings = {
        "shape": shape, "layers": layers, "layers_of": LAYERS, "policy": policy, "budget": budget, "rows": rows,
        "route": route, "prompt": 128, "context": 16384, "blocks": 8, "compile": True,
        "profile": (budget, rows) == CELLS[0] and layers == LAYERS,
    }  # fmt: skip
    depth = "" if layers == LAYERS else f", {layers} of {LAYERS} layers"
    name = f"{shape} {policy} {route}, budget {budget}, rows {rows}{depth}"
    whole = layers == LAYERS
    # Weights, keys and values, and as much again for temporaries.
    gigabytes = (7.0 if whole else 9.0) + rows * budget / (1 << 18) * (10.0 if whole else 5.0)
    return Part(name, ROUTE, settings, 240.0 if whole else 160.0, 60.0 if whole else 35.0, gigabytes)


def _dense(shape: str, layers: int, rows: int) -> Part:
    # 64 rows of 32k tokens take more memory than most GPUs have left next to the other parts.
    lengths = LENGTHS if rows < 64 else LENGTHS[:2]
    settings = {
        "shape": shape, "layers": layers, "layers_of": LAYERS, "rows": rows, "lengths": lengths,
        "prompt": 128, "blocks": 4, "compile": rows < 64,
    }  # fmt: skip
    depth = "" if layers == LAYERS else f", {layers} of {LAYERS} layers"
    per_token = {"1.5B": 1024, "7B": 2048}[shape] * layers / 1e9
    gigabytes = 10.0 + rows * max(lengths) * per_token * 1.5
    return Part(f"{shape} dense, rows {rows}{depth}", DENSE, settings, 160.0, 40.0, gigabytes)
