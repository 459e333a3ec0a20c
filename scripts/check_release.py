"""Check that a tag may be published: check_release.py v0.1.0 [CHECKOUT]. It needs no package."""

import re
import sys
from pathlib import Path


def faults(tag, root):
    """Say what stands against publishing, one line per fault."""
    version = re.search(r'__version__ = "(.+)"', (root / "src/longthink/_version.py").read_text())[1]
    found = [] if tag == f"v{version}" else [f"the tag is {tag}, the version {version}"]
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        found.append(f"{version} is no version of a release")
    cited = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)[1]
    if cited != version:
        found.append(f"CITATION.cff has version {cited}, not {version}")
    log = (root / "CHANGELOG.md").read_text()
    heading = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", log, re.MULTILINE)
    if heading is None:
        found.append(f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD'")
    elif log.partition("## [Unreleased]")[2].partition("\n## [")[0].strip():
        found.append("CHANGELOG.md lists changes under Unreleased")
    return found


if __name__ == "__main__":
    said = faults(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "."))
    print("\n".join(said) or "ready")
    sys.exit(bool(said))
