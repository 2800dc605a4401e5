"""What can be seen to be wrong with a run before its first stage begins."""

from __future__ import annotations

from so8tqc.config import BakeConfig, QCConfig, QuantizeConfig, RunConfig
from so8tqc.progress import SILENT, Progress
from so8tqc.services.bake import planned_bytes
from so8tqc.services.qc.profiles import load_profile
from so8tqc.services.quantize.recipe import outputs
from so8tqc.services.run.pipeline import prepare
from so8tqc.sources.inputs.texts import load_texts


def preflight(config: RunConfig, progress: Progress = SILENT, *, only: str | None = None) -> int:
    """Look for all that a run needs: models, rotations that fit, texts, types, tools.

    Reads headers, rotations and texts; no weight is read and nothing written.

    Args:
        config: the run.
        progress: told if something has to be fetched or unpacked.
        only: the one stage that will be run.

    Returns:
        Bytes that the bake will write; 0 if its model is there already.

    Raises:
        So8tqcError: what :func:`so8tqc.services.run.pipeline.run` would raise later.
    """
    size = 0
    for stage in prepare(config, progress, only):
        if only not in (None, stage.name):
            continue
        match stage.config:
            case BakeConfig() as bake:
                needed = planned_bytes(bake)
                size = 0 if bake.out.is_dir() else needed
            case QuantizeConfig() as quantize:
                outputs(quantize)
            case QCConfig() as qc:
                load_profile(qc.profile)
                load_texts(qc.data)
            case _:
                pass
    if only in (None, "longtext"):
        load_texts(config.long_data)
    return size
