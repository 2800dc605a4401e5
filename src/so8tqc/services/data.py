"""Build the calibration set out of pinned packages and the texts written for this project."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from so8tqc.closure import versions_of
from so8tqc.config import CALIBRATION_TEXTS
from so8tqc.corpus.build import WRITTEN, passages_of, result_of, select
from so8tqc.corpus.fetch import Missing, download, locate
from so8tqc.corpus.manifest import (
    CorpusManifest,
    Domain,
    Language,
    Result,
    manifest_path,
    read_corpus_manifest,
    write_result,
)
from so8tqc.corpus.passages import Passage
from so8tqc.corpus.store import built_path
from so8tqc.disk.atomic import atomic_file
from so8tqc.disk.digests import file_ref
from so8tqc.errors import ConfigError, DataError, ToolError
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.tools import DataMetrics
from so8tqc.records import Record, Stopwatch, Verdict
from so8tqc.sources.inputs.texts import Text, load_texts

PROJECT_LICENCE = "Apache-2.0"


def calibration_data(
    packages: Path | None = None,
    out: Path | None = None,
    allow_missing: bool = False,
    update: bool = False,
    progress: Progress = SILENT,
) -> Record:
    """Build ``builtin:calibration`` and put it into the user's cache, or elsewhere.

    The record's metrics: ``samples``, ``bytes`` and ``gzip_bytes`` of the set, ``counts``
    (language → domain → samples).

    Args:
        packages: directory with the packages' files, downloaded before; None to fetch them.
        out: file to write instead of the cache.
        allow_missing: build from the packages that can be had; needs ``out``, since that is
            not the set that ``builtin:calibration`` names.
        update: write the digest of what comes out into the manifest (for who changes the
            texts or the rules) instead of comparing with it.
        progress: where to report.

    Raises:
        ConfigError: ``allow_missing`` without ``out``, or with ``update``.
        ToolError: packages cannot be had, one is not the pinned file, or the set that comes
            out is not the pinned one.
        DataError: a package cannot be read.
    """
    watch = Stopwatch()
    if allow_missing and (out is None or update):
        raise ConfigError(
            f"a set with packages missing is not {CALIBRATION_TEXTS}",
            remedy="Give --out FILE, without --update, and use that file as --data.",
        )
    manifest = read_corpus_manifest()
    pinned = built_path(manifest.result)
    if not (packages or out or update) and pinned.is_file():
        content = pinned.read_bytes()
        result = result_of(content)
        if result.sha256 == manifest.result.sha256:
            return _record(content, result, pinned, (), watch, built=False)
    packaged, missing = _packaged(manifest, packages, allow_missing, progress)
    content = select(manifest, written_passages(manifest), packaged)
    result = result_of(content)
    if update:
        write_result(manifest_path(), manifest, result)
    elif not missing and result.sha256 != manifest.result.sha256:
        raise ToolError(
            f"the set has SHA-256 {result.sha256}, pinned is {manifest.result.sha256}; it is not "
            "used",
            remedy="Who has changed the texts or the rules runs: so8tqc data --update",
        )
    path = out or built_path(result)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return _record(content, result, path, missing, watch, built=True)


def written_passages(manifest: CorpusManifest) -> list[Passage]:
    """The texts written for this project that lie in ``data/``.

    Raises:
        DataError: a text has no language, or a category that the manifest does not know.
    """
    folder = manifest_path().parent
    files = sorted({path for pattern in manifest.written for path in folder.glob(pattern)})
    return [_written(manifest, file, text) for file in files for text in load_texts([str(file)])]


def _written(manifest: CorpusManifest, file: Path, text: Text) -> Passage:
    where = f"{file}: {text.id}"
    if text.category not in {*manifest.categories, *Domain}:
        raise DataError(
            f"the category {text.category!r} is none of the ten domains, nor in the manifest",
            where=where,
        )
    if text.language not in {"en", "ja"}:
        raise DataError(f"the language is {text.language!r}, not en or ja", where=where)
    language: Language = "en" if text.language == "en" else "ja"
    name = text.id.removeprefix(f"{language}/")
    return Passage(
        id=f"{language}/{WRITTEN}/{file.stem}/{name}",
        text=text.text,
        language=language,
        domain=manifest.categories.get(text.category) or Domain(text.category),
        source=WRITTEN,
        licence=PROJECT_LICENCE,
        prompt=text.prompt,
    )


def _packaged(
    manifest: CorpusManifest, packages: Path | None, allow_missing: bool, progress: Progress
) -> tuple[list[Passage], tuple[Missing, ...]]:
    found: list[Passage] = []
    missing: list[Missing] = []
    with (
        _directory(packages) as directory,
        progress.task("reading packages", len(manifest.sources), "packages") as task,
    ):
        for source in manifest.sources:
            path = locate(source, directory) if packages else download(source, directory)
            if isinstance(path, Missing):
                missing.append(path)
            else:
                found += passages_of(source, path, manifest.seed)
            task.advance(1, source.name)
    if missing and not allow_missing:
        raise ToolError(
            f"these packages cannot be had: {_by_reason(missing)}",
            remedy="Download their files where there is a network and give --from DIR, or build a "
            "smaller set with --allow-missing --out FILE.",
        )
    return found, tuple(missing)


def _by_reason(missing: list[Missing]) -> str:
    """Packages by their client, with what the client said of the first."""
    groups: dict[str, list[Missing]] = {}
    for gap in missing:
        groups.setdefault(gap.source.client, []).append(gap)
    return "; ".join(
        ", ".join(f"{gap.source.name} {gap.source.version}" for gap in gaps)
        + f" ({gaps[0].reason})"
        for gaps in groups.values()
    )


@contextmanager
def _directory(packages: Path | None) -> Iterator[Path]:
    if packages is None:
        with tempfile.TemporaryDirectory(prefix="so8tqc-") as scratch:
            yield Path(scratch)
    elif packages.is_dir():
        yield packages
    else:
        raise ConfigError("no such directory", where=str(packages))


def _record(
    content: bytes,
    result: Result,
    path: Path,
    missing: tuple[Missing, ...],
    watch: Stopwatch,
    *,
    built: bool,
) -> Record:
    languages = ", ".join(
        f"{sum(cells.values())} {language}" for language, cells in sorted(result.counts.items())
    )
    notices = [
        f"{result.samples} samples ({languages}) {'were built' if built else 'were already here'}: "
        f"{path}"
    ]
    notices += [f"Without {gap.source.name}: {gap.reason}." for gap in missing]
    return Record(
        kind="data",
        verdict=Verdict.PASS,
        metrics=DataMetrics(
            samples=result.samples,
            bytes=len(content),
            gzip_bytes=len(gzip.compress(content, mtime=0)),
            counts={key: dict(value) for key, value in result.counts.items()},
        ).as_json(),
        notices=tuple(notices),
        outputs={"texts": file_ref(path)},
        versions=versions_of(__name__),
        run=watch.info(),
    )
