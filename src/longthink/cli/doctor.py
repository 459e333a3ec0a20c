"""``longthink doctor``: whether this machine meets longthink's requirements."""

import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
from dataclasses import asdict, dataclass
from typing import Any

from longthink import __version__
from longthink.cli.doctor_model import examine_model
from longthink.cli.errors import EXIT_FAILED
from longthink.cli.options import Switch
from longthink.cli.table import Table
from longthink.cli.terminal import out_console, write_json, write_table

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class _Requirement:
    name: str
    wanted: str
    found: str | None
    ok: bool


def doctor(*, model: str | None = None, json: Switch = False) -> int:
    """Check versions, devices, kernels and vLLM; exit code 1 if a requirement is missing or out of range.

    Parameters
    ----------
    model
        Say instead of this model whether it is served and what its cache takes, from its configuration alone, without
        loading weights: a Hub id, a local folder, or "reasoner". Exit code 1 if it is not served.
    json
        Print one JSON document.
    """
    if model is not None:
        return examine_model(model, json=json)
    requirements = _requirements()
    ok = all(requirement.ok for requirement in requirements)
    report = {
        "ok": ok,
        "longthink": __version__,
        "platform": platform.platform(),
        "requirements": [asdict(requirement) for requirement in requirements],
        "kernels": _kernels(),
        "vllm": _vllm(),
        **_torch_facts(),
    }
    if json:
        write_json(report)
    else:
        _print_report(report)
    return 0 if ok else EXIT_FAILED


def _requirements() -> list[_Requirement]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        metadata = importlib.metadata.metadata("longthink")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            "longthink is not installed (pip install -e . in a checkout), so its requirements are unknown"
        ) from error
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist") or ()]
    rows = [_check("python", SpecifierSet(metadata["Requires-Python"] or ""), platform.python_version())]
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            rows.append(_check(requirement.name, requirement.specifier, _installed(requirement.name)))
    return rows


def _check(name: str, specifier: Any, found: str | None) -> _Requirement:
    # Pre-releases and local builds (2.13.0+cpu) of a supported version are supported.
    ok = found is not None and specifier.contains(found, prereleases=True)
    return _Requirement(name=name, wanted=str(specifier), found=found, ok=ok)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels() -> dict[str, Any]:
    import longthink.kernels

    return {
        "modules": sorted(module.name for module in pkgutil.iter_modules(longthink.kernels.__path__)),
        "triton": importlib.util.find_spec("triton") is not None,
    }


def _vllm() -> dict[str, Any] | None:
    from longthink.vllm.versions import installed, plugin_problem, supported_range

    vllm = installed()
    if vllm is None:
        return None
    problem = plugin_problem()
    if not vllm.in_range:
        problem = (
            f"out of range, supported is {supported_range()}: vLLM runs, but refuses longthink's options"
        )
    return {**asdict(vllm), "supported": str(supported_range()), "problem": problem}


def _torch_facts() -> dict[str, Any]:
    import torch

    names = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        names += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    devices = []
    for name in names:
        dtypes = [dtype for dtype in _DTYPES if _multiplies(torch, name, getattr(torch, dtype))]
        devices.append({"name": name, "dtypes": dtypes})
    threads = {"torch": torch.get_num_threads(), "cores": os.cpu_count()}
    return {"devices": devices, "threads": threads}


def _multiplies(torch: Any, device: str, dtype: Any) -> bool:
    """Whether a device can multiply matrices of a dtype, by trying."""
    try:
        ones = torch.ones(4, 4, device=device, dtype=dtype)
        return bool((ones @ ones == 4).all())
    except RuntimeError:
        return False


def _print_report(report: dict[str, Any]) -> None:
    found = report["requirements"]
    verdicts = ["ok" if row["ok"] else "out of range" if row["found"] else "missing" for row in found]
    table = Table(
        title="Requirements",
        columns=dict.fromkeys(("package", "found", "supported", "verdict"), "words"),
        rows=[
            [row["name"], row["found"] or "-", row["wanted"] or "any", verdict]
            for row, verdict in zip(found, verdicts, strict=True)
        ],
        marked=frozenset(i for i, row in enumerate(found) if not row["ok"]),
    )
    console = out_console()
    console.print(f"longthink {report['longthink']} on {report['platform']}", markup=False)
    write_table(table)
    for device in report["devices"]:
        console.print(f"device   {device['name']}: {', '.join(device['dtypes'])}", markup=False)
    threads, kernels = report["threads"], report["kernels"]
    console.print(f"threads  {threads['torch']} of {threads['cores']} cores")
    triton = "installed" if kernels["triton"] else "not installed"
    console.print(f"kernels  {', '.join(kernels['modules'])} (Triton {triton})")
    console.print(_vllm_line(report["vllm"]), markup=False)
    console.print("all good" if report["ok"] else "a requirement is missing or out of range")


def _vllm_line(vllm: dict[str, Any] | None) -> str:
    if vllm is None:
        return "vLLM     not installed"
    name = f"vLLM     {vllm['distribution']} {vllm['version']}, for {vllm['build'].upper()}s"
    return (
        f"{name}: {vllm['problem'] or 'the plugin is installed (longthink vllm-args shows how to start it)'}"
    )
