"""What lab/pyproject.toml cannot say: a dependency on the version being built, and modules outside of its folder."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersion(MetadataHookInterface):
    """The laboratory uses what the core does not promise to others, so it fits one version of it."""

    def update(self, metadata: dict[str, Any]) -> None:
        metadata["dependencies"] = [f"longthink=={metadata['version']}"]


class Modules(BuildHookInterface[Any]):
    """An editable install finds them in src; "force-include" in pyproject.toml would copy them there too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["../src/longthink/lab"] = "longthink/lab"
