"""Fill vendor/llama.cpp with the pinned converter."""

from __future__ import annotations

from so8tqc.closure import versions_of
from so8tqc.disk.digests import file_ref
from so8tqc.llama.pin import PIN
from so8tqc.llama.vendor import fetch_converter, find_converter, is_vendored
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.tools import VendorMetrics
from so8tqc.records import Record, Stopwatch, Verdict


def vendor(progress: Progress = SILENT) -> Record:
    """Fetch the converter unless the pinned one is already here.

    Raises:
        ToolError: the package cannot be fetched or is not the pinned one.
    """
    watch = Stopwatch()
    present = is_vendored()
    converter = find_converter() if present else fetch_converter(progress)
    what = "was already here" if present else "was fetched"
    return Record(
        kind="vendor",
        verdict=Verdict.PASS,
        metrics=VendorMetrics(revision=converter.revision, script=str(converter.script)).as_json(),
        notices=(f"The converter of {PIN.name} {PIN.version} {what}: {converter.script.parent}",),
        outputs={"converter": file_ref(converter.script)},
        versions=versions_of(__name__),
        run=watch.info(),
    )
