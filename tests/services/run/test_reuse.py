"""A stage is run again exactly when it must be; its pages are drawn again when they must be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import so8tqc
from so8tqc import records
from so8tqc.closure import Sources
from so8tqc.config import CalibrateConfig, QCOptions, QuantizeConfig
from so8tqc.languages import Language
from so8tqc.progress import SILENT
from so8tqc.records import Record, Stopwatch, Verdict, judge
from so8tqc.services.pages import Pages
from so8tqc.services.run import pipeline
from so8tqc.services.run.directory import RunDirectory
from so8tqc.services.run.pipeline import _SERVICES, Stage, _perform

_SOLVED = QuantizeConfig(
    gguf=Path("a.gguf"), types=("Q8_0",), solver="hessian", model=Path("a"), out=Path("quantized")
)
"""As a run quantizes: it solves, and chooses no types by a size."""


class House:
    """A run directory and a copy of the package's sources; stages that only count their runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.package, self.out = folder / "package", folder / "out"
        self.language = Language.ENGLISH
        package = Path(so8tqc.__file__).parent
        shutil.copytree(package, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(pipeline, "own_sources", lambda: self.sources)
        self.ran: list[str] = []
        self.run()
        assert self.ran == list(_SERVICES)

    def run(self) -> None:
        """Every stage, reused or not; what ran is in ``ran``, what was drawn has a new page."""
        self.ran, self.sources = [], Sources(self.package)
        for name in _SERVICES:
            config = _SOLVED if name == "quantize" else QCOptions()
            stage = Stage(name, config, (), (), self._service(name), reports=True)
            _perform(stage, RunDirectory(self.out), SILENT, False, self.language)

    def _service(self, name: str) -> Callable[[object], Record]:
        def service(_: object) -> Record:
            self.ran.append(name)
            check = judge("kl.mean", 0.0, 1.0, detail="")
            return Record(  # a kind of no stage: it has no series to draw
                kind="counted", verdict=Verdict.PASS, checks=(check,), run=Stopwatch().info()
            )

        return service

    def change(self, file: str) -> None:
        path = self.package / file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"""', '"""Changed. ', 1), encoding="utf-8")

    def spoil_pages(self) -> None:
        """Pages as of old code: they are recorded as unchanged, and say what nobody draws."""
        directory = RunDirectory(self.out)
        for stage, entry in directory.manifest.pages.items():
            for path in map(Path, entry.outputs):
                path.write_text("old", encoding="utf-8")
            paths = [Path(path) for path in entry.outputs]
            directory.commit_pages(stage, entry.fingerprint, paths)

    def old_pages(self) -> set[str]:
        return {p.parent.name for p in self.out.glob("*/*.*") if p.read_bytes() == b"old"}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(tmp_path, monkeypatch)


def test_nothing_changed_reruns_and_redraws_nothing(house: House) -> None:
    house.spoil_pages()
    house.run()
    assert house.ran == []
    assert house.old_pages() == set(_SERVICES)


def test_a_docstring_of_the_corpus_reuses_the_bake_and_all_that_do_not_lean_on_it(
    house: House,
) -> None:
    house.change("corpus/build.py")
    house.run()
    assert house.ran == []
    house.change("corpus/manifest.py")
    house.run()
    assert "bake" not in house.ran
    assert "calibrate" in house.ran


def test_a_changed_kernel_reruns_what_is_measured_with_it(house: House) -> None:
    house.change("metrics/cpu_kernels.py")
    house.run()
    assert house.ran == ["export", "calibrate", "qc", "choose", "longtext"]


@pytest.mark.parametrize("file", ["html.py", "kinds/longtext.py", "kinds/verify.py"])
def test_a_change_in_reports_reruns_nothing_and_redraws_all(house: House, file: str) -> None:
    house.spoil_pages()
    house.change(f"reports/{file}")
    house.run()
    assert house.ran == []
    assert house.old_pages() == set()


@pytest.mark.parametrize("file", ["templates/page.css", "languages/ja.yaml"])
def test_templates_and_languages_are_code_of_pages(house: House, file: str) -> None:
    house.spoil_pages()
    with (house.package / "reports" / file).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    house.run()
    assert house.ran == []
    assert house.old_pages() == set()


def test_another_language_redraws_and_reruns_nothing(house: House) -> None:
    house.language = Language.JAPANESE
    house.run()
    assert house.ran == []
    for stage in _SERVICES:
        assert '<html lang="ja">' in (house.out / stage / "report.html").read_text("utf-8")


def test_an_edited_page_is_drawn_again(house: House) -> None:
    page = house.out / "qc" / "report.html"
    before = page.read_bytes()
    page.write_text("edited", encoding="utf-8")
    house.run()
    assert house.ran == []
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("library", "stages"),
    [
        ("numba", ["bake", "export", "quantize", "calibrate", "qc", "choose", "longtext"]),
        ("scipy", ["calibrate", "qc", "choose", "longtext"]),
        ("safetensors", ["bake", "export", "quantize", "calibrate", "qc", "choose", "longtext"]),
        ("hypothesis", []),
        ("plotly", []),
    ],
)
def test_another_version_of_a_library_reruns_what_leans_on_it(
    house: House, monkeypatch: pytest.MonkeyPatch, library: str, stages: list[str]
) -> None:
    real = records.versions

    def other(*names: str) -> dict[str, str]:
        return {n: f"{v}.1" if n == library else v for n, v in real(*names).items()}

    monkeypatch.setattr(pipeline, "versions", other)
    house.run()
    assert house.ran == stages


def test_an_image_that_is_asked_for_is_no_reason_to_measure_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, drawn = [], []

    def service(_: object) -> Record:
        ran.append(1)
        return Record(kind="calibrate", verdict=Verdict.PASS, run=Stopwatch().info())

    def draw(record: Record, out: Path, *_: object) -> Pages:
        drawn.append(record.config["png"])
        page = out / "reliability.html"
        page.write_text(f"{drawn}")
        return Pages([page], complete=not record.config["png"])

    monkeypatch.setattr(pipeline, "draw_pages", draw)
    for png in (False, False, True, True):
        config = CalibrateConfig(gguf=tmp_path, tokenizer=tmp_path, out=tmp_path / "out", png=png)
        stage = Stage("calibrate", config, (), (), service)
        _perform(stage, RunDirectory(tmp_path / "out"), SILENT, False, Language.ENGLISH)
    assert ran == [1]
    assert drawn == [False, True, True]  # without a Chrome it is tried in each run
