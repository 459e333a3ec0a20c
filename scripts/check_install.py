"""Install the wheels of a folder as a stranger does, and run the README's lines: check_install.py DIST [PYTHON ...].

Each interpreter (default: the one that runs this) gets an empty environment in a temporary folder. Packages come from
where pip takes them; pip's own settings say where that is. Takes a minute or two per interpreter, mostly torch.
"""

import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

COMMANDS = (
    ["--version"],
    ["policies"],
    ["doctor"],
    ["generate", "--size", "s", "--decode-budget", "96"],
)


def readme_code():
    """The first whole program of the README."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    return next(block for block in blocks if "load_reasoner" in block)


def check(dist, python):
    """Install and run; `CalledProcessError` if anything fails."""
    with TemporaryDirectory() as folder:

        def run(*words):
            return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout

        run(python, "-m", "venv", "env")
        own, longthink = Path(folder) / "env/bin/python", Path(folder) / "env/bin/longthink"
        (wheel,) = dist.glob("longthink-*.whl")
        # With an extra, which brings the laboratory from the folder: no index has this version yet.
        run(own, "-m", "pip", "install", "-q", "--find-links", dist, f"{wheel}[plot]")
        for words in COMMANDS:
            run(longthink, *words)
        assert "Not installed" not in run(longthink, "--help")
        assert " True\n" in run(own, "-c", readme_code())
        return run(own, "--version").strip()


if __name__ == "__main__":
    dist, pythons = Path(sys.argv[1]).resolve(), sys.argv[2:] or [sys.executable]
    for python in pythons:
        start = time.monotonic()
        try:
            version = check(dist, python)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{python}: {error}\n{error.stdout[-2000:]}{error.stderr[-4000:]}")
        print(f"{version}: installed and run in {time.monotonic() - start:.0f} s", flush=True)
