"""What a ``qc`` runs: the models, which are compared with which, and the texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from so8tqc.adapters.plan import AdapterPlan
from so8tqc.checkpoints.plan import DTYPE_NAMES
from so8tqc.config import QCConfig
from so8tqc.errors import ConfigError, InputError
from so8tqc.gguf.file import is_gguf, open_gguf
from so8tqc.metrics.divergence import TokenTable
from so8tqc.progress import Progress
from so8tqc.record_kinds.qc import Sequential
from so8tqc.records import Check
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.services.adapter_bake import write_adapted
from so8tqc.services.chat_template import template_checks
from so8tqc.services.qc.compatibility import ids_of, require_same_tokens
from so8tqc.services.qc.evaluations import Evaluations, Kept, of_earlier_calls
from so8tqc.services.qc.judging import Bootstrap
from so8tqc.services.qc.planned import (
    ARITHMETIC,
    BASE,
    FLOOR,
    GATED,
    REFERENCE,
    Planned,
    base_of,
    floor_name,
    fold_name,
    input_directory,
    kv_types_of,
)
from so8tqc.services.qc.quantization_floor import Floors
from so8tqc.services.qc.readings import FileModels, readings_of
from so8tqc.services.qc.texts import prepared_texts
from so8tqc.services.qc.trained_on import base_of_training
from so8tqc.services.qc.until import compare_until
from so8tqc.services.trained_base import trained_base
from so8tqc.sources.capture import (
    Capture,
    CaptureSource,
    RoundedSource,
    check_same_tokens,
    cut,
    with_pictures,
)
from so8tqc.sources.compare import Pair, compare
from so8tqc.sources.embedding import with_embedded
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.gguf import GGUFSource, open_each
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.inputs.prepared import Prepared, prepare
from so8tqc.sources.inputs.texts import load_tokenizer
from so8tqc.sources.layerwise.choice import (
    Model,
    ModelLoader,
    folded_source,
    gated_source,
    plain_source,
)
from so8tqc.sources.layerwise.model import StreamedSource
from so8tqc.sources.protocol import EncodedText, LogitSource
from so8tqc.sources.routing import Routed
from so8tqc.sources.unmerged import load_unmerged, require_peft, unmerged_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYERS = ".layers"
"""Folder of an output in which models that are run a layer at a time keep hidden states."""

_F16_ROUNDOFF = 2.0**-11
"""Error of a router's scores in libllama, as a share of the largest: it caches keys and values, and
multiplies, in F16."""

_FLOAT32_SHARE = 2.0**-20
"""The same of float32, whose unit roundoff is 2⁻²⁴, over a few layers."""


@dataclass(frozen=True)
class Comparison:
    """The token tables of one pass over the texts.

    Attributes:
        tables: (reference, candidate) → table, by the names of this module and the candidates'.
        file_types: GGUF candidate → how it is quantized.
        witness: the model that noise floors are measured from: the reference, or base plus
            gates where the reference is a capture.
        dtypes: model directory → dtype it stores the fold in.
        texts: what was scored.
        failed: GGUF candidate that libllama cannot load → why; it is in no table.
        by_weights: GGUF candidate → the name under which its weights alone were run, by
            transformers; its own where libllama did not run it.
        notices: what is to be said of the texts.
        kv_types: candidate that is run with another cache → its type.
        sequential: how texts were taken, with ``until``.
        kept: pairs whose tables an earlier call computed (``services.qc.evaluations``).
    """

    tables: Mapping[Pair, TokenTable]
    file_types: Mapping[str, str]
    witness: str
    dtypes: Mapping[str, str]
    texts: tuple[EncodedText, ...]
    failed: Mapping[str, str]
    by_weights: Mapping[str, str]
    notices: tuple[str, ...]
    kv_types: Mapping[str, str]
    sequential: Sequential | None
    kept: Mapping[Pair, Kept] = field(default_factory=dict)

    def floor(self, name: str) -> TokenTable | None:
        """What correct rounding to a candidate's storage dtype costs by itself."""
        dtype = self.dtypes.get(name)
        return None if dtype is None else self.tables[(self.witness, fold_name(dtype))]

    def quantization_floor(self, name: str) -> TokenTable | None:
        """What a quantized candidate's types cost an honest encoder; None if it was not run."""
        return self.tables.get((REFERENCE, floor_name(name)))

    @property
    def worst_floor(self) -> TokenTable | None:
        """The largest of the candidates' floors."""
        floors = [
            self.tables[(self.witness, fold_name(dtype))] for dtype in set(self.dtypes.values())
        ]
        return max(floors, key=lambda table: float(table.columns["kl"].mean()), default=None)

    @property
    def arithmetic(self) -> TokenTable | None:
        """What folding costs without any rounding of weights."""
        return self.tables.get((self.witness, ARITHMETIC))


def run_models(
    config: QCConfig,
    names: Mapping[str, Path],
    rotations: RotationSet | None,
    capture: Capture | None,
    dtypes: Mapping[str, str],
    progress: Progress,
    plan: AdapterPlan | None = None,
    beside: Floors | None = None,
) -> Comparison:
    """Run every model once over the texts; but those of which everything is kept.

    Args:
        config: of the ``qc``.
        names: candidates, see :func:`names_of`.
        rotations: of the reference, if it is base plus gates.
        capture: the reference, if it was recorded.
        dtypes: model directory among the candidates → dtype it stores the fold in.
        progress: told about the texts.
        plan: what adapters make of the base, if the reference has some.
        beside: floors of the quantized candidates, which are run as the candidates are.

    Raises:
        InputError: texts, tokenizer or models are unusable or do not belong together.
        ConfigError: a protocol that a capture cannot serve.
    """
    texts, notices = prepared_of(config, capture)
    adapters = () if plan is None else tuple(files.directory for files in plan.adapters)
    loader = _loader(config, names, adapters)
    caches = kv_types_of(config, names)
    readings = readings_of(config, names, caches, loader)
    with_floor = () if beside is None else beside.names
    planned = Planned(
        config, names, rotations, capture, adapters, dtypes, readings, caches, with_floor
    )
    pairs = planned.pairs()

    def look() -> Evaluations:
        return of_earlier_calls(planned, texts, streams=loader.streams, computes=__name__)

    earlier = look()
    kept = earlier.find(pairs)
    missing = [pair for pair in pairs if pair not in kept]
    floors = [name for name in with_floor if (REFERENCE, floor_name(name)) in missing]
    ran = _Ran({}, texts, None, {})
    with ExitStack() as stack:
        encoded = stack.enter_context(beside.written(floors)) if beside and floors else {}
        unencoded = {floor_name(name) for name in floors if name not in encoded}
        missing = [pair for pair in missing if pair[1] not in unencoded]
        if missing:
            exact = stack.enter_context(_floors(plan, dtypes, missing, progress))

            def build() -> _Models:
                return _sources(planned, missing, exact, encoded, loader)

            ran = _run(config, build, loader, texts, names, progress)
    tables = {**ran.tables, **{pair: one.table for pair, one in kept.items()}}
    if ran.tables and not ran.failed and look().is_of_the_same(earlier):
        earlier.keep(ran.tables)
    return Comparison(
        tables=_alike(tables, kept),
        file_types={name: open_gguf(path).file_type for name, path in _ggufs(names, ran.failed)},
        witness=planned.witness,
        dtypes=dtypes,
        texts=ran.texts,
        failed=ran.failed,
        by_weights={
            name: reading.by_weights
            for name, reading in readings.items()
            if reading.by_weights is not None
        },
        notices=(*notices, *dict.fromkeys(loader.notices), *earlier.notices),
        kv_types=caches,
        sequential=ran.sequential,
        kept=kept,
    )


class _Ran(NamedTuple):
    """What running gave: tables, the texts they are of, how these were taken, and failures."""

    tables: Mapping[Pair, TokenTable]
    texts: tuple[EncodedText, ...]
    sequential: Sequential | None
    failed: Mapping[str, str]


def _run(
    config: QCConfig,
    build: Callable[[], _Models],
    loader: ModelLoader,
    texts: tuple[EncodedText, ...],
    names: Mapping[str, Path],
    progress: Progress,
) -> _Ran:
    made = loader.built(build, lambda made: made.sources, texts, progress)
    sources, pairs = made.sources, made.pairs
    try:
        texts = with_embedded(texts, sources, lambda: load_model(config, input_directory(config)))
        tables, texts, sequential = _compared(config, sources, pairs, texts, names, progress)
    finally:
        for source in sources:
            source.close()
    loader.finished()
    return _Ran(tables, texts, sequential, made.failed)


def _alike(
    tables: Mapping[Pair, TokenTable], kept: Mapping[Pair, Kept]
) -> Mapping[Pair, TokenTable]:
    """Tables of one call mark the same ties: those that were kept saw the witness and its fold."""
    marks = [one.table.tie for one in kept.values() if one.table.tie is not None]
    if not marks:
        return tables
    return {pair: replace(table, tie=marks[0]) for pair, table in tables.items()}


def _compared(
    config: QCConfig,
    sources: Sequence[LogitSource],
    pairs: Sequence[Pair],
    texts: tuple[EncodedText, ...],
    names: Mapping[str, Path],
    progress: Progress,
) -> tuple[Mapping[Pair, TokenTable], tuple[EncodedText, ...], Sequential | None]:
    """All texts, or with ``until`` as many as it takes; the tables, and the texts they are of."""

    routed = _routed(sources)

    def compare_some(some: Sequence[EncodedText]) -> dict[Pair, TokenTable]:
        return compare(sources, pairs, some, progress, "comparing logits", routed)

    if not pairs:
        return {}, texts, None
    if config.until is None:
        return compare_some(texts), texts, None
    judged = [(REFERENCE, name) for name in names if (REFERENCE, name) in pairs]
    bootstrap = Bootstrap(config.resamples, config.seed)
    return compare_until(compare_some, judged, texts, config.until, bootstrap)


def _routed(sources: Sequence[LogitSource]) -> Routed:
    """Whose choices of experts are marked: the witness's, beside our own rounded fold's."""
    names = [source.name for source in sources]
    ours = [name for name in names if name.startswith(FLOOR) or name == ARITHMETIC]
    files = any(isinstance(source, GGUFSource) for source in sources)
    return Routed(
        GATED if GATED in names else REFERENCE,
        next(iter(ours), None),
        _F16_ROUNDOFF if files else _FLOAT32_SHARE,
    )


@dataclass
class _Models:
    """All sources of the pass, which are compared with which, and what could not be loaded."""

    sources: list[LogitSource]
    pairs: list[Pair]
    failed: Mapping[str, str]


def _ggufs(names: Mapping[str, Path], failed: Mapping[str, str]) -> list[tuple[str, Path]]:
    return [(n, path) for n, path in names.items() if is_gguf(path) and n not in failed]


def _loader(
    config: QCConfig,
    names: Mapping[str, Path],
    adapters: Sequence[Path],
) -> ModelLoader:
    """How model directories are loaded; adapters only resident."""
    stream = config.stream
    directories = [path for path in (base_of(config), *names.values()) if path.is_dir()]
    if adapters:
        stream = False
    loader = ModelLoader(
        config.out / LAYERS,
        stream=stream,
        directories=directories,
        dtype=config.compute_dtype,
        device_map=config.device_map,
    )
    if adapters and config.stream:
        loader.notices.append(
            "Adapters are run by PEFT, which needs the whole model: all models are held in memory."
        )
    return loader


def prepared_of(config: QCConfig, capture: Capture | None) -> Prepared:
    """The texts to compare on: the recorded ones if the reference is a capture."""
    if capture is None:
        return prepared_texts(config, lambda: _tokenizer(config))
    if config.protocol != "native" or config.ctx is not None:
        raise ConfigError(
            "a capture is compared on whole texts, as they were recorded",
            where="protocol, ctx",
            remedy="Leave --protocol and --ctx out, or give the model itself as reference.",
        )
    return Prepared(cut(capture.texts, config.max_tokens), ())


def recorded_pictures(config: QCConfig, capture: Capture | None) -> Capture | None:
    """The capture; where data are given, held against them, with their pictures.

    Raises:
        DataError: the data are not what was recorded.
    """
    if capture is None or "data" not in config.model_fields_set:
        return capture
    tokenizer = _tokenizer(config)
    data = prepare(config.data, tokenizer, None, images=config.images, chat=config.chat).texts
    check_same_tokens(capture, data)
    return with_pictures(capture, data)


def _sources(
    planned: Planned,
    wanted: Sequence[Pair],
    folds: Mapping[str, Path],
    encoded: Mapping[str, Path],
    loader: ModelLoader,
) -> _Models:
    """The sources of the pairs that are wanted, the reference first.

    Args:
        planned: all that could be run.
        wanted: the pairs.
        folds: our own bakes of adapters, by the names of their sources.
        encoded: quantized candidate → its floor.
        loader: loads the models.
    """
    config, rotations, capture = planned.config, planned.rotations, planned.capture
    used = {REFERENCE, *(name for pair in wanted for name in pair)}
    sources = reference_sources(
        config, capture, rotations, planned.adapters, loader, with_base=BASE in used
    )
    if planned.adapters:
        if GATED in used and capture is not None:
            unmerged = _unmerged(config, rotations, planned.adapters, GATED)
            sources.insert(1, RoundedSource(unmerged, capture.dtype))
        sources += [
            HFSource(load_model(config, folder), name)
            for name, folder in folds.items()
            if name in used
        ]
    elif rotations is not None:
        model = _shared(sources, config, loader)
        if GATED in used and capture is not None:
            gated = gated_source(model, rotations, GATED)
            sources.insert(1, RoundedSource(gated, capture.dtype))
        rounded = {fold_name(dtype): dtype for dtype in planned.dtypes.values()}
        sources += [
            folded_source(model, rotations, name, dtype)
            for name, dtype in {**rounded, ARITHMETIC: None}.items()
            if name in used
        ]
    made = _Models(sources, [], {})
    _add_candidates(made, planned, encoded, loader, used)
    there = _names(made.sources)
    made.pairs = [pair for pair in wanted if there.issuperset(pair)]
    return made


def _shared(sources: Sequence[LogitSource], config: QCConfig, loader: ModelLoader) -> Model:
    """The base model under the gates: of one of the sources, or loaded beside a capture."""
    for source in sources:
        if isinstance(source, HFSource | StreamedSource | GatedSource):
            return source.model
    return _loaded(config, base_of(config), loader)


def _names(sources: Iterable[LogitSource]) -> set[str]:
    return {source.name for source in sources}


def _add_candidates(
    made: _Models,
    planned: Planned,
    encoded: Mapping[str, Path],
    loader: ModelLoader,
    used: Collection[str],
) -> None:
    """The candidates' sources.

    Args:
        made: the reference's sources; the candidates are added.
        planned, encoded, loader: as of :func:`_sources`.
        used: names of the sources that are compared.
    """
    names, readings = planned.names, planned.readings
    by_libllama = {
        n: path for n, path in names.items() if n in readings and readings[n].by_libllama
    }
    files = {n: path for n, path in by_libllama.items() if n in used}
    floors = {floor_name(n): path for n, path in encoded.items() if n in by_libllama}
    loaded = open_each(files | floors, threads=planned.config.threads, kv_types=planned.kv_types)
    opened = {source.name: source for source in loaded.sources}
    made.failed = {name: str(error) for name, error in loaded.failed.items() if name in files}
    _check_tokens(planned.config, made.sources[0], opened.values())
    by_weights = FileModels(loader)
    for name, path in names.items():
        if name in loaded.failed:
            continue
        if name not in readings and name in used:
            made.sources.append(plain_source(loader.load(path), name))
        elif name in opened:
            made.sources.append(opened[name])
        reading = readings.get(name)
        if reading is not None and reading.by_weights in used:
            model = by_weights.load(path, reading.directory)
            made.sources.append(plain_source(model, str(reading.by_weights)))
        floor = floor_name(name)
        if floor in loaded.failed:
            loader.notices.append(f"{name} has no quantization floor: {loaded.failed[floor]}")
        elif floor in opened:
            made.sources.append(opened[floor])
        elif name in encoded and reading is not None and not reading.by_libllama:
            made.sources.append(
                plain_source(by_weights.load(encoded[name], reading.directory), floor)
            )


@contextmanager
def _floors(
    plan: AdapterPlan | None,
    dtypes: Mapping[str, str],
    wanted: Sequence[Pair],
    progress: Progress,
) -> Iterator[Mapping[str, Path]]:
    """Our own exact bakes of adapters, as directories that last as long as the comparison.

    One for each dtype that a candidate stores, which is its noise floor, and one in float32, which
    rounds nothing that float32 arithmetic does not. None without adapters, and none that no pair
    wants.
    """
    if plan is None:
        yield {}
        return
    all_of_them = {fold_name(dtype): dtype for dtype in dict.fromkeys(dtypes.values())}
    all_of_them[ARITHMETIC] = "float32"
    used = {name for pair in wanted for name in pair}
    with TemporaryDirectory(prefix="so8tqc-floor-") as root:
        folders = {}
        for name, dtype in all_of_them.items():
            if name not in used:
                continue
            folders[name] = Path(root) / name.replace(" ", "-")
            folders[name].mkdir()
            changed = tuple(replace(c, dtype=DTYPE_NAMES[dtype]) for c in plan.changed)
            rounded = replace(plan, changed=changed)
            write_adapted(plan.checkpoint, rounded, folders[name], progress)
        yield folders


def _unmerged(
    config: QCConfig, rotations: RotationSet | None, adapters: Sequence[Path], name: str
) -> HFSource | GatedSource:
    """Base and adapters, run by PEFT, with the gates in front."""
    with base_of_training(base_of(config), config.trained_on) as base:
        model = load_unmerged(
            base, adapters, dtype=config.compute_dtype, device_map=config.device_map
        )
    return unmerged_source(model, rotations, name)


def _check_tokens(config: QCConfig, reference: LogitSource, files: Iterable[GGUFSource]) -> None:
    """The tokens of GGUF files are those of the reference, by its file or by the tokenizer."""
    if not (files := list(files)):
        return
    if isinstance(reference, GGUFSource):
        whose, known = reference.path.name, ids_of(reference.pieces())
    else:
        try:
            tokenizer = _tokenizer(config)
        except InputError:  # a capture brings its token ids
            return
        whose, known = f"the tokenizer of {tokenizer.name_or_path}", tokenizer.get_vocab()
    for source in files:
        require_same_tokens(source.path, source.pieces(), known, whose)


@dataclass(frozen=True)
class Reference:
    """What the reference is made of.

    Attributes:
        config: of the ``qc``, its base a plain model directory (``services.trained_base``).
        rotations: of the reference, None without any.
        kept: tensor → dtype that a bake stores it in, where the directory has another.
    """

    config: QCConfig
    rotations: RotationSet | None
    kept: Mapping[str, str]
    plan: AdapterPlan | None = None
    """What adapters make of the base, if the reference has some: it then runs unmerged."""
    adapters: tuple[Path, ...] = ()


@contextmanager
def opened_reference(config: QCConfig, capture: Capture | None) -> Iterator[Reference]:
    """The reference's model directory and rotations, for as long as it is used.

    Raises:
        ConfigError: a base without a capture and rotations; rotations that leave facts open.
        InputError: rotations for a capture without a base, or unusable ones.
    """
    given = config.rotations is not None or bool(config.rotation_options.adapters)
    if config.base is not None and (capture is None or not given):
        raise ConfigError("base is for a capture as reference, together with rotations")
    if config.base is None and capture is not None and given:
        raise InputError(
            "rotations are applied to a model directory, not to a capture",
            where=str(config.reference),
            remedy="Give that directory too: --base MODEL.",
        )
    near = config.out / "trained"
    with trained_base(base_of(config), config.rotations, config.rotation_options, near) as trained:
        field = "reference" if config.base is None else "base"
        rotations = config.rotations if trained.adapters else trained.rotations
        update = {field: trained.directory, "rotations": rotations}
        if trained.adapters:
            require_peft()
        yield Reference(
            config.model_copy(update=update),
            trained.rotation_set(),
            trained.kept,
            trained.adapter_plan(),
            trained.adapters,
        )


def reference_sources(
    config: QCConfig,
    capture: Capture | None,
    rotations: RotationSet | None,
    adapters: Sequence[Path] = (),
    loader: ModelLoader | None = None,
    *,
    with_base: bool = True,
) -> list[LogitSource]:
    """The reference, then with rotations the base that they are applied to, if it is wanted.

    Without a loader models are resident.
    """
    if capture is None and is_gguf(config.reference):
        return [GGUFSource(config.reference, REFERENCE, threads=config.threads)]
    recorded = None if capture is None else CaptureSource(capture, REFERENCE)
    if adapters:
        trained = recorded or _unmerged(config, rotations, adapters, REFERENCE)
        base = [HFSource(load_model(config, base_of(config)), BASE)] if with_base else []
        return [trained, *base]
    if rotations is None:
        if recorded is not None:
            return [recorded]
        return [plain_source(_loaded(config, config.reference, loader), REFERENCE)]
    model = _loaded(config, base_of(config), loader)
    gated = recorded or gated_source(model, rotations, REFERENCE)
    return [gated, *([plain_source(model, BASE)] if with_base else [])]


def _loaded(config: QCConfig, path: Path, loader: ModelLoader | None) -> Model:
    return load_model(config, path) if loader is None else loader.load(path)


def load_model(config: QCConfig, path: Path) -> HFModel:
    """A model directory, in the precision and on the devices asked for."""
    return HFModel.load(path, dtype=config.compute_dtype, device_map=config.device_map)


def decoder(config: QCConfig) -> Callable[[list[int]], str] | None:
    """Token ids → text, by the tokenizer that the texts were encoded with; None if none is known.

    Under llama-perplexity's protocol a GGUF file's own vocabulary may have encoded them, which
    transformers cannot decode.
    """
    files = any(is_gguf(path) for path in (config.reference, *config.candidates))
    if config.tokenizer is None and config.protocol == "llama-perplexity" and files:
        return None
    try:
        tokenizer = _tokenizer(config)
    except InputError:
        return None
    return lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def chat_checks(
    config: QCConfig, names: Mapping[str, Path], capture: Capture | None
) -> list[Check]:
    """``chat.template`` of the candidates, where conversations are scored."""
    if not config.chat or capture is not None:
        return []
    return template_checks(config.data, _tokenizer(config), names)


def _tokenizer(config: QCConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(input_directory(config))
