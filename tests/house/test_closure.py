"""What a module leans on, read from its sources."""

from __future__ import annotations

import ast
import shutil
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import so8tqc
from so8tqc.closure import PACKAGE, Sources, own_sources, versions_of
from so8tqc.config import QuantizeConfig
from so8tqc.services.run.pipeline import _idle

ROOT = Path(so8tqc.__file__).parent
SERVICES = {
    "bake": "bake",
    "export": "export.service",
    "quantize": "quantize.service",
    "calibrate": "calibrate.service",
    "qc": "qc.service",
    "choose": "choose.among",
    "longtext": "longtext.service",
}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(ROOT, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "package"


def digests(root: Path) -> dict[str, str]:
    sources = Sources(root)
    return {s: sources.closure(f"so8tqc.services.{m}").digest for s, m in SERVICES.items()}


def changed_by(root: Path, file: str) -> set[str]:
    """The stages whose code is another after a word in this file's docstring."""
    before = digests(root)
    path = root / file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"""', '"""Changed. ', 1) if text else '"""A docstring."""\n')
    after = digests(root)
    return {stage for stage in SERVICES if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("corpus/lyx.py", set()),
        ("corpus/store.py", set(SERVICES) - {"bake"}),
        ("cli/commands/run.py", set()),
        ("services/run/pipeline.py", set()),
        ("reports/kinds/longtext.py", set()),
        ("reports/html.py", set()),
        ("metrics/cpu_kernels.py", set(SERVICES) - {"bake"}),
        ("metrics/gpu_kernels.py", {"quantize", "qc", "choose", "longtext"}),
        ("metrics/temperature/fit.py", {"calibrate"}),
        ("llama/guarded_script.py", {"export", "quantize", "qc", "choose"}),
        ("llama/imatrix_worker.py", {"quantize"}),
        ("llama/quantize_worker.py", {"quantize"}),
        ("llama/model_worker.py", {"export", "calibrate", "qc", "choose", "longtext"}),
        ("services/__init__.py", set(SERVICES)),
        ("errors.py", set(SERVICES)),
        ("rotations/algebra.py", {"bake", "qc", "choose"}),
    ],
)
def test_a_changed_module_is_other_code_for_those_that_lean_on_it(
    copied: Path, file: str, stages: set[str]
) -> None:
    assert changed_by(copied, file) == stages


@pytest.mark.parametrize("file", ["templates/page.css", "languages/ja.yaml", "png.py"])
def test_a_package_is_all_that_lies_in_it(copied: Path, file: str) -> None:
    before = Sources(copied).closure("so8tqc.reports").digest
    with (copied / "reports" / file).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    assert Sources(copied).closure("so8tqc.reports").digest != before


def test_what_libllama_makes_does_not_depend_on_the_solver(copied: Path, tmp_path: Path) -> None:
    libllama = QuantizeConfig(gguf=tmp_path, out=tmp_path)
    solver = libllama.model_copy(update={"solver": "hessian"})
    quantize = "so8tqc.services.quantize.service"
    alone = own_sources().closure(quantize, without=_idle(libllama))
    assert not {"numba", "torch", "scipy"} & set(alone.distributions)
    assert "so8tqc.services.quantize.imatrix" in alone.modules
    compared = "so8tqc.sources.compare"
    sized = solver.model_copy(update={"max_size": 1})
    assert compared not in own_sources().closure(quantize, without=_idle(solver)).modules
    assert compared in own_sources().closure(quantize, without=_idle(sized)).modules
    assert {"numba", "torch"} <= set(
        own_sources().closure(quantize, without=_idle(solver)).distributions
    )

    def digests() -> list[str]:
        sources = Sources(copied)
        return [
            sources.closure(quantize, without=_idle(config)).digest for config in (libllama, solver)
        ]

    before = digests()
    with (copied / "quantizers" / "kernels.py").open("a", encoding="utf-8") as stream:
        stream.write("\n")
    after = digests()
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_numba_and_scipy_are_named_where_they_are_leant_on() -> None:
    for stage, module in SERVICES.items():
        found = own_sources().closure(f"so8tqc.services.{module}")
        kernels = {"metrics.cpu_kernels", "quantizers.kernels", "adapters.fused"}
        leant_on = {f"so8tqc.{name}" for name in kernels} & set(found.modules)
        assert ("numba" in found.distributions) is bool(leant_on), stage
        assert not [m for m in found.modules if m.startswith(("so8tqc.reports", "so8tqc.cli"))]
    assert {"numba", "scipy"} <= versions_of("so8tqc.services.choose.service").keys()
    assert (
        "llama-cpp-python"
        in own_sources().closure("so8tqc.services.quantize.service").distributions
    )


def test_libraries_are_called_as_their_distributions_are() -> None:
    """All that is imported here and installed: the table of other names is complete."""
    found = own_sources().closure(PACKAGE)
    installed = packages_distributions()
    known = {d.lower().replace("_", "-") for names in installed.values() for d in names}
    imported = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    imported -= {*sys.stdlib_module_names, PACKAGE}
    wanted = {installed[name][0].lower().replace("_", "-") for name in imported & installed.keys()}
    assert len(wanted) > 20
    assert wanted - set(found.distributions) == set()
    here = {d for d in found.distributions if d in known}
    assert len(here) > 20


def test_every_module_that_is_started_by_its_name_is_found() -> None:
    """Literals that are a module's whole name, but for the public face's table of homes."""
    modules = set(own_sources().closure(PACKAGE).modules) - {PACKAGE}
    started = set()
    for path in ROOT.rglob("*.py"):
        if path != ROOT / "__init__.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            literals = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
            started |= {(path, name) for name in literals & modules}
    assert len(started) >= 4
    for path, name in started:
        ours = ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts))
        assert name in own_sources().closure(ours).modules


def test_imports_of_every_form(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
        "    from so8tqc import no\nelse:\n    from so8tqc import b\n",
        "b.py": "def f():\n    try:\n        from .room import inner\n    except ImportError:\n"
        "        import yaml.loader as y\n",
        "room/__init__.py": "match 1:\n    case 1:\n        from . import sibling\n",
        "room/inner.py": "from ..c import name\nx = ['-P', '-m', 'so8tqc.child', 'x']\n",
        "room/sibling.py": "",
        "c.py": "name = 1",
        "no.py": "",
        "other.py": "",
        "child.py": 'from importlib.util import find_spec\nfind_spec("llama_cpp")\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = Sources(tmp_path).closure("so8tqc.a")
    assert found.modules == tuple(
        sorted(
            [
                "so8tqc",
                *(
                    f"so8tqc.{n}"
                    for n in ("a", "b", "c", "child", "room", "room.inner", "room.sibling")
                ),
            ]
        )
    )
    assert found.distributions == ("llama-cpp-python", "pyyaml")
    with pytest.raises(ModuleNotFoundError):
        Sources(tmp_path).closure("so8tqc.nowhere")
