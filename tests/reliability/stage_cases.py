"""The commands that are disturbed: real models, so small that a stage takes a second."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from crash import Case, Trial, begin
from disk_bench import Bench

from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target

LAYERS, BLOCKS = 3, 8
_WHOLE = {"bake": "baked", "bake again": "baked", "run": "run/bake/baked_model"} | {
    "pipeline": "pipeline/bake/baked_model"
}
"""The directories that a case replaces as a whole."""


@dataclass(frozen=True)
class Inputs:
    """What the commands are given; it lies outside of the watched directory."""

    model: Path
    gates: Path
    texts: Path
    long: Path
    pipeline: Path


def write_inputs(folder: Path, model: Path) -> Inputs:
    """Gates, texts and the file of a pipeline for a model directory."""
    generator = np.random.default_rng(0)
    theta = {Target(i): generator.normal(size=(BLOCKS, 8, 8)) * 0.3 for i in range(LAYERS)}
    write_native(
        folder / "gates.safetensors",
        theta,
        parametrization=Parametrization.EXP,
        convention=Convention.COLUMN,
        site=Site.INPUT,
        pet=None,
    )
    data = Path(__file__).parents[2] / "data"
    texts = json.loads((data / "validation_en.json").read_text(encoding="utf-8"))["texts"]
    lines = [json.dumps({"id": f"t{i}", "text": text[:300]}) for i, text in enumerate(texts[:6])]
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    long = json.loads((data / "longtext_en.json").read_text(encoding="utf-8"))
    long = {key: long[key][:1] for key in ("ids", "texts", "prompts")}
    (folder / "long.json").write_text(json.dumps(long), encoding="utf-8")
    options = {
        "name": "tiny",
        "base": str(model),
        "rotations": str(folder / "gates.safetensors"),
        "data": [str(folder / "texts.jsonl")],
        "long_data": [str(folder / "long.json")],
        "export": {"type": "f16"},
        "quantize": {"types": ["F16", "BF16"]},
        "calibrate_type": "F16",
        "calibrate": {"png": False, "allow_small": True, "resamples": 100},
        "qc": {"resamples": 100},
        "choose": {"repeats": 1},
        "longtext": {"min_tokens": 256, "max_new_tokens": 4, "png": False},
    }
    (folder / "run.yaml").write_text(json.dumps(options), encoding="utf-8")  # YAML contains JSON
    return Inputs(
        model,
        folder / "gates.safetensors",
        folder / "texts.jsonl",
        folder / "long.json",
        folder / "run.yaml",
    )


class Cases:
    """Name → the case, run once undisturbed; a stage begins from what earlier ones left.

    Args:
        bench: where they run.
        inputs: what they are given.
        folder: where what they leave is kept.
    """

    def __init__(self, bench: Bench, inputs: Inputs, folder: Path) -> None:
        self._bench, self._inputs, self._folder = bench, inputs, folder
        self._begun: dict[str, Trial] = {}

    def __call__(self, name: str) -> Trial:
        if name not in self._begun:
            before, *arguments = commands(self._inputs, self._bench.root)[name]
            if before is not None:
                self(before)
            start = None if before is None else self._state(before)
            whole = (_WHOLE[name],) if name in _WHOLE else ()
            case = Case(name, (*map(str, arguments), "--quiet"), start, whole)
            self._begun[name] = begin(self._bench, case)
            shutil.copytree(self._bench.root, self._state(name))
            if name == "run":
                self._bench.warm(["report", str(self._bench.root / "run"), "--quiet"])
        return self._begun[name]

    def _state(self, name: str) -> Path:
        return self._folder / name.replace(" ", "-")


def commands(inputs: Inputs, root: Path) -> dict[str, tuple[str | None, ...]]:
    """Name → (what must have been run before, then the command's arguments)."""
    model, gates = str(inputs.model), str(inputs.gates)
    baked, f16 = str(root / "baked"), str(root / "export/tiny-F16.gguf")
    return {
        "bake": (None, "bake", model, gates, "--out", baked),
        "bake again": (
            "bake",
            "bake",
            model,
            gates,
            "--convention",
            "row",
            "--out",
            baked,
        ),
        "export": ("bake", "export", baked, "--type", "f16", "--out", f16),
        "quantize": (
            "export",
            "quantize",
            f16,
            "--type",
            "Q8_0",
            "--type",
            "Q4_0",
            "--out",
            str(root / "quantize"),
        ),
        "calibrate": (
            "export",
            "calibrate",
            f16,
            "--tokenizer",
            model,
            "--data",
            str(inputs.texts),
            "--no-png",
            "--allow-small",
            "--set",
            "resamples=100",
            "--out",
            str(root / "calibrate"),
        ),
        "qc": (
            "export",
            "qc",
            "--reference",
            model,
            "--rotations",
            gates,
            "--candidate",
            baked,
            "--candidate",
            f16,
            "--data",
            str(inputs.texts),
            "--set",
            "resamples=100",
            "--out",
            str(root / "qc"),
        ),
        "longtext": (
            "bake",
            "longtext",
            baked,
            "--reference",
            model,
            "--rotations",
            gates,
            "--data",
            str(inputs.long),
            "--min-tokens",
            "256",
            "--max-new-tokens",
            "4",
            "--no-png",
            "--out",
            str(root / "longtext"),
        ),
        "capture": (
            None,
            "capture",
            model,
            "--rotations",
            gates,
            "--data",
            str(inputs.texts),
            "--out",
            str(root / "capture.safetensors"),
        ),
        "attest": ("run", "attest", str(root / "run")),
        "run": (None, "run", str(inputs.pipeline), "--only", "bake", "--out", str(root / "run")),
        "report": ("run", "report", str(root / "run")),
        "pipeline": (None, "run", str(inputs.pipeline), "--out", str(root / "pipeline")),
    }
