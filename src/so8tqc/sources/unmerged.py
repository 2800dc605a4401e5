"""Base and adapters, unmerged, run by PEFT itself: the forward that was trained.

Not our reading of an adapter but PEFT's, with its own dtype rules: adapter weights in 16 bits are
computed with in float32 (``autocast_adapter_dtype``). Gates in front are hooks on PEFT's layers, so
that base and branch both get the rotated input.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from so8tqc.adapters.files import AdapterFiles, read_files
from so8tqc.adapters.names import StoredNames
from so8tqc.adapters.settings import require_understood
from so8tqc.checkpoints.safetensors_index import open_checkpoint, torch_dtype
from so8tqc.errors import MissingToolError, ModelError, first_line
from so8tqc.rotations.rotation_set import RotationSet
from so8tqc.sources.gated import GatedSource
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.quiet import quiet_transformers


def require_peft() -> None:
    """See that PEFT is installed.

    Raises:
        MissingToolError: it is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingToolError(
            "an adapter is run unmerged by PEFT, which is not installed",
            remedy="Run: pip install 'so8tqc[adapters]'",
        )


def load_unmerged(
    base: Path,
    adapters: Sequence[Path],
    *,
    dtype: str | None = None,
    device_map: str | None = None,
) -> HFModel:
    """A base model with its adapters in place, in the order in which they apply.

    Adapters of one method that follow one another are active together; another method wraps what is
    there already.

    Args:
        base: model directory.
        adapters: adapter directories.
        dtype, device_map: as :meth:`HFModel.load`.

    Raises:
        MissingToolError: PEFT is not installed.
        RotationError: an adapter cannot be read, or has settings that are not understood.
        ModelError: the base cannot be loaded, or PEFT does not take the adapter.
    """
    require_peft()
    read = [read_files(path) for path in adapters]
    for files in read:
        require_understood(files)
    model = HFModel.load(base, dtype=dtype, device_map=device_map)
    module = model.module
    for _, group in groupby(read, key=lambda files: files.kind):
        _put_on(module, list(group))
    if any(files.kind == "VERA" and not files.shared for files in read):
        _round_projections(module, base)
    return HFModel(module, base)


def _put_on(module: Any, group: Sequence[AdapterFiles]) -> None:
    """Wrap the targeted layers of a transformers module, in place."""
    import torch
    from peft import PeftModel

    names = [f"adapter_{i}" for i in range(len(group))]
    try:
        with quiet_transformers(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            live = PeftModel.from_pretrained(
                module, str(group[0].directory), adapter_name=names[0], local_files_only=True
            )
            for name, files in zip(names[1:], group[1:], strict=True):
                live.load_adapter(str(files.directory), adapter_name=name, local_files_only=True)
            if len(names) > 1:
                live.base_model.set_adapter(names)
    except Exception as error:  # noqa: BLE001  each method fails in its own way
        raise ModelError(
            f"PEFT does not put it on this base: {first_line(error)}",
            where=str(group[0].directory),
        ) from None
    module.eval()


def _round_projections(module: Any, base: Path) -> None:
    """VeRA's drawn projections as PEFT has them where the base is loaded in its stored dtype."""
    names = StoredNames(open_checkpoint(base))
    for path, layer in module.named_modules():
        held = getattr(layer, "vera_A", None)
        entry = names.find(f"{path}.weight") if held is not None else None
        if held is None or entry is None:
            continue
        dtype = torch_dtype(entry.dtype)
        for projection in (layer.vera_A, layer.vera_B):
            for key in list(projection.keys()):
                projection[key] = projection[key].to(dtype).to(projection[key].dtype)
        return


def unmerged_source(model: HFModel, gates: RotationSet | None, name: str) -> HFSource | GatedSource:
    """The model, with the gates in front if there are any, as a logit source."""
    return HFSource(model, name) if gates is None else GatedSource(model, gates, name)
