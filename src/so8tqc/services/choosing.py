"""Choose: quantize to several types, compare them in one pass, recommend one.

With a budget (mean KL, same top token, size) mixtures of types are searched, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8tqc.artifacts import TEMPORARY_SUFFIX, file_ref, make_directory
from so8tqc.config import ChooseConfig, QuantizeConfig
from so8tqc.llama.gguf_file import GGUFFile, open_gguf
from so8tqc.llama.mixture import differing_tensors
from so8tqc.llama.speed import Speed, measure_speeds
from so8tqc.metrics.divergence import TokenTable
from so8tqc.progress import SILENT, Progress
from so8tqc.records import (
    Check,
    FileRef,
    Record,
    Stopwatch,
    jsonable,
    judge,
    overall,
    versions,
)
from so8tqc.reports import format as fmt
from so8tqc.services.choosing_ladder import inversions
from so8tqc.services.choosing_models import Evaluation
from so8tqc.services.choosing_rows import Budget, Row, budget_of, measured_row
from so8tqc.services.choosing_search import (
    Mixture,
    Search,
    override_patterns,
    quantized_types,
    search,
)
from so8tqc.services.judging import Bootstrap, effect_check
from so8tqc.services.pairwise import compare_candidates
from so8tqc.services.quantize import quantize
from so8tqc.services.quantize_recipe import stem

DEFAULT_TOP1 = 0.9
"""Without a budget the smallest file is recommended that keeps the reference's most likely token
in nine of ten places."""

_PROMPT_TOKENS, _NEW_TOKENS = 256, 32


def choose(config: ChooseConfig, progress: Progress = SILENT) -> Record:
    """Compare quantizations of one file and recommend one of them.

    Record metrics: ``rows``: type → ``choosing_rows.Row`` with ``type``, ``path``,
    ``bits_per_weight``; ``files``: as in the record of ``quantize``; ``recommended``,
    ``reason``; ``budget``; ``comparisons``: see ``services.pairwise``; ``inversions``: see
    ``services.choosing_ladder``; ``search``: {low, high, tried, sensitivity, ended, evaluations}
    where a budget was given; ``texts``, ``tokens``. ``run.measured.speed``: type →
    {prompt, generation: {median, low, high} tokens per second}, with threads and lengths.

    Checks: those of ``quantize`` for every file that is kept; ``effect.kl`` and, of the
    recommended file, ``effect.survival`` if there are rotations; ``budget.kl``, ``budget.top1``,
    ``budget.size`` of the recommended (or best found) file; ``choose.recipe``: a chosen mixture,
    quantized anew by its recipe, is what was evaluated.

    Raises:
        InputError: models, rotations, texts or types are unusable.
        ToolError: no libllama, it failed, or the disk is full.
    """
    watch = Stopwatch()
    make_directory(config.out)
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
    files: dict[str, dict[str, Any]]
    paths: dict[str, Path]
    checks: list[Check]
    outputs: dict[str, FileRef]


def _choose(
    config: ChooseConfig, evaluation: Evaluation, watch: Stopwatch, progress: Progress
) -> Record:
    bootstrap = Bootstrap(config.resamples, config.seed)
    budget = budget_of(config)
    made = quantize(_quantize_config(config), progress)
    state = _State({}, {}, _entries(made), {}, list(made.checks), dict(made.outputs))
    state.paths = {name: Path(entry["path"]) for name, entry in state.files.items()}
    found = evaluation.tables(state.paths, progress, against_base=True)
    state.tables = found.to_reference
    for name, path in state.paths.items():
        state.rows[name] = measured_row(
            path.stat().st_size, found.to_reference[name], found.to_base.get(name), bootstrap
        )
    if found.effect is not None:
        state.checks.append(effect_check(found.effect, None, bootstrap))
    source = open_gguf(config.gguf)
    inverted = inversions(
        state.rows, state.files, compare_candidates(state.tables, bootstrap), source
    )
    searched = None
    if config.has_budget:
        searched = _search(config, evaluation, budget, state, bootstrap, progress)
    recommended, reason = _recommend(state.rows, budget, config, searched)
    state.checks += _verdicts(state.rows[recommended], recommended, budget, config)
    speed = _speed(config, evaluation, state.paths, progress)
    tables = {name: state.tables[name] for name in state.rows}
    first = next(iter(tables.values()))
    metrics: dict[str, object] = {
        "rows": {
            name: {**row, **_facts(state.files[name], state.paths[name])}
            for name, row in sorted(state.rows.items(), key=lambda item: item[1]["bytes"])
        },
        "files": {path.name: state.files[name] for name, path in state.paths.items()},
        "recommended": recommended,
        "reason": reason,
        "inversions": inverted,
        "comparisons": compare_candidates(tables, bootstrap),
        "texts": len(first.texts),
        "tokens": len(first),
    }
    if config.has_budget:
        metrics["budget"] = str(budget)
    if searched is not None:
        metrics["search"] = _search_metrics(searched, config)
    notices = [reason, *(inversion["sentence"] for inversion in inverted), *made.notices]
    if searched is not None:
        notices.insert(1, searched.ended)
    return Record(
        kind="choose",
        verdict=overall(state.checks),
        checks=tuple(state.checks),
        metrics={key: jsonable(value) for key, value in metrics.items()},
        notices=tuple(notices),
        inputs=_inputs(config, made),
        outputs=state.outputs,
        config=config.model_dump(mode="json"),
        versions=versions("torch", "transformers", "llama-cpp-python", "gguf", "numpy"),
        run=watch.info().model_copy(update={"measured": {"speed": jsonable(speed)}}),
    )


def _quantize_config(config: ChooseConfig, **changes: object) -> QuantizeConfig:
    fields = {name: getattr(config, name) for name in QuantizeConfig.model_fields}
    return QuantizeConfig(**{**fields, **changes})


def _entries(made: Record) -> dict[str, dict[str, Any]]:
    """Type → entry of a quantize record's files."""
    files: Any = made.metrics["files"]
    return {str(entry["type"]): entry for entry in files.values()}


def _facts(entry: Mapping[str, Any], path: Path) -> dict[str, object]:
    return {
        "type": entry["type"],
        "path": str(path),
        "bits_per_weight": entry["bits_per_weight"],
        "types": entry["types"],
    }


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
        return {
            name: measured_row(
                path.stat().st_size, found.to_reference[name], found.to_base.get(name), bootstrap
            )
            for name, path in files.items()
        }

    ladder = {name: open_gguf(path) for name, path in state.paths.items()}
    left = config.max_evaluations - len(ladder)
    with tempfile.TemporaryDirectory(dir=config.out, suffix=TEMPORARY_SUFFIX) as folder:
        found = search(ladder, state.rows, budget, evaluate, Path(folder), left)
        if found.mixture is not None:
            _make(found.mixture, ladder, config, state, Path(folder), progress)
            name = mixture_name(found.mixture)
            state.rows[name] = found.mixture.row
            state.tables[name] = tables[found.mixture.path]
    return found


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
    (entry,) = _entries(made).values()
    written = Path(entry["path"])
    differing = list(differing_tensors(mixture.path, written))
    path = config.out / f"{stem(config.gguf)}-{name}.gguf"
    written.replace(path)
    state.files[name] = {**entry, "path": str(path), "recipe": _recipe(mixture, patterns)}
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


def _recipe(mixture: Mixture, patterns: tuple[str, ...]) -> dict[str, object]:
    """The options of ``so8tqc quantize`` that make the file."""
    return {"type": mixture.low, "tensor_types": patterns, "words": mixture.recipe}


def _recommend(
    rows: Mapping[str, Row], budget: Budget, config: ChooseConfig, searched: Search | None
) -> tuple[str, str]:
    """The recommended (or best found) file and the reason, a sentence."""
    if searched is None:
        asked = Budget(None, DEFAULT_TOP1, None, by_interval=False)
        wanted = f"the reference's top token in at least {fmt.percent(DEFAULT_TOP1)} of places"
        tried = len(rows)
    else:
        asked, tried = budget, len(searched.tried)
        wanted = f"the budget ({budget})"
    meeting = [name for name, row in rows.items() if not asked.missed(row)]
    if not meeting:
        name = min(rows, key=lambda name: (len(asked.missed(rows[name])), rows[name]["kl_mean"]))
        missed = "; ".join(asked.missed(rows[name]))
        return name, (
            f"None of the {fmt.counted(tried, 'file')} tried keeps {wanted}; the nearest is "
            f"{name}: {_quality(rows[name])}. It misses: {missed}."
        )
    if config.has_budget and not budget.asks_quality:
        name = min(meeting, key=lambda name: rows[name]["kl_mean"])
        what = f"the lowest KL of the {fmt.counted(tried, 'file')} tried within {wanted}"
    else:
        name = min(meeting, key=lambda name: rows[name]["bytes"])
        what = f"the smallest of the {fmt.counted(tried, 'file')} tried that keeps {wanted}"
    return name, f"{name} is recommended: {what}; {_quality(rows[name])}."


def _quality(row: Row) -> str:
    interval = row["kl_ci95"]
    span = "" if interval is None else f" ({interval[0]:.3g} … {interval[1]:.3g})"
    return (
        f"{fmt.size(row['bytes'])}, mean KL {row['kl_mean']:.3g}{span}, "
        f"same top {fmt.percent(row['top1'])}"
    )


def _verdicts(row: Row, name: str, budget: Budget, config: ChooseConfig) -> list[Check]:
    """What the recommended or best found file is judged by."""
    checks = []
    if budget.max_kl is not None:
        detail = f"Mean KL to the reference of the file chosen, by the {config.judge_by}."
        checks.append(
            judge("budget.kl", budget.kl(row), budget.max_kl, subject=name, unit="nats",
                  ci95=row["kl_ci95"], detail=detail)
        )  # fmt: skip
    if budget.min_top1 is not None:
        detail = f"Share of the reference's top tokens that are kept, by the {config.judge_by}."
        checks.append(
            judge("budget.top1", budget.top1(row), budget.min_top1, comparison=">=", subject=name,
                  ci95=row["top1_ci95"], detail=detail)
        )  # fmt: skip
    if budget.max_bytes is not None:
        checks.append(
            judge("budget.size", row["bytes"], budget.max_bytes, subject=name, unit="bytes",
                  detail="Size of the file chosen.")
        )  # fmt: skip
    if "survival" in row:
        detail = "Upper end of KL to the gated model minus KL to the base: negative if the gate "
        checks.append(
            judge("effect.survival", row["survival"], 0.0, comparison="<", subject=name,
                  unit="nats", detail=detail + "survives in the file.")
        )  # fmt: skip
    return checks


def _speed(
    config: ChooseConfig, evaluation: Evaluation, paths: Mapping[str, Path], progress: Progress
) -> dict[str, object]:
    import os

    tokens = evaluation.sample[: _PROMPT_TOKENS + _NEW_TOKENS]
    new_tokens = min(_NEW_TOKENS, tokens.size // 2)
    rates: dict[str, Speed] = measure_speeds(
        paths, tokens, new_tokens=new_tokens, repeats=config.repeats, threads=config.threads,
        progress=progress,
    )  # fmt: skip
    return {
        "files": rates,
        "prompt_tokens": int(tokens.size) - new_tokens,
        "new_tokens": new_tokens,
        "repeats": config.repeats,
        "threads": config.threads,
        "cores": os.cpu_count(),
    }


def _search_metrics(searched: Search, config: ChooseConfig) -> dict[str, object]:
    mixture = searched.mixture
    return {
        "low": searched.low,
        "high": searched.high,
        "tried": searched.tried,
        "sensitivity": searched.sensitivity,
        "mixture": None if mixture is None else mixture_name(mixture),
        "ended": searched.ended,
        "evaluations": len(searched.tried),
        "max_evaluations": config.max_evaluations,
    }


def _inputs(config: ChooseConfig, made: Record) -> dict[str, FileRef]:
    inputs = dict(made.inputs)
    for name in ("reference", "base", "rotations"):
        if (path := getattr(config, name)) is not None:
            inputs[name] = file_ref(path)
    return inputs
