"""A wheel that was compiled once is found again, and only where it is the same build."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from so8tqc.llama import kept_wheels
from so8tqc.llama.kept_wheels import Built, built_here, keep, kept, offered
from so8tqc.llama.pin import PIN
from so8tqc.services import doctor

NAME = f"llama_cpp_python-{PIN.version}-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    path.write_bytes(b"a wheel")
    return path


def test_what_is_kept_is_found_by_the_same_build_alone(wheel: Path, tmp_path: Path) -> None:
    built = built_here("-DX=1")
    root = tmp_path / "cache"
    assert kept(built, root) is None
    found = keep(wheel, built, root)
    assert found.read_bytes() == b"a wheel"
    assert kept(built_here("-DX=1"), root) == found
    others = [
        replace(built, **{field: "other"})
        for field in ("package", "python", "flags", "compiler", "cpu")
    ]
    assert [kept(other, root) for other in others] == [None] * 5
    assert {path.name for path in root.iterdir()} == {built.name}


def test_two_that_build_at_once_keep_one(wheel: Path, tmp_path: Path) -> None:
    built = built_here("")
    root = tmp_path / "cache"
    first = keep(wheel, built, root)
    wheel.write_bytes(b"the same, built again")
    assert keep(wheel, built, root) == first
    assert first.read_bytes() == b"a wheel"


def test_only_wheels_for_this_machine_are_offered(wheel: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    mine = built_here("-DX=1")
    keep(wheel, replace(mine, cpu="another"), root)
    keep(wheel, replace(mine, python="cpython-39"), root)
    assert list(offered(root)) == []
    keep(wheel, mine, root)
    (root / "odd").mkdir()
    (root / "odd" / "built.json").write_text("[]")
    assert list(offered(root)) == [root / mine.name]
    told = json.loads((root / mine.name / "built.json").read_text())
    assert Built(**told) == mine


def test_the_cpu_is_known_by_what_it_can_do(tmp_path: Path) -> None:
    def cpu(text: str) -> str:
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        return kept_wheels._cpu(path)

    one = "model name\t: A\ncpu MHz\t\t: 2000.1\nflags\t\t: sse avx2\n\n"
    assert cpu(one) == cpu(one.replace("2000.1", "3100.7")) == cpu(one * 2)
    assert cpu(one) != cpu(one.replace("avx2", "avx2 avx512f"))
    assert cpu("Features\t: asimd\n") != cpu("Features\t: asimd sve\n")


def test_doctor_offers_it(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "a cache"
    monkeypatch.setattr(doctor, "offered", lambda: offered(root))
    assert doctor._install() == doctor.INSTALL_COMMAND
    folder = keep(wheel, built_here(""), root).parent
    assert doctor._install().endswith(f"--find-links '{folder}' llama-cpp-python=={PIN.version}")
