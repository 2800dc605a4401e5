"""Every option of every stage, its default, and where its value comes from.

Flags come before ``--set``, then the environment, the file (and what it extends), the default. Read
``stages`` first (a model for each stage; defaults live there and in ``evaluation``, and nowhere
else), then ``load`` (a file, and what goes before it), ``origins`` (where each value comes from),
``yaml_file`` and ``extends`` (files, with lines for errors), ``matrix`` and ``batch`` (a run for
each combination) and ``schema``. ``from so8tqc.config import QCConfig`` is all that others need.
"""

from __future__ import annotations

from so8tqc.config.evaluation import (
    QUALITY_TEXTS,
    QUICK_TEXTS,
    EvaluationOptions,
    ReferenceOptions,
)
from so8tqc.config.serving import Runtime, ServeConfig
from so8tqc.config.stages import (
    CALIBRATION_TEXTS,
    COMMAND_CONFIGS,
    LONG_TEXTS,
    QUICK_LONG_TEXTS,
    STAGES,
    AttestConfig,
    BakeConfig,
    BakeOptions,
    CalibrateConfig,
    CalibrateOptions,
    CaptureConfig,
    CaptureOptions,
    CheckConfig,
    ChoiceOptions,
    ChooseAmongConfig,
    ChooseConfig,
    ExportConfig,
    ExportOptions,
    ExportType,
    IdentifyConfig,
    LongTextConfig,
    LongTextOptions,
    Objective,
    QCConfig,
    QCOptions,
    QuantizeConfig,
    QuantizeOptions,
    ReportOptions,
    RunConfig,
    StageName,
    VerdictOptions,
    VerifyConfig,
    config_model,
    nested_model,
    option_paths,
)
from so8tqc.options import Options
from so8tqc.rotations.options import RotationOptions

__all__ = [
    "CALIBRATION_TEXTS",
    "COMMAND_CONFIGS",
    "LONG_TEXTS",
    "QUALITY_TEXTS",
    "QUICK_LONG_TEXTS",
    "QUICK_TEXTS",
    "STAGES",
    "AttestConfig",
    "BakeConfig",
    "BakeOptions",
    "CalibrateConfig",
    "CalibrateOptions",
    "CaptureConfig",
    "CaptureOptions",
    "CheckConfig",
    "ChoiceOptions",
    "ChooseAmongConfig",
    "ChooseConfig",
    "EvaluationOptions",
    "ExportConfig",
    "ExportOptions",
    "ExportType",
    "IdentifyConfig",
    "LongTextConfig",
    "LongTextOptions",
    "Objective",
    "Options",
    "QCConfig",
    "QCOptions",
    "QuantizeConfig",
    "QuantizeOptions",
    "ReferenceOptions",
    "ReportOptions",
    "RotationOptions",
    "RunConfig",
    "Runtime",
    "ServeConfig",
    "StageName",
    "VerdictOptions",
    "VerifyConfig",
    "config_model",
    "nested_model",
    "option_paths",
]
