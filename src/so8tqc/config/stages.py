"""Configuration of every stage. Defaults live here and nowhere else.

Each stage has an ``…Options`` model (what a user tunes) and a ``…Config`` model
(options plus the paths it works on). A pipeline file holds options; a command
line holds a config. Unknown keys are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from so8tqc.config.evaluation import (
    IMAGES_HELP,
    QUALITY_TEXTS,
    QUICK_TEXTS,
    EvaluationOptions,
    ReferenceOptions,
    StreamOptions,
)
from so8tqc.config.serving import ServeConfig
from so8tqc.errors import ConfigError
from so8tqc.languages import Language
from so8tqc.options import Options
from so8tqc.rotations.options import RotationOptions

LONG_TEXTS = "builtin:longtext"
QUICK_LONG_TEXTS = "builtin:longtext-quick"
CALIBRATION_TEXTS = "builtin:calibration"


def nested_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model that a field holds, or None: it holds a value."""
    inner = field.annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def option_paths(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """The path of every field of a model, and of the fields inside it."""
    for name, field in model.model_fields.items():
        yield (name,)
        if inner := nested_model(field):
            yield from ((name, *path) for path in option_paths(inner))


class BakeOptions(RotationOptions):
    """Folding rotations into a checkpoint."""

    baked_dtype: Literal["keep", "float32", "float16", "bfloat16"] = Field(
        "keep", description="Storage dtype of the baked tensors; all others keep theirs."
    )
    force: bool = Field(False, description="Bake a directory that was already baked.")
    verify: bool = Field(True, description="Re-read the result from disk and prove it.")


class BakeConfig(BakeOptions):
    base: Path
    rotations: Path | None = Field(
        None,
        description="Gate file, checkpoint or adapter; None: the base's own weights hold them.",
    )
    out: Path


ExportType = Literal["f32", "f16", "bf16", "q8_0", "auto"]


class ExportOptions(Options):
    """Conversion of a model directory to GGUF."""

    type: ExportType = Field(
        "f16", description="Storage type of the matrices; auto: the 16-bit type they have."
    )
    keep_f32: tuple[str, ...] = Field(
        (),
        description="Tensors to store unrounded, as F32: baked (all that the bake changed), or "
        "globs of safetensors or GGUF names.",
    )
    converter_args: tuple[str, ...] = Field(
        (), description="Further arguments for the converter, as it takes them."
    )
    text_only: bool = Field(
        False, description="Leave out the vision tower and projector of a model that sees."
    )


class ExportConfig(ExportOptions):
    model: Path
    out: Path
    llama_cpp: Path | None = Field(None, description="A llama.cpp checkout to convert with.")
    vendor: Literal["ask", "auto"] = Field(
        "ask",
        description="Where the converter is not here yet: ask before it is fetched (on a terminal; "
        "else it is an error), or fetch it.",
    )


class QuantizeOptions(Options):
    """Quantization by libllama."""

    types: tuple[str, ...] = Field(("Q8_0", "Q5_K_M"), min_length=1)
    tensor_types: tuple[str, ...] = Field(
        (),
        description="PATTERN=TYPE: tensors whose name has the regular expression take the type; "
        "the first pattern found decides.",
    )
    output_tensor_type: str | None = Field(None, description="Type of the output head.")
    token_embedding_type: str | None = Field(None, description="Type of the token embedding.")
    pure: bool = Field(False, description="One type for all matrices instead of a mixture.")
    allow_requantize: bool = Field(False, description="Accept an input that is quantized.")
    imatrix: Literal["auto"] | Path | None = Field(
        None,
        description="Importance matrix (.gguf, .dat) that weighs the rounding errors; auto: "
        "computed from imatrix_data.",
    )
    imatrix_data: tuple[str, ...] = Field(
        (LONG_TEXTS,), min_length=1, description="Calibration text for imatrix: auto."
    )
    solver: Literal["libllama", "hessian"] = Field(
        "libllama",
        description="Who chooses codes and scales. hessian: rounding errors of a column are made "
        "up for by the columns behind it, by the second moments of the matrices' inputs; the types "
        "and sizes stay libllama's.",
    )
    hessians: Literal["auto"] | Path = Field(
        "auto",
        description="With solver: hessian, the file of second moments (.npz); auto: computed from "
        "hessian_data with the model directory that the GGUF was exported from.",
    )
    hessian_data: tuple[str, ...] = Field(
        (CALIBRATION_TEXTS,),
        min_length=1,
        description="Calibration text for hessians: auto; texts that judge are refused.",
    )
    hessian_tokens: int = Field(
        40960, ge=2, description="Tokens of it at most, spread evenly over the text."
    )
    threads: int | None = Field(None, ge=1)


class QuantizeConfig(QuantizeOptions):
    gguf: Path
    out: Path
    model: Path | None = Field(
        None,
        description="For hessians: auto, the model directory that the GGUF was exported from; "
        "default what the record of its export says.",
    )
    max_size: ByteSize | None = Field(
        None,
        gt=0,
        description="With solver: hessian, bytes of the file, e.g. 100MB: the type of each tensor "
        "is chosen so that it loses least.",
    )

    @model_validator(mode="after")
    def _mixture_of_one_recipe(self) -> Self:
        if self.max_size is None or not self.chooses_types:
            return self
        if "types" in self.model_fields_set and len(set(self.types)) > 1:
            raise ValueError("max_size makes one file: give one type")
        if self.pure:
            raise ValueError("max_size mixes types: it cannot be pure")
        return self

    @property
    def chooses_types(self) -> bool:
        """Whether ``max_size`` is what types of single tensors are chosen by."""
        return self.solver == "hessian"


class CheckConfig(Options):
    """Saying what something is, and judging it by what lies beside it."""

    path: Path
    other: Path | None = Field(None, description="What it is compared with.")
    base: Path | None = Field(None, description="The base model, where it is not found.")
    rotations: Path | None = Field(None, description="The gates, where they are not found.")
    tokenizer: Path | None = None
    data: tuple[str, ...] = (QUICK_TEXTS,)
    max_tokens: int | None = Field(None, ge=2, description="Tokens of each text; default 256.")
    level: Literal["auto", "files", "full"] = Field(
        "auto",
        description="Whether models are run: auto: those that are small enough; files: none; full: "
        "all.",
    )
    threads: int | None = Field(None, ge=1)


class AttestConfig(Options):
    """Writing the statement about a run's files."""

    directory: Path = Field(description="Run directory, baked directory, or GGUF file.")
    out: Path | None = Field(
        None, description="The statement; default in the run directory, or beside the file."
    )


class VerifyConfig(Options):
    """Making files again, to compare them: one quantized file, or all that a statement names."""

    file: Path = Field(description="A quantized GGUF, or the statement that attest wrote.")
    base: Path | None = Field(None, description="Of a statement: the base model.")
    rotations: Path | None = Field(None, description="Of a statement: the rotations.")
    adapters: tuple[Path, ...] = Field(
        (), description="Of a statement: the adapters beside the rotations, in their order."
    )
    files: Path | None = Field(
        None, description="Of a statement: where its files are; default beside it."
    )
    level: Literal["files", "full"] = Field(
        "full", description="Of a statement: files: check digests alone; full: make links again."
    )
    scratch: Path | None = Field(
        None, description="Of a statement: where files are made again; default the system's place."
    )
    record: Path | None = Field(
        None, description="What quantize wrote; default record.json beside the file."
    )
    input: Path | None = Field(None, description="The GGUF it was made from, if it has moved.")
    imatrix: Path | None = Field(None, description="The importance matrix, if it has moved.")
    hessians: Path | None = Field(None, description="The file of second moments, if it has moved.")

    @property
    def is_statement(self) -> bool:
        """Whether ``file`` is a statement rather than a GGUF."""
        return self.file.suffix == ".json"

    @model_validator(mode="after")
    def _of_one_kind(self) -> VerifyConfig:
        others = ("record", "input") if self.is_statement else _OF_A_STATEMENT
        if given := [name for name in others if getattr(self, name) not in (None, ())]:
            kind = "a GGUF file" if self.is_statement else "a statement"
            raise ValueError(f"{', '.join(given)}: only for {kind}")
        return self


_OF_A_STATEMENT = ("base", "rotations", "adapters", "files", "scratch")


class ChoiceOptions(Options):
    """What is asked of a quantized file, and how its speed is measured."""

    max_kl: float | None = Field(None, gt=0, description="Budget: mean KL to the reference, nats.")
    min_top1: float | None = Field(
        None, gt=0, le=1, description="Budget: share of the reference's top tokens that are kept."
    )
    max_size: ByteSize | None = Field(
        None, gt=0, description="Budget: size of the file, e.g. 120MB or 115MiB."
    )
    judge_by: Literal["value", "interval"] = Field(
        "value",
        description="What must keep the budget: the measured value, or its whole 95 % interval.",
    )
    repeats: int = Field(5, ge=1, description="Rounds of the speed measurement that count.")

    @property
    def has_budget(self) -> bool:
        """Whether anything is asked of the file."""
        return (self.max_kl, self.min_top1, self.max_size) != (None, None, None)


class ChooseConfig(ChoiceOptions, EvaluationOptions, ReferenceOptions, QuantizeConfig):
    """Comparing quantizations, and finding the smallest file that meets a budget."""

    types: tuple[str, ...] = Field(("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"), min_length=1)
    reference: Path | None = Field(
        None, description="The model we trust: directory, capture or GGUF; default the input."
    )
    max_evaluations: int = Field(
        24, ge=1, description="Files evaluated at most, those of the types included."
    )

    @property
    def chooses_types(self) -> bool:
        """No: its ``max_size`` is a budget that types, and mixtures of two, are held against."""
        return False

    @model_validator(mode="after")
    def _evaluates_every_type(self) -> ChooseConfig:
        if self.max_evaluations < len(set(self.types)):
            raise ValueError(
                f"max_evaluations {self.max_evaluations} is less than the "
                f"{len(set(self.types))} types"
            )
        return self


KVType = Literal["f16", "q8_0", "q4_0"]

Objective = Literal["nll", "brier", "ece", "entropy", "confidence-variance"]


class ChooseAmongConfig(ChoiceOptions):
    """Choosing among files that a run has quantized and judged."""

    gguf: Path
    quantized: Path = Field(description="Folder of the quantize stage's record.")
    judged: Path = Field(description="Folder of the qc stage's record and token table.")
    threads: int | None = Field(None, ge=1)


class CalibrateOptions(StreamOptions):
    """Fitting a temperature on a GGUF's own logits."""

    objective: Objective = "nll"
    bounds: tuple[float, float] = (0.5, 3.0)
    holdout: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    bins: Annotated[int, Field(ge=2)] = 15
    seed: int = 0
    resamples: Annotated[int, Field(ge=100)] = 2000
    max_tokens: Annotated[int, Field(ge=2)] = Field(512, description="Tokens used of each text.")
    chat: bool = Field(
        False,
        description="The data are conversations: rendered through the tokenizer's chat template, "
        "and scored on the answers alone.",
    )
    images: int | None = Field(None, ge=0, description=IMAGES_HELP)
    allow_small: bool = Field(False, description="Accept fewer than 500 held-out tokens.")
    classes: Annotated[int, Field(ge=1)] = Field(
        20, description="Classwise ECE is over so many of the most frequent next tokens."
    )
    apply: Literal["none", "metadata", "norm"] = Field(
        "none",
        description="metadata: write the temperature into a copy of the GGUF; norm: scale the "
        "copy's final norm by 1/T, so that every runtime honours it.",
    )
    sampling_temp: bool = Field(
        False, description="With apply=metadata: also set general.sampling.temp."
    )
    png: bool = Field(True, description="Also draw a PNG image (needs kaleido and Chrome).")

    @model_validator(mode="after")
    def _ordered(self) -> CalibrateOptions:
        if not 0 < self.bounds[0] < 1 < self.bounds[1]:
            raise ValueError("bounds must satisfy 0 < low < 1 < high")
        return self

    @model_validator(mode="after")
    def _applied_once(self) -> CalibrateOptions:
        if self.sampling_temp and self.apply == "norm":
            raise ValueError("sampling_temp with apply=norm would apply the temperature twice")
        return self


class CalibrateConfig(CalibrateOptions):
    gguf: Path
    tokenizer: Path
    data: tuple[str, ...] = (QUALITY_TEXTS,)
    out: Path
    reference: Path | None = Field(
        None,
        description="Unquantized model: whose calibration should come back, and whose entropy the "
        "objective entropy matches.",
    )


class CaptureOptions(StreamOptions):
    """Recording a model's logits as a reference."""

    dtype: Literal["float32", "float16"] = Field(
        "float32", description="Storage dtype of the logits; float16 is exact to 2⁻¹¹ of each."
    )
    max_tokens: Annotated[int, Field(ge=2)] = Field(256, description="Tokens used of each text.")
    chat: bool = Field(
        False,
        description="The data are conversations: rendered through the tokenizer's chat template, "
        "and scored on the answers alone.",
    )
    images: int | None = Field(None, ge=0, description=IMAGES_HELP)
    threads: int | None = Field(None, ge=1)


class CaptureConfig(CaptureOptions):
    model: Path
    rotations: Path | None = None
    rotation_options: RotationOptions = RotationOptions()
    data: tuple[str, ...] = (QUALITY_TEXTS,)
    tokenizer: Path | None = None
    out: Path


class IdentifyConfig(Options):
    """Finding out which reading of a gate file is the trained one."""

    base: Path = Field(description="Model directory, or builtin:smollm2-135m.")
    rotations: Path = Field(description="Gate file, checkpoint or adapter, or builtin:NAME.")
    rotation_options: RotationOptions = Field(
        RotationOptions(), description="What is known of them: only readings that fit are run."
    )
    capture: Path | None = Field(None, description="Logits that the trained model gave.")
    data: tuple[str, ...] = Field(
        (QUALITY_TEXTS,), description="Text of the training; not needed with a capture."
    )
    tokenizer: Path | None = None
    ctx: Annotated[int, Field(ge=8)] = Field(
        256, description="Texts are cut into windows of so many tokens."
    )
    windows: Annotated[int, Field(ge=1)] = Field(
        32, description="Windows that are run, evenly spread over the text."
    )
    seed: int = 0
    resamples: Annotated[int, Field(ge=100)] = 2000
    compute_dtype: Literal["float32", "float64", "bfloat16"] | None = Field(
        None, description="What transformers computes in; default float32, on a GPU bfloat16."
    )
    device_map: Literal["auto"] | None = Field(
        None, description="auto: spread the model over GPUs, memory and disk with accelerate."
    )
    out: Path | None = Field(
        None, description="Gate file to write, with the facts that were found stated."
    )
    report: Path | None = Field(None, description="Directory for record and reports.")


class VerdictOptions(Options):
    """The limits that a candidate is judged by, and which checks count for the verdict."""

    profile: str = Field("default", description="Name of a built-in profile, or a YAML file.")
    level: Literal["files", "full"] = "full"
    fail_on: tuple[str, ...] = Field(
        (), description="Glob patterns of check ids; only these count for the verdict."
    )
    allow: tuple[str, ...] = Field(
        (), description="Glob patterns of check ids that do not count for the verdict."
    )


class QCOptions(StreamOptions, EvaluationOptions, VerdictOptions):
    """Judging candidates against a reference."""

    protocol: Literal["native", "llama-perplexity"] = Field(
        "native", description="Which tokens are scored: every one, or those that tool scores."
    )
    ctx: int | None = Field(
        None, ge=8, description="Window length, tokens; default 512 under llama-perplexity."
    )

    until: float | None = Field(
        None,
        gt=0,
        description="Take texts, in an order drawn by the seed, until the interval of every "
        "candidate's mean KL is at most so wide, nats; all if it never is.",
    )
    kv_types: tuple[KVType, ...] = Field(
        (),
        description="Types of libllama's cache of keys and values; each GGUF candidate with each "
        "is a candidate of its own. f16 is what it is without.",
    )
    gguf_reading: Literal["libllama", "weights", "both"] | None = Field(
        None,
        description="libllama runs a GGUF file; weights: its dequantized weights are run by "
        "transformers, a layer at a time; both: and the difference is the runtime's. Default: "
        "both with stream, weights where memory does not hold the file, else libllama.",
    )

    quantization_floor: bool = Field(
        True,
        description="Run beside each quantized GGUF file what an honest encoder makes of the "
        "reference's weights in the same types, as its limit.",
    )
    evaluation_cache: bool = Field(
        True,
        description="Keep what models say of texts in the user's cache, and take from it what an "
        "earlier call computed from the same bytes.",
    )
    evaluation_folder: Path | None = Field(
        None, description="Another folder for it than that in the user's cache."
    )

    @field_validator("protocol")
    @classmethod
    def _windows_follow_one_another(cls, protocol: str, info: ValidationInfo) -> str:
        if protocol == "llama-perplexity" and info.data.get("stride") is not None:
            raise ValueError("llama-perplexity's windows follow one another: no stride")
        if protocol == "llama-perplexity" and info.data.get("chat"):
            raise ValueError("llama-perplexity reads plain text: no chat")
        return protocol


class QCConfig(QCOptions, ReferenceOptions):
    reference: Path
    candidates: tuple[Path, ...] = Field(min_length=1)
    out: Path
    mmproj: Path | None = Field(
        None, description="File of the vision tower beside the GGUF candidates, to be judged."
    )
    save_recovered: Path | None = Field(
        None, description="Write the rotations recovered from the candidate as a gate file."
    )


class LongTextOptions(Options):
    """Behaviour over long text: attention entropy, oscillation, PET."""

    min_tokens: Annotated[int, Field(ge=64)] = Field(2048, description="Teacher-forced tokens.")
    images: int | None = Field(None, ge=0, description=IMAGES_HELP)
    chat: bool = Field(
        False,
        description="The data are conversations: rendered through the tokenizer's chat template, "
        "and scored on the answers alone.",
    )
    max_new_tokens: Annotated[int, Field(ge=0)] = Field(512, description="Generated tokens.")
    seed: int = 0
    resamples: Annotated[int, Field(ge=100)] = 2000
    png: bool = Field(True, description="Also draw PNG images (needs kaleido and Chrome).")
    threads: int | None = Field(None, ge=1)


class LongTextConfig(LongTextOptions):
    model: Path
    reference: Path | None = None
    rotations: Path | None = None
    rotation_options: RotationOptions = RotationOptions()
    tokenizer: Path | None = None
    data: tuple[str, ...] = (LONG_TEXTS,)
    out: Path


class AuditConfig(Options):
    """Judging a GGUF file that somebody else made by the model that it claims to be."""

    file: Path
    base: Path
    rotations: Path | None = None
    rotation_options: RotationOptions = RotationOptions()
    fail_on: tuple[str, ...] = Field(
        (), description="Glob patterns of check ids; only these count for the verdict."
    )
    allow: tuple[str, ...] = Field(
        (), description="Glob patterns of check ids that do not count for the verdict."
    )
    out: Path


class LocateConfig(Options):
    """Finding where two models part: layer by layer, operation by operation."""

    reference: Path
    candidate: Path
    rotations: Path | None = None
    rotation_options: RotationOptions = RotationOptions()
    data: tuple[str, ...] = (QUICK_TEXTS,)
    tokenizer: Path | None = None
    max_tokens: Annotated[int, Field(ge=2)] = Field(64, description="Tokens used of each text.")
    texts: Annotated[int, Field(ge=1)] = Field(2, description="Texts that are run.")
    only_layers: str | None = Field(
        None,
        description="Layers whose operations are looked at, e.g. 0-11,13; default all.",
        pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$",
    )
    compute_dtype: Literal["float32", "float64"] = Field(
        "float32", description="What transformers computes in."
    )
    runtime: bool = Field(
        True, description="Of a GGUF candidate, look at libllama's own values, too."
    )
    out: Path


class ReportOptions(Options):
    """The report of a run."""

    language: Language = Field(
        Language.ENGLISH, description="Language of the report: en, or ja (Japanese)."
    )


STAGES = ("bake", "export", "quantize", "calibrate", "qc", "choose", "longtext", "report")
StageName = Literal["bake", "export", "quantize", "calibrate", "qc", "choose", "longtext", "report"]


class RunConfig(Options):
    """A whole pipeline: one base model, one set of rotations, every stage."""

    name: str = Field("model", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str = Field(description="Model directory, or builtin:smollm2-135m.")
    rotations: str | None = Field(
        None,
        description="Rotation file or directory, or builtin:NAME; none: the base's own weights "
        "hold the gates.",
    )
    rotation_options: RotationOptions = Field(
        RotationOptions(), description="What the rotations are, where their file does not say."
    )
    out: Path = Path("out")
    data: tuple[str, ...] = (QUALITY_TEXTS,)
    long_data: tuple[str, ...] = (LONG_TEXTS,)
    llama_cpp: Path | None = None
    bake: BakeOptions = BakeOptions()
    export: ExportOptions = ExportOptions()
    quantize: QuantizeOptions = QuantizeOptions()
    calibrate: CalibrateOptions = CalibrateOptions()
    calibrate_type: str | None = Field(
        None,
        description="Which quantized file is calibrated; default Q5_K_M, or the first type where "
        "that is not made.",
    )
    qc: QCOptions = QCOptions()
    choose: ChoiceOptions = ChoiceOptions()
    longtext: LongTextOptions = LongTextOptions()
    report: ReportOptions = ReportOptions()
    note: str = Field("", description="A sentence that the report's first screen shows.")

    @model_validator(mode="after")
    def _calibrates_what_is_made(self) -> RunConfig:
        if self.calibrate_type not in (None, *self.quantize.types):
            raise ValueError(
                f"calibrate_type {self.calibrate_type} is not among quantize.types "
                f"({', '.join(self.quantize.types)})"
            )
        return self

    @property
    def calibrated_type(self) -> str:
        """The type whose file is calibrated."""
        usual, made = "Q5_K_M", self.quantize.types
        return self.calibrate_type or (usual if usual in made else made[0])


COMMAND_CONFIGS: dict[str, type[Options]] = {
    "bake": BakeConfig,
    "export": ExportConfig,
    "quantize": QuantizeConfig,
    "choose": ChooseConfig,
    "calibrate": CalibrateConfig,
    "capture": CaptureConfig,
    "identify": IdentifyConfig,
    "qc": QCConfig,
    "locate": LocateConfig,
    "audit": AuditConfig,
    "longtext": LongTextConfig,
    "check": CheckConfig,
    "attest": AttestConfig,
    "verify": VerifyConfig,
    "serve-config": ServeConfig,
}
"""What ``--config`` of a command reads."""


def config_model(command: str | None) -> type[Options]:
    """The model of a command's file, or for None that of a run file.

    Raises:
        ConfigError: no such command, or it reads no file.
    """
    if command is None:
        return RunConfig
    if command not in COMMAND_CONFIGS:
        raise ConfigError(
            f"{command} reads no config file",
            remedy=f"Those that do: {', '.join(COMMAND_CONFIGS)}.",
        )
    return COMMAND_CONFIGS[command]
