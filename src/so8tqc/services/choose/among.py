"""Choose among files that a run has quantized and judged: no model is evaluated again."""

from __future__ import annotations

from so8tqc.closure import versions_of
from so8tqc.config import ChooseAmongConfig, QCConfig
from so8tqc.disk.digests import file_ref
from so8tqc.disk.parts import bytes_of
from so8tqc.errors import InputError
from so8tqc.gguf.file import open_gguf
from so8tqc.progress import SILENT, Progress
from so8tqc.record_files import read_record
from so8tqc.record_kinds.choose import ChooseMeasured, ChooseMetrics, Row
from so8tqc.record_kinds.quantize import QuantizeMetrics
from so8tqc.records import Record, Stopwatch, overall
from so8tqc.services.choose.budget import budget_of, verdicts
from so8tqc.services.choose.inversions import inversions
from so8tqc.services.choose.recommend import recommend, speeds
from so8tqc.services.choose.rows import (
    as_recorded,
    described,
    files_by_type,
    measured_row,
    scope,
    written_paths,
)
from so8tqc.services.qc.judging import Bootstrap
from so8tqc.services.qc.models import prepared_of
from so8tqc.services.qc.pairwise import compare_candidates
from so8tqc.services.qc.token_file import TOKENS_FILE, read_tokens
from so8tqc.sources.capture import capture_if_one


def choose_among(config: ChooseAmongConfig, progress: Progress = SILENT) -> Record:
    """Recommend one of the quantized files of a run, by what its ``qc`` measured.

    Of the models only the speed is measured here. The record is that of ``choose``, without
    ``files`` and ``comparisons`` (they stand in the records of ``quantize`` and ``qc``) and without
    a search.

    Raises:
        InputError: no record of ``quantize`` or ``qc``, or the ``qc`` has not run these files.
        ToolError: no libllama, or it failed.
    """
    watch = Stopwatch()
    made, judged = (read_record(d / "record.json") for d in (config.quantized, config.judged))
    tables = read_tokens(config.judged / TOKENS_FILE)
    told = QCConfig.model_validate(judged.config).model_dump(exclude_defaults=True)
    judged_by = QCConfig(**told)  # what was left out then is left out now
    bootstrap, budget = Bootstrap(judged_by.resamples, judged_by.seed), budget_of(config)
    entries = QuantizeMetrics.of(made).files
    if missing := entries.keys() - tables.keys():
        raise InputError("the qc has not run this file", where=min(missing))
    files = files_by_type(made)
    paths = written_paths(files)
    by_type = {name: tables[path.name] for name, path in paths.items()}
    rows = {
        name: _with_survival(
            measured_row(bytes_of(path), by_type[name], None, bootstrap), judged, path.name
        )
        for name, path in paths.items()
    }
    inverted = inversions(
        rows, as_recorded(files), compare_candidates(by_type, bootstrap), open_gguf(config.gguf)
    )
    recommended, reason = recommend(rows, budget, config, len(rows))
    checks = verdicts(rows[recommended], recommended, budget, config)
    capture = capture_if_one(judged_by.reference)
    longest = max((text.tokens for text in prepared_of(judged_by, capture).texts), key=len)
    measured = speeds(
        paths, longest, repeats=config.repeats, threads=config.threads, progress=progress
    )
    count, tokens = scope(by_type)
    metrics = ChooseMetrics(
        rows=described(rows, files),
        recommended=recommended,
        reason=reason,
        inversions=inverted,
        texts=count,
        tokens=tokens,
        budget=str(budget) if config.has_budget else None,
    )
    return Record(
        kind="choose",
        verdict=overall(checks),
        checks=tuple(checks),
        metrics=metrics.as_json(),
        notices=(reason, *(inversion["sentence"] for inversion in inverted)),
        inputs={name: file_ref(path) for name, path in paths.items()},
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info().model_copy(update={"measured": ChooseMeasured(speed=measured).as_json()}),
    )


def _with_survival(row: Row, judged: Record, subject: str) -> Row:
    """The row with what ``qc`` found about the gate in the file, if there are gates."""
    for check in judged.checks:
        if check.id == "effect.survival" and check.subject == subject and check.value is not None:
            row["survival"], row["survives"] = check.value, check.value < 0
    return row
