"""The command that makes a file anew, from the last thing on its way that is here."""

from __future__ import annotations

from pathlib import Path

from so8tqc.services.attest.chain import Chain, Step, located
from so8tqc.services.check.judged import told


def source_of(chain: Chain) -> Path | None:
    """The file that was quantized, if it is here."""
    step = chain.step("quantize")
    return None if step is None else located(Path(step.record.inputs["gguf"].path), step.path)


def make_again(chain: Chain, path: Path) -> str:
    """The command that makes it anew, from the last thing on the way that is here."""
    made = chain.steps[0] if chain.steps else None
    if made is not None and made.kind == "quantize" and (source := source_of(chain)) is not None:
        kind = _recorded_type(made, path)
        return told("quantize", source, "--type", kind, "--out", path.parent.with_name("again"))
    if chain.baked is not None:
        again = path.with_name(f"{path.stem}-again.gguf")
        return told("export", chain.baked[0], "--out", again)
    return ""


def _recorded_type(step: Step, path: Path) -> str:
    names = [n for n, ref in step.record.outputs.items() if Path(ref.path).name == path.name]
    return names[0] if names else "Q5_K_M"
