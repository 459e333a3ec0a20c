"""Names of vLLM that the plugin uses: if a release moves or changes one, these tests name it.

The lists are collected from the plugin's source.
"""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
from packaging.version import Version

import longthink.vllm
import vllm
from longthink.vllm.versions import installed, supported_range

FOLDER = Path(longthink.vllm.__file__).parent
SINCE = {"vllm.v1.worker.gpu.sample.logits_processor": Version("0.31")}
MODULES = sorted(module.name for module in pkgutil.iter_modules(longthink.vllm.__path__))


def imported():
    """(file, module, name) of everything that the plugin imports from vLLM, in functions too."""
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield path.name, node.module, alias.name


@pytest.mark.parametrize(("file", "module", "name"), sorted(set(imported())))
def test_imported_name_exists(file, module, name):
    if Version(vllm.__version__) < SINCE.get(module, Version("0")):
        pytest.skip(f"{module} came later, and longthink does without it")
    assert hasattr(importlib.import_module(module), name), f"vllm {vllm.__version__} has no {module}.{name}"


def subclasses():
    """Classes of the plugin that have a base class from vLLM, with that base."""
    for module in MODULES:
        for cls in vars(importlib.import_module(f"longthink.vllm.{module}")).values():
            if inspect.isclass(cls) and cls.__module__ == f"longthink.vllm.{module}":
                for base in cls.__mro__[1:]:
                    if base.__module__.startswith("vllm."):
                        yield cls, base
                        break


def overrides():
    for cls, base in subclasses():
        for name, member in vars(cls).items():
            is_member = callable(member) or isinstance(member, classmethod | staticmethod | property)
            if is_member and not name.startswith("_"):
                yield cls, base, name


OWN = {"BoundedSpec.max_pages", "BoundedSpec.blocks", "BoundedSpec.max_blocks"}
"""Public members of those classes that override nothing."""


@pytest.mark.parametrize(
    ("cls", "base", "name"), list(overrides()), ids=lambda part: getattr(part, "__name__", part)
)
def test_overridden_member_exists(cls, base, name):
    if f"{cls.__name__}.{name}" not in OWN:
        assert hasattr(base, name), f"{base.__name__} of vllm {vllm.__version__} has no {name} any more"


@pytest.mark.parametrize(
    ("cls", "base", "name"), list(overrides()), ids=lambda part: getattr(part, "__name__", part)
)
def test_overriding_method_accepts_what_vllm_passes(cls, base, name):
    """Our method has every parameter of vLLM's."""
    theirs, ours = getattr(base, name, None), getattr(cls, name)
    if f"{cls.__name__}.{name}" in OWN or not inspect.isroutine(ours):
        return
    given, taken = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
    kinds = {parameter.kind for parameter in taken.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        assert set(given) <= set(taken), f"{cls.__name__}.{name}"


def test_installed_version_is_in_range():
    assert installed().in_range
    assert supported_range().contains(vllm.__version__, prereleases=True)
