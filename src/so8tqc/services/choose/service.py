"""Choose: quantize to several types, compare them in one pass, recommend one.

With a budget (mean KL, same top token, size) mixtures of types are searched, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from so8tqc.closure import versions_of
from so8tqc.config import ChooseConfig, QuantizeConfig
from so8tqc.disk.atomic import temporary_directory
from so8tqc.disk.digests import file_ref
from so8tqc.disk.locks import claim_folder, exclusive
from so8tqc.disk.parts import bytes_of
from so8tqc.disk.system import publish
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.gguf.mixture import differing_tensors
from so8tqc.metrics.divergence import TokenTable
from so8tqc.progress import SILENT, Progress
from so8tqc.record_kinds.choose import ChooseMeasured, ChooseMetrics, Row, Searched
from so8tqc.record_kinds.quantize import Mixture as CurvatureMixture
from so8tqc.record_kinds.quantize import QuantizedFile, QuantizeMetrics, Recipe
from so8tqc.records import (
    Check,
    FileRef,
    Record,
    Stopwatch,
    judge,
    overall,
)
from so8tqc.services.choose.budget import Budget, budget_of, verdicts
from so8tqc.services.choose.curvature import (
    Made,
    Measured,
    best_of_size,
    smallest_of_quality,
)
from so8tqc.services.choose.evaluation import Evaluation, Tables
from so8tqc.services.choose.inversions import inversions
from so8tqc.services.choose.patterns import quantized_types
from so8tqc.services.choose.recommend import recommend, speeds
from so8tqc.services.choose.rows import (
    as_recorded,
    described,
    files_by_type,
    measured_row,
    scope,
    written_paths,
)
from so8tqc.services.choose.search import Mixture, Search, search, tried_file
from so8tqc.services.qc.judging import Bootstrap, effect_check
from so8tqc.services.qc.pairwise import compare_candidates
from so8tqc.services.quantize.mixture import require_tools_to_choose
from so8tqc.services.quantize.patterns import override_patterns
from so8tqc.services.quantize.recipe import stem
from so8tqc.services.quantize.service import quantize
from so8tqc.sources.inputs.hub import with_local_paths


@exclusive(claim_folder)
def choose(config: ChooseConfig, progress: Progress = SILENT) -> Record:
    """Compare quantizations of one file and recommend one of them.

    Record metrics: :class:`so8tqc.record_kinds.choose.ChooseMetrics`; ``run.measured``:
    :class:`so8tqc.record_kinds.choose.ChooseMeasured`.

    Checks: those of ``quantize`` for every file that is kept; ``effect.kl`` and, of the
    recommended file, ``effect.survival`` if there are rotations; ``budget.kl``, ``budget.top1``,
    ``budget.size`` of the recommended (or best found) file; ``choose.recipe``: a chosen mixture,
    quantized anew by its recipe, is what was evaluated.

    Raises:
        InputError: models, rotations, texts or types are unusable.
        ToolError: no libllama, it failed, or the disk is full.
    """
    watch = Stopwatch()
    config = with_local_paths(config, progress)
    if config.solver == "hessian" and config.has_budget:
        require_tools_to_choose(config)
    evaluation = Evaluation(config)
    try:
        return _choose(config, evaluation, watch, progress)
    finally:
        evaluation.close()


@dataclass
class _State:
    """What is known so far, by type."""

    rows: dict[str, Row]
    tables: dict[str, TokenTable]
    files: dict[str, QuantizedFile]
    paths: dict[str, Path]
    checks: list[Check]
    outputs: dict[str, FileRef]


def _choose(
    config: ChooseConfig, evaluation: Evaluation, watch: Stopwatch, progress: Progress
) -> Record:
    bootstrap = Bootstrap(config.resamples, config.seed)
    budget = budget_of(config)
    made = quantize(_quantize_config(config), progress)
    state = _State({}, {}, files_by_type(made), {}, list(made.checks), dict(made.outputs))
    state.paths = written_paths(state.files)
    found = evaluation.tables(state.paths, progress, against_base=True)
    state.tables, state.rows = found.to_reference, _rows(state.paths, found, bootstrap)
    if found.effect is not None:
        state.checks.append(effect_check(found.effect, None, bootstrap))
    source = open_gguf(config.gguf)
    compared = compare_candidates(state.tables, bootstrap)
    inverted = inversions(state.rows, as_recorded(state.files), compared, source)
    searched = None
    if config.has_budget:
        searched = _search(config, evaluation, budget, state, bootstrap, progress)
        if searched.name is not None:  # one candidate more
            compared = compare_candidates(state.tables, bootstrap)
    tried = len(state.rows) if searched is None else len(searched.tried)
    recommended, reason = recommend(state.rows, budget, config, tried)
    state.checks += verdicts(state.rows[recommended], recommended, budget, config)
    speed = speeds(
        state.paths,
        evaluation.sample,
        repeats=config.repeats,
        threads=config.threads,
        progress=progress,
    )
    texts, tokens = scope(state.tables)
    metrics = ChooseMetrics(
        rows=described(state.rows, state.files),
        files={path.name: state.files[name] for name, path in state.paths.items()},
        recommended=recommended,
        reason=reason,
        inversions=inverted,
        comparisons=compared,
        texts=texts,
        tokens=tokens,
        budget=str(budget) if config.has_budget else None,
        search=None if searched is None else _search_metrics(searched, config),
    )
    notices = [reason, *(inversion["sentence"] for inversion in inverted), *made.notices]
    notices += evaluation.notices
    if searched is not None:
        notices.insert(1, searched.ended)
    return Record(
        kind="choose",
        verdict=overall(state.checks),
        checks=tuple(state.checks),
        metrics=metrics.as_json(),
        notices=tuple(notices),
        inputs=_inputs(config, made),
        outputs=state.outputs,
        config=config.model_dump(mode="json"),
        versions=versions_of(__name__),
        run=watch.info().model_copy(update={"measured": ChooseMeasured(speed=speed).as_json()}),
    )


def _rows(files: Mapping[str, Path], found: Tables, bootstrap: Bootstrap) -> dict[str, Row]:
    return {
        name: measured_row(
            bytes_of(path), found.to_reference[name], found.to_base.get(name), bootstrap
        )
        for name, path in files.items()
    }


def _quantize_config(config: ChooseConfig, **changes: object) -> QuantizeConfig:
    fields = {name: getattr(config, name) for name in QuantizeConfig.model_fields}
    return QuantizeConfig(**{**fields, "max_size": None, **changes})


def _search(
    config: ChooseConfig,
    evaluation: Evaluation,
    budget: Budget,
    state: _State,
    bootstrap: Bootstrap,
    progress: Progress,
) -> Search:
    tables: dict[Path, TokenTable] = {}

    def evaluate(files: Mapping[str, Path], against_base: bool) -> dict[str, Row]:
        found = evaluation.tables(files, progress, against_base=against_base)
        tables.update({files[name]: table for name, table in found.to_reference.items()})
        return _rows(files, found, bootstrap)

    if config.solver == "hessian":
        return _search_by_curvature(config, budget, state, evaluate, tables, progress)
    ladder = {name: open_gguf(path) for name, path in state.paths.items()}
    left = config.max_evaluations - len(ladder)
    with temporary_directory(config.out / "mixtures") as folder:
        found = search(ladder, state.rows, budget, evaluate, folder, left)
        if found.mixture is not None:
            _make(found.mixture, ladder, config, state, folder, progress)
            name = found.name = mixture_name(found.mixture)
            state.rows[name] = found.mixture.row
            state.tables[name] = tables[found.mixture.path]
    return found


def _search_by_curvature(
    config: ChooseConfig,
    budget: Budget,
    state: _State,
    evaluate: Callable[[Mapping[str, Path], bool], dict[str, Row]],
    tables: Mapping[Path, TokenTable],
    progress: Progress,
) -> Search:
    found = Search(
        tried=[tried_file(n, "type", row, budget.missed(row)) for n, row in state.rows.items()]
    )
    left = config.max_evaluations - len(state.rows)
    if left < 1:
        found.ended = "No evaluations are left for mixtures."
        return found
    label = min(state.rows, key=lambda name: state.rows[name]["bytes"])
    with temporary_directory(config.out / "mixtures") as folder:

        def made(**changes: object) -> tuple[Made, QuantizeMetrics]:
            out = folder / str(len(found.tried))
            weighing = {
                name: Path(state.outputs[name].path)
                for name in ("imatrix", "hessians")
                if name in state.outputs
            }
            options = {"types": (label,), "out": out, **weighing, **changes}
            record = quantize(_quantize_config(config, **options), progress)
            (entry,) = files_by_type(record).values()
            metrics = QuantizeMetrics.of(record)
            return Made(Path(str(entry.path)), entry, record.checks), metrics

        def first(limit: int) -> tuple[Made, CurvatureMixture]:
            one, metrics = made(max_size=limit)
            assert metrics.mixture is not None  # the size was asked for
            return one, metrics.mixture

        def of_types(types: Mapping[str, str]) -> Made:
            patterns = override_patterns(types)
            one, _ = made(tensor_types=patterns)
            words = "types by curvature"
            recipe = Recipe(type=label, tensor_types=list(patterns), words=words)
            return replace(one, entry=one.entry.model_copy(update={"recipe": recipe}))

        def measure(one: Made) -> Row:
            return evaluate({"mixture": one.path}, True)["mixture"]

        if budget.asks_quality:
            source = open_gguf(config.gguf)
            best = smallest_of_quality(
                state.rows, state.files, budget, source, first, of_types, measure, found, left
            )
        else:
            assert budget.max_bytes is not None  # a budget that asks neither is none
            best = best_of_size(budget.max_bytes, first, measure, budget, found)
        if best is not None:
            _keep(best, label, config, state, tables[best.made.path])
            found.low = found.high = label
            found.name = f"{label}-mixed"
    return found


def _keep(
    best: Measured, label: str, config: ChooseConfig, state: _State, table: TokenTable
) -> None:
    """Give a mixture its place beside the types' files."""
    name = f"{label}-mixed"
    path = config.out / f"{stem(config.gguf)}-{name}.gguf"
    publish(best.made.path, path)
    state.rows[name], state.tables[name] = best.row, table
    state.files[name] = best.made.entry.model_copy(update={"path": str(path)})
    state.paths[name], state.outputs[name] = path, file_ref(path)
    state.checks += [check.model_copy(update={"subject": path.name}) for check in best.made.checks]


def mixture_name(mixture: Mixture) -> str:
    """What a chosen mixture is called beside the types."""
    return f"{mixture.low}-mixed"


def _make(
    mixture: Mixture,
    ladder: Mapping[str, GGUFFile],
    config: ChooseConfig,
    state: _State,
    folder: Path,
    progress: Progress,
) -> None:
    """Quantize the chosen mixture by its recipe, and see that it is what was evaluated."""
    types = quantized_types(ladder[mixture.low], ladder[mixture.high], mixture.raised)
    patterns = override_patterns(types)
    importance = state.outputs.get("imatrix")
    made = quantize(
        _quantize_config(
            config,
            types=(mixture.low,),
            tensor_types=(*config.tensor_types, *patterns),
            out=folder / "recipe",
            imatrix=Path(importance.path) if importance else config.imatrix,
        ),
        progress,
    )
    name = mixture_name(mixture)
    (entry,) = files_by_type(made).values()
    written = Path(str(entry.path))
    differing = list(differing_tensors(mixture.path, written))
    path = config.out / f"{stem(config.gguf)}-{name}.gguf"
    publish(written, path)
    recipe = Recipe(type=mixture.low, tensor_types=list(patterns), words=mixture.recipe)
    state.files[name] = entry.model_copy(update={"path": str(path), "recipe": recipe})
    state.paths[name] = path
    state.outputs[name] = file_ref(path)
    state.checks += [check.model_copy(update={"subject": path.name}) for check in made.checks]
    state.checks.append(
        judge(
            "choose.recipe",
            len(differing),
            0,
            subject=path.name,
            detail="Quantized by its recipe, every tensor is the one that was evaluated."
            if not differing
            else f"Other bytes than were evaluated in {', '.join(differing[:5])}.",
        )
    )


def _search_metrics(searched: Search, config: ChooseConfig) -> Searched:
    made: Searched = {
        "low": searched.low,
        "high": searched.high,
        "tried": searched.tried,
        "sensitivity": searched.sensitivity,
        "mixture": searched.name,
        "ended": searched.ended,
        "evaluations": len(searched.tried),
        "max_evaluations": config.max_evaluations,
    }
    if searched.prediction is not None:
        made["prediction"] = searched.prediction
    return made


def _inputs(config: ChooseConfig, made: Record) -> dict[str, FileRef]:
    inputs = dict(made.inputs)
    for name in ("reference", "base", "rotations"):
        if (path := getattr(config, name)) is not None:
            inputs[name] = file_ref(path)
    return inputs
