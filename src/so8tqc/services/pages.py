"""The pages and images of a stage's own, drawn after it from its record and its series.

A stage does not draw: what changes a plot does not change what was measured, and a page can be
drawn again, in another language or by other code, without the stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from so8tqc.errors import MissingToolError
from so8tqc.languages import Language
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Record
from so8tqc.reports.kinds.calibrate import draw_reliability_png
from so8tqc.reports.kinds.longtext import CasePlots, case_files, draw_case, draw_png
from so8tqc.reports.language import spoken
from so8tqc.reports.reliability_page import write_reliability
from so8tqc.services.longtext.series import SERIES_FILE, read_series

PAGE_FILE = "reliability.html"
IMAGE_FILE = "reliability.png"

_LONGEST_STEM = 100


@dataclass(frozen=True)
class Pages:
    """What was drawn.

    Attributes:
        files: paths, in order.
        complete: whether that is all that was asked for; images need a Chrome.
    """

    files: Sequence[Path] = field(default=())
    complete: bool = True


def draw_pages(
    record: Record,
    out: Path,
    language: Language = Language.ENGLISH,
    progress: Progress = SILENT,
) -> Pages:
    """Draw the pages that a stage of this kind has of its own, beside its record.

    Args:
        record: of a stage; kinds without pages of their own, and records that
            measured nothing, get none.
        out: its directory, where its other files are.
        language: of the pages.
        progress: told about the plots, and that there are no images where no Chrome starts.

    Raises:
        InputError: the stage's series is missing or broken.
        ToolError: the disk refuses.
    """
    with spoken(language):
        match record.kind:
            case "calibrate" if "reliability" in record.metrics:
                return _calibration(record, out, progress)
            case "longtext" if SERIES_FILE in record.outputs:
                return _long_texts(record, out, progress)
            case _:
                return Pages()


def _calibration(record: Record, out: Path, progress: Progress) -> Pages:
    """``reliability.html`` and ``.png``."""
    page, image = out / PAGE_FILE, out / IMAGE_FILE
    image.unlink(missing_ok=True)  # of an earlier run
    write_reliability(record, page)
    if not record.config.get("png"):
        return Pages([page])
    try:
        draw_reliability_png(record, image)
    except MissingToolError as error:
        progress.message(f"The image was not drawn: {error}")
        return Pages([page], complete=False)
    return Pages([page, image])


def _long_texts(record: Record, out: Path, progress: Progress) -> Pages:
    """``CASE_oscillation.html``, ``CASE_entropy.html`` and images of the same."""
    plots = list(_plots(record, out))
    with progress.task("drawing plots", total=len(plots), unit="cases") as task:
        for plot in plots:
            draw_case(plot, out)
            task.advance(1, item=plot.case)
    pages = [out / name for plot in plots for name in case_files(plot.case, ".html")]
    images = [out / name for plot in plots for name in case_files(plot.case, ".png")]
    for image in images:
        image.unlink(missing_ok=True)
    if not record.config.get("png"):
        return Pages(pages)
    try:
        with progress.task("drawing images", total=len(images), unit="images") as task:
            draw_png(plots, out, task)
    except MissingToolError as error:
        progress.message(f"Images were not drawn: {error}")
        return Pages(pages, complete=False)
    return Pages([*pages, *images])


def _plots(record: Record, out: Path) -> Iterable[CasePlots]:
    cases = record.metrics.get("cases")
    ids = list(cases) if isinstance(cases, Mapping) else []
    series, wavelengths = read_series(out / SERIES_FILE, ids)
    for case, stem in zip(ids, _stems(ids), strict=True):
        yield CasePlots(
            case=stem,
            columns=series[case].columns,
            position=series[case].position,
            has_reference="reference" in record.inputs,
            attention=series[case].attention,
            spectra=series[case].spectra,
            wavelengths=wavelengths,
        )


def _stems(ids: Sequence[str]) -> list[str]:
    """A distinct file name prefix for each case, whatever its id is made of."""
    stems: list[str] = []
    for case in ids:
        stem = re.sub(r"[^\w.-]+", "_", case)[:_LONGEST_STEM] or "case"
        taken = sum(other == stem or other.startswith(f"{stem}~") for other in stems)
        stems.append(f"{stem}~{taken + 1}" if taken else stem)
    return stems
