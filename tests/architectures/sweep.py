"""One type of model through bake, qc, export and quantize, each judged by something independent.

``python tests/architectures/sweep.py OUT.jsonl TOKENIZERS [TYPE …]`` appends a line for each type
(all that transformers has, if none is named) to OUT.jsonl. TOKENIZERS is a folder that
``sweep_tokenizer.py`` has made; ``page.py`` writes docs/architectures.md from the lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from sweep_tokenizer import BPE_VOCABULARY, VOCABULARY

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.checkpoints.sites import layers_with_attention
from so8tqc.checkpoints.skeleton import skeleton
from so8tqc.config import BakeConfig, ExportConfig, QCConfig, QuantizeConfig
from so8tqc.decoder import decoder_stack
from so8tqc.errors import RotationError, So8tqcError
from so8tqc.gguf.conversion import Conversion
from so8tqc.gguf.file import GGUFFile, GGUFTensor, open_gguf
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake
from so8tqc.services.export import service as export_service
from so8tqc.services.export.traced import compare_traced
from so8tqc.services.qc.service import qc
from so8tqc.services.quantize.service import quantize

TOKENS = np.arange(10, 42)
RIGHT = 1e-4
"""Largest error of a right bake, as a share of what the gates change: float32 storage."""


@dataclasses.dataclass
class Row:
    """What became of a type. A phase is ``pass``, ``FAIL id, id``, or ``exit N: reason``."""

    kind: str
    model: str = ""
    tokenizer: str = ""
    seconds: float = 0.0
    projection: str = ""
    width: str = ""
    layers: str = ""
    bake: str = ""
    error: float | None = None
    oracle: str = ""
    files: str = ""
    unbaked: str = ""
    export: str = ""
    said: str = ""
    export_checks: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
    skips: list[str] = dataclasses.field(default_factory=list)
    faults: dict[str, bool] = dataclasses.field(default_factory=dict)
    quantize: str = ""
    run: str = ""
    """When the run began that made the row, UTC."""


def outcome(run: Callable[[], Record]) -> tuple[str, Record | None]:
    """How a stage ended, as the command line would say it."""
    try:
        record = run()
    except So8tqcError as error:
        return f"exit {int(error.exit_code)}: {' '.join(str(error).split())[:300]}", None
    except Exception as error:  # what the command line calls an internal error
        return f"exit 70: {type(error).__name__}: {str(error)[:200]}", None
    failed = [check.id for check in record.checks if check.verdict is Verdict.FAIL]
    return ("pass" if not failed else f"FAIL {', '.join(dict.fromkeys(failed))}"), record


def write_gates(directory: Path, path: Path) -> dict[str, torch.Tensor]:
    """Gates of about 0.15 rad for every layer that has attention; module → R [N, 8, 8]."""
    checkpoint = open_checkpoint(directory)
    built = skeleton(checkpoint)
    if built is None or not built.stack:
        decoder_stack(built.model) if built else None
        raise RotationError("transformers does not build the model of this config")
    layers = built.model.get_submodule(built.stack)
    output = built.attention_output
    if not layers_with_attention(checkpoint):
        raise RotationError("no layer has self-attention")
    theta, rotations = {}, {}
    generator = np.random.default_rng(0)
    shared: dict[tuple[str, ...], Any] = {}
    for layer in sorted(layers_with_attention(checkpoint)):
        name = f"{built.stack}.{layer}.{output}"
        module = layers[layer].get_submodule(output)
        if not hasattr(module, "weight"):
            raise RotationError(f"{name} is no plain matrix")
        rows = module.weight.shape[0] if hasattr(module, "nf") else module.weight.shape[1]
        key = built.sharing(f"{name}.weight")
        value = shared.setdefault(key, generator.normal(size=(rows // 8, 8, 8)) * 0.05)
        known = None if output == "self_attn.o_proj" else output
        theta[Target(layer, known)] = value
        a = torch.from_numpy(value)
        rotations[name] = torch.linalg.matrix_exp(a - a.transpose(1, 2))
    write_native(
        path,
        theta,
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    return rotations


def logits(directory: Path, rotations: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """transformers' own float64 logits, with the gates as pre-hooks: x ↦ R·x."""
    from transformers import AutoConfig

    from so8tqc.checkpoints.skeleton import auto_class

    config = AutoConfig.from_pretrained(str(directory))
    model, report = auto_class(config).from_pretrained(
        str(directory),
        dtype=torch.float64,
        experts_implementation="eager",
        output_loading_info=True,
    )
    if report["missing_keys"]:  # they would be random, and other ones each time
        raise ValueError("the class that loads it lacks weights")
    model.eval()
    hooked = set()
    for name, r in (rotations or {}).items():
        module = model.get_submodule(name)
        if id(module) in hooked:
            continue
        hooked.add(id(module))

        def gate(_module: Any, args: tuple[Any, ...], r: torch.Tensor = r) -> tuple[Any, ...]:
            x = args[0]
            blocks = x.reshape(*x.shape[:-1], -1, 8, 1)
            return ((r @ blocks).reshape(x.shape), *args[1:])

        module.register_forward_pre_hook(gate)
    with torch.inference_mode():
        try:
            return model(input_ids=torch.from_numpy(TOKENS)[None]).logits[0]
        except (RuntimeError, ValueError):  # float32 inside, or a cache for attention alone
            model = model.float()
            ids = torch.from_numpy(TOKENS)[None]
            return model(input_ids=ids, use_cache=False).logits[0].double()


_OTHER_TOKENIZER = (
    "does not know this tokenizer",
    "special tokens",
    "tokenizer_config.json",
    "tokenizer.vocab",
)
"""Refusals of the converter that are about the tokenizer, not about the type."""


def sweep(kind: str, work: Path, tokenizers: Path, *, export: bool = True) -> Row:
    """Everything of one type, with the small tokenizer, or with the other where that is refused."""
    row = _with_tokenizer(kind, work / "a", tokenizers / "sentencepiece", VOCABULARY, export)
    if any(said in row.export for said in _OTHER_TOKENIZER):
        return _with_tokenizer(kind, work / "b", tokenizers / "bpe", BPE_VOCABULARY, export)
    return row


def _with_tokenizer(kind: str, work: Path, tokenizer: Path, vocabulary: int, export: bool) -> Row:
    row = Row(kind, tiny_models.types().get(kind, ""), tokenizer.name)
    work.mkdir()
    base, gates, baked = work / "base", work / "gates.safetensors", work / "baked"
    try:
        tiny_models.build(kind, base, tokenizer, vocabulary)
    except Exception as error:
        row.bake = f"not built: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return row
    try:
        rotations = write_gates(base, gates)
    except So8tqcError as error:
        row.bake = f"refused: {' '.join(str(error).split())[:300]}"
        return row
    built = skeleton(open_checkpoint(base))
    row.projection = built.attention_output
    count = len(built.model.get_submodule(built.stack))
    at = sorted(layers_with_attention(open_checkpoint(base)))
    row.layers = "all" if len(at) == count else f"{', '.join(map(str, at))} of {count}"
    row.width = "/".join(str(w) for w in sorted({8 * r.shape[0] for r in rotations.values()}))
    row.bake, _ = outcome(lambda: bake(BakeConfig(base=base, rotations=gates, out=baked)))
    if row.bake != "pass":
        return row
    try:
        plain, gated, folded = logits(base), logits(base, rotations), logits(baked)
        row.error = float((gated - folded).abs().max() / (gated - plain).abs().max())
    except Exception as error:
        row.oracle = f"none: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    files = {"reference": base, "rotations": gates, "level": "files"}
    row.files, _ = outcome(lambda: qc(QCConfig(candidates=(baked,), out=work / "qc", **files)))
    row.unbaked, _ = outcome(lambda: qc(QCConfig(candidates=(base,), out=work / "qc2", **files)))
    if export:
        _export(row, work, baked)
    return row


def _export(row: Row, work: Path, baked: Path) -> None:
    kept: list[Conversion] = []
    compare = export_service.compare_traced

    def remembering(checkpoint: Any, gguf: Any, conversion: Conversion, progress: Any) -> Any:
        kept.append(conversion)
        return compare(checkpoint, gguf, conversion, progress)

    export_service.compare_traced = remembering
    out = work / "out.gguf"
    try:
        row.export, record = outcome(
            lambda: export_service.export(ExportConfig(model=baked, out=out))
        )
    finally:
        export_service.compare_traced = compare
    if record is None:
        return
    row.said = next((c.detail for c in record.checks if c.id == "export.logits"), "")
    row.skips = [c.id for c in record.checks if c.verdict is Verdict.SKIP]
    row.export_checks = {c.id: [c.value, c.limit] for c in record.checks if c.value is not None}
    if kept:
        checkpoint, gguf = open_checkpoint(baked), open_gguf(out)
        for fault, wrong in planted(gguf):
            found = compare_traced(checkpoint, wrong, kept[0])
            row.faults[fault] = bool(found.different or found.missing or found.extra)
    row.quantize, _ = outcome(
        lambda: quantize(QuantizeConfig(gguf=out, out=work / "quantized", types=("Q8_0",)))
    )


def planted(gguf: GGUFFile) -> Iterator[tuple[str, GGUFFile]]:
    """The file with one conversion fault each."""
    tensors = gguf.tensors

    def changed(**replaced: GGUFTensor) -> GGUFFile:
        return dataclasses.replace(gguf, tensors=tensors | replaced)

    def with_values(name: str, values: np.ndarray) -> GGUFFile:
        old = tensors[name]
        kind = old.data.dtype
        data = np.ascontiguousarray(values.astype(kind)).reshape(old.data.shape)
        return changed(**{name: dataclasses.replace(old, data=data)})

    plain = {n: t for n, t in tensors.items() if t.type in ("F16", "F32") and t.elements > 8}
    matrices = [n for n, t in plain.items() if len(t.shape) == 2 and n.startswith("blk.")]
    output = next((n for n in matrices if ".attn_output." in n), matrices[0])
    values = {n: plain[n].data for n in plain}
    yield "transposed", with_values(output, values[output].T)
    yield "unscaled", with_values(output, values[output].astype(np.float32) * 1.5)
    alike = next(
        (
            (a, b)
            for a in matrices
            for b in matrices
            if a < b
            and plain[a].shape == plain[b].shape
            and plain[a].type == plain[b].type
            and not np.array_equal(values[a], values[b])
        ),
        None,
    )
    if alike:
        a, b = alike
        yield (
            "exchanged",
            changed(
                **{
                    a: dataclasses.replace(plain[a], data=values[b]),
                    b: dataclasses.replace(plain[b], data=values[a]),
                }
            ),
        )
    query = next((n for n in matrices if re_query(n)), matrices[0])
    half = values[query].shape[0] // 2
    yield "unpermuted", with_values(query, np.roll(values[query], half // 2 or 1, axis=0))
    experts = next((n for n, t in plain.items() if len(t.shape) == 3 and "exps" in n), None)
    if experts:
        stack = values[experts].copy()
        stack[-1] = stack[0]
        yield "one expert left out", with_values(experts, stack)


def re_query(name: str) -> bool:
    """Whether a tensor holds queries."""
    return ".attn_q" in name and name.endswith(".weight")


def main(out: Path, tokenizers: Path, kinds: list[str]) -> None:
    """Append a line to ``out`` for each type."""
    begun = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    for kind in kinds or list(tiny_models.types()):
        started = time.monotonic()
        with (
            tempfile.TemporaryDirectory(prefix="sweep-") as folder,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            row = sweep(kind, Path(folder), tokenizers)
        row.run = begun
        row.seconds = round(time.monotonic() - started, 1)
        text = re.sub(
            rf"{re.escape(tempfile.gettempdir())}/[^\s:,\"]+",
            "DIR",
            json.dumps(dataclasses.asdict(row)),
        )
        with out.open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")
        print(
            kind, row.seconds, row.bake, row.error, row.export, row.faults, row.quantize, flush=True
        )


if __name__ == "__main__":
    out_, tokenizers_, *named = sys.argv[1:]
    main(Path(out_), Path(tokenizers_), named)
