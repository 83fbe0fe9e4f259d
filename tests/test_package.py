"""What holds for the package as a whole: imports, layers, the wheel."""

import ast
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import hf_adaclip

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_adaclip"
# What a folder, or a module beside them, may import; imports within a function or under TYPE_CHECKING count like any other.
MAY_IMPORT = {
    "errors": (),
    "hints": (),
    "support": ("errors", "hints"),
    "reliance": ("errors",),
    "controllers": ("errors", "hints"),
    "flat": ("controllers", "errors", "hints"),
    "validation": ("controllers", "errors", "hints"),
    "config": ("controllers", "errors", "flat", "hints", "validation"),
    "gradients": ("config", "controllers", "errors", "reliance"),
    "ledger": ("config", "controllers", "errors", "gradients"),
    "run": ("config", "controllers", "errors", "gradients", "ledger", "support"),
    "ports": ("config", "controllers", "errors", "gradients", "run", "support", "reliance"),
    "incidents": ("config", "controllers", "errors", "gradients", "ledger", "run"),
    "drivers": (
        "config",
        "controllers",
        "errors",
        "gradients",
        "hints",
        "incidents",
        "ports",
        "run",
        "support",
        "reliance",
    ),
    "clipper": (
        "config",
        "controllers",
        "drivers",
        "errors",
        "gradients",
        "hints",
        "incidents",
        "ports",
        "run",
        "support",
    ),
    "audit": ("config", "controllers", "errors", "gradients", "ledger", "run"),
    "telemetry": ("errors", "ledger", "reliance"),
}
READERS = ("audit", "config", "controllers", "errors", "ledger", "run", "telemetry", "hints", "flat")
MAY_IMPORT["gauntlet"] = (*READERS,)
MAY_IMPORT["report"] = (*READERS, "gauntlet", "incidents")
MAY_IMPORT["integrations"] = (*READERS, "clipper", "gradients", "incidents", "ports", "reliance", "report", "support")
MAY_IMPORT["compare"] = (*READERS, "gradients", "integrations", "report")
MAY_IMPORT["cli"] = (*READERS, "compare", "gauntlet", "integrations", "reliance", "report")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def part_of(module):
    """The folder, or the module beside the folders, that something belongs to; None for the package itself."""
    return module.split(".")[1] if "." in module else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part_of(".".join(("hf_adaclip", *path.relative_to(PACKAGE).with_suffix("").parts)))
    if own == "__init__":
        return
    assert own in MAY_IMPORT, f"{path} is in no part that is known"
    for module in imports_of(path):
        part = part_of(module)
        if module.startswith("hf_adaclip") and part is not None:
            assert part == own or part in MAY_IMPORT[own], f"{path} imports {module}"


def test_the_parts_make_no_circle():
    done: set[str] = set()
    while left := [part for part in MAY_IMPORT if part not in done]:
        free = [part for part in left if set(MAY_IMPORT[part]) <= done]
        assert free, left
        done.update(free)


def test_only_integrations_and_comparisons_know_transformers():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("integrations", "compare"):
            continue
        known = {m.split(".")[0] for m in imports_of(path)}
        assert not known & {"transformers", "accelerate", "datasets"}, path


def test_controllers_do_no_io_and_know_no_clock():
    for path in (PACKAGE / "controllers").rglob("*.py"):
        assert not {m.split(".")[0] for m in imports_of(path)} & {
            "os",
            "io",
            "time",
            "random",
            "pathlib",
            "logging",
            "json",
        }, path


@pytest.mark.slow
def test_import_is_light():
    heavy: tuple[str, ...] = ("transformers", "accelerate", "datasets", "matplotlib", "pandas", "safetensors")
    wrappers = ("by_group", "delayed", "limits", "skip")
    seldom = ("audit.verify", "audit.replay", *(f"controllers.wrappers.{name}" for name in wrappers))
    heavy = (*heavy, *(f"hf_adaclip.{name}" for name in seldom))
    code = f"import sys, hf_adaclip; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    for name in hf_adaclip.__all__:
        value = getattr(hf_adaclip, name)
        assert name == "CONTROLLERS" or value.__doc__, name
    assert set(dir(hf_adaclip)) == set(hf_adaclip.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hf_adaclip.nonsense  # noqa: B018


def test_every_file_says_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_doctests():
    import doctest

    import hf_adaclip.clipper

    controllers = [sys.modules[kind.__module__] for kind in hf_adaclip.CONTROLLERS.values()]
    for module in (hf_adaclip.clipper, *controllers):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


@pytest.mark.slow
def test_the_wheel_installs_and_imports_from_an_empty_directory(tmp_path):
    """Built without the network; dependencies come from this environment."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    wheel = next(tmp_path.glob("hf_adaclip-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "hf_adaclip/py.typed" in names
    assert "hf_adaclip/compare/demo_target.json" in names
    assert not [n for n in names if n.startswith(("tests", "scripts", "model_cards"))]
    assert any(n.endswith("licenses/LICENSE") for n in names)

    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site.stdout.strip())
    here = next(p for p in sys.path if p.endswith("site-packages"))
    code = f"import sys; sys.path.append({here!r}); import hf_adaclip; print(hf_adaclip.__file__); hf_adaclip.AdaptiveClipper()"
    empty = tmp_path / "empty"
    empty.mkdir()
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # by which a source tree would come first
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=empty, env=elsewhere)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
