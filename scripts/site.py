"""Hooks of MkDocs: pages from outside docs/, pages of the API, and links that lead where both stand on the site.

In the repository a link goes from file to file, docs/fidelity.md to ../benchmarks/x.md say. The site holds some of
these files at other places (`place`), and shows the text of a link whose target it does not hold.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "reports"  # made by `make site`
MOVED = {
    "README.md": "index.md",
    "docs/index.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "LICENSE": "license.md",
    "src/longthink/reasoner/weights/README.md": "model-card.md",
}
API = {
    "Generate": ("generate", "make_cache", "load_cache", "PagedCache", "Budget"),
    "Engine": ("Engine", "Sampling", "hf.Handle", "hf.Request", "hf.Finished", "hf.DecodeStep"),
    "Measure": ("fidelity", "lab.fidelity.summary.Summary", "lab.results.store.ResultStore"),
    "Policies": ("available_policies", "make_policy", "policies.register", "Policy", "policies.PolicyInfo"),
    "Errors": ("errors",),
}
"""Pages of the API, and the names under ``longthink`` on each."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s]+)\)")


def place(path):
    """Where a file of the repository stands on the site; None if it does not."""
    if path in MOVED:
        return MOVED[path]
    folder, _, rest = path.partition("/")
    if folder == "docs":
        return rest
    if folder == "examples" and rest.endswith(".py"):
        return path.removesuffix(".py") + ".md"
    return path if folder == "benchmarks" and Path(path).suffix in (".md", ".png") else None


def relinked(text, path, held, repo_url):
    """A page of the repository file `path`, with links between the places of the site, `held`."""
    here = posixpath.dirname(place(path))

    def link(match):
        image, words, target = match.groups()
        name, anchor = (*target.split("#", 1), "")[:2]
        if "://" in target or not name:
            return match[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        if place(found) in held:
            there = posixpath.relpath(place(found), here or ".")
            return f"{image}[{words}]({there}{'#' + anchor if anchor else ''})"
        return f"{image}[{words}]({repo_url.rstrip('/')}/blob/main/{found})" if repo_url else words

    # Code is no text: a list index in brackets, followed by a call, is no link.
    parts = re.split(r"(^```.*?^```|^ {4}.*?$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def outside():
    """Files of the repository that are on the site and outside docs/."""
    kept = [path for path in MOVED if not path.startswith("docs/")]
    for folder, pattern in (("examples", "*.py"), ("benchmarks", "**/*.md"), ("benchmarks", "**/*.png")):
        kept += [str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).glob(pattern))]
    return kept


def page_of(path):
    """The text of a repository file as a page."""
    text = (ROOT / path).read_text()
    if path.endswith(".py"):
        return f"# {Path(path).name}\n\n```python\n{text}```\n"
    return f"# License\n\n```text\n{text}```\n" if path == "LICENSE" else text


def api_pages():
    """Text of each page of the API by its place."""
    blocks = {title: "\n\n".join(f"::: longthink.{name}" for name in names) for title, names in API.items()}
    return {f"api/{title.lower()}.md": f"# {title}\n\n{block}\n" for title, block in blocks.items()}


def public_names():
    """`longthink.__all__`, read without an import: the site's environment has no torch."""
    tree = ast.parse((ROOT / "src/longthink/__init__.py").read_text())
    (found,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return ast.literal_eval(found)


def gallery(names):
    """The page of the reports that were built."""
    text = "# Reports to look at\n\nPages that `longthink report` wrote: one file each, offline.\n"
    for name in names:
        frame = f'<iframe src="reports/{name}.html" title="{name}" loading="lazy"'
        text += f"\n## {name}\n\n[The whole page](reports/{name}.html)\n\n{frame}"
        text += ' style="width: 100%; height: 36rem; border: 1px solid #8888"></iframe>\n'
    return text


def on_config(config):
    """Fill in the two parts of the navigation that are made."""
    policies = sorted(path.name for path in (ROOT / "docs" / "policies").glob("*.md"))
    made = {"POLICIES": [f"policies/{name}" for name in policies], "API": list(api_pages())}
    for section in config["nav"]:
        for title, entries in section.items():
            section[title] = made.get(entries, entries) if isinstance(entries, str) else entries
    return config


def on_files(files, config):
    """Add what is outside docs/, the pages that are made, and the reports."""
    files.remove(files.get_file_from_path("index.md"))
    reports = sorted(REPORTS.glob("*.html"))
    made = {place(path): page_of(path) for path in [*outside(), "docs/index.md"] if not path.endswith(".png")}
    made |= api_pages() | {"gallery.md": gallery([path.stem for path in reports])}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for path in outside():
        if path.endswith(".png"):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path in reports:
        files.append(File.generated(config, f"reports/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Mend the links of a page that is a file of the repository."""
    sources = {place(path): path for path in [*outside(), "docs/index.md"]}
    name = page.file.src_uri
    if name.startswith(("api/", "gallery.md")):
        return markdown
    return relinked(markdown, sources.get(name, f"docs/{name}"), files.src_uris, config["repo_url"])
