"""Six types of models that see: bake → export → Q8_0 → qc on pictures; and what is wrong, named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from so8tqc.config import (
    BakeConfig,
    CalibrateConfig,
    CaptureConfig,
    ExportConfig,
    LongTextConfig,
    QCConfig,
)
from so8tqc.errors import DataError, ModelError
from so8tqc.gguf.rewrite import changed_copy
from so8tqc.llama.vendor import is_vendored
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.rotations.files.native import write_native
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake
from so8tqc.services.calibrate.service import calibrate
from so8tqc.services.capture import capture
from so8tqc.services.export.service import export
from so8tqc.services.longtext.service import longtext
from so8tqc.services.qc.service import qc
from so8tqc.services.qc.token_file import TOKENS_FILE, read_tokens
from so8tqc.sources.gated import GatedSource
from vision_models import SHOWN, build

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

Maker = Callable[[str], Path]
DATA = ("builtin:images", "builtin:validation-quick")


class Bench:
    """A model, its gates, the right bake, and the F16 and Q8_0 files of it."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.gates = folder / "gates.safetensors"
        config = json.loads((base / "config.json").read_text())["text_config"]
        heads = config["num_attention_heads"]
        width = heads * int(config.get("head_dim") or config["hidden_size"] // heads)
        generator = np.random.default_rng(0)
        write_native(
            self.gates,
            {Target(i): generator.normal(size=(width // 8, 8, 8)) * 0.3 for i in range(3)},
            parametrization=Parametrization.EXP,
            convention=Convention.COLUMN,
            site=Site.INPUT,
            pet=None,
        )
        self.baked = folder / base.name
        bake(BakeConfig(base=base, rotations=self.gates, out=self.baked))

    def export(self, type_: Any) -> Path:
        out = self.folder / f"{type_}.gguf"
        if not out.exists():
            record = export(ExportConfig(model=self.baked, out=out, type=type_))
            assert record.verdict is Verdict.PASS
        return out

    def qc(self, *candidates: Path, images: int = 3, **options: Any) -> Record:
        given: dict[str, Any] = {
            "reference": self.base, "rotations": self.gates, "data": DATA, "max_tokens": 96,
            "images": images, "candidates": candidates, "out": self.folder / "qc",
        }  # fmt: skip
        return qc(QCConfig(**{**given, **options}))


@pytest.fixture(scope="module")
def benches(
    make_vision_model: Maker, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bench]:
    made: dict[str, Bench] = {}

    def make(kind: str) -> Bench:
        if kind not in made:
            made[kind] = Bench(make_vision_model(kind), tmp_path_factory.mktemp(f"qc-{kind}"))
        return made[kind]

    return make


def failed(record: Record) -> set[str]:
    return {check.id for check in record.checks if check.failed}


def codes(record: Record) -> set[str]:
    return {found.code for found in record.diagnosis}


@pytest.mark.parametrize("kind", SHOWN)
def test_right_ones_pass(kind: str, benches: Callable[[str], Bench]) -> None:
    bench = benches(kind)
    file = bench.export("q8_0")
    mmproj = file.with_name(f"mmproj-{file.name}")
    record = bench.qc(bench.baked, file, mmproj=mmproj)
    assert record.verdict is Verdict.PASS, [(c.id, c.detail) for c in record.checks if c.failed]
    for subject in (bench.baked.name, file.name):
        seen = next(c for c in record.checks if (c.id, c.subject) == ("images.kl", subject))
        assert seen.verdict is Verdict.PASS
        assert seen.value is not None
        assert seen.value > 0
        apart = record.metrics["candidates"][subject]["apart"]
        whole = record.metrics["candidates"][subject]["tokens"]
        assert apart["text"]["tokens"] + apart["images"]["tokens"] == whole
    assert ("images.rope_sections" in {c.id for c in record.checks}) == kind.startswith("qwen")
    assert any(c.id == "export.mmproj_constants" for c in record.checks)


def test_the_token_table_knows_where_pictures_are(benches: Callable[[str], Bench]) -> None:
    bench = benches("qwen2_vl")
    bench.qc(bench.baked)
    (table,) = read_tokens(bench.folder / "qc" / TOKENS_FILE).values()
    assert table.image is not None
    first = table.text == 0
    positions, seen = table.position[first], table.image[first]
    gap = int(np.flatnonzero(np.diff(positions) > 1)[0])  # the picture: no row, and none before it
    pictures = positions[gap + 1] - positions[gap] - 2
    assert seen[gap] == 0
    assert seen[gap + 1] == pictures
    assert (seen[gap + 1 :] == seen[gap + 1]).all()


def test_an_f16_file_is_as_near_after_pictures_as_before(benches: Callable[[str], Bench]) -> None:
    bench = benches("qwen2_vl")
    record = bench.qc(bench.export("f16"))
    apart = record.metrics["candidates"]["f16.gguf"]["apart"]
    assert apart["images"]["kl_mean"] < 5 * max(apart["text"]["kl_mean"], 1e-6)


# faults


def sections_exchanged(path: Path, out: Path) -> Path:
    """The same file with the rope's sections for height and width by another division."""
    reader = gguf.GGUFReader(str(path))
    key = next(name for name in reader.fields if name.endswith("rope.dimension_sections"))
    values = reader.fields[key].contents()
    changed_copy(path, out, {})
    place = reader.fields[key]
    with out.open("r+b") as stream:
        content = bytearray(stream.read())
        old = np.array(values, dtype="<i4").tobytes()
        new = np.array([*values[1:3], values[0], *values[3:]], dtype="<i4").tobytes()
        assert old != new
        assert place is not None
        at = content.index(old)
        content[at : at + len(old)] = new
        stream.seek(0)
        stream.write(content)
    return out


def test_exchanged_rope_sections_are_found_and_named(benches: Callable[[str], Bench]) -> None:
    bench = benches("qwen2_vl")
    wrong = sections_exchanged(bench.export("f16"), bench.folder / "sections.gguf")
    record = bench.qc(wrong)
    assert "images.rope_sections" in failed(record)
    assert "rope_sections" in codes(record)
    text = bench.qc(wrong, images=0)
    assert not failed(text) & {"kl.mean", "images.kl"}


def edited(bench: Bench, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    wrong = bench.folder / name
    shutil.copytree(bench.baked, wrong)
    tensors = load_file(str(wrong / "model.safetensors"))
    change(tensors)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        str(wrong / "model.safetensors"),
        metadata={"format": "pt"},
    )
    return wrong


def test_a_projector_transposed_is_found_and_named(benches: Callable[[str], Bench]) -> None:
    bench = benches("llava")
    key = "multi_modal_projector.linear_2.weight"

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        (name,) = (n for n in tensors if n.endswith(key))
        tensors[name] = tensors[name].T.clone()

    record = bench.qc(edited(bench, "transposed", transpose))
    assert {"structure.untouched", "images.kl"} <= failed(record)
    assert codes(record) >= {"foreign_edit", "wrong_on_images"}
    assert any(key in found.text for found in record.diagnosis)


def test_exchanged_normalisation_constants_are_found_and_named(
    benches: Callable[[str], Bench],
) -> None:
    bench = benches("qwen2_vl")
    wrong = bench.folder / "constants"
    shutil.copytree(bench.baked, wrong)
    path = wrong / "preprocessor_config.json"
    content = json.loads(path.read_text())
    content["image_mean"], content["image_std"] = content["image_std"], content["image_mean"]
    path.write_text(json.dumps(content))
    record = bench.qc(wrong, level="files")
    assert failed(record) == {"structure.processor"}
    assert any("preprocessor_config.json" in found.text for found in record.diagnosis)
    out = bench.folder / "constants.gguf"
    export(ExportConfig(model=wrong, out=out))
    judged = bench.qc(bench.export("f16"), mmproj=out.with_name("mmproj-constants.gguf"))
    assert "export.mmproj_constants" in failed(judged)
    told = judged.check("export.mmproj_constants").detail
    assert "mean and standard deviation are exchanged" in told


def test_the_unbaked_models_vision_file_is_allowed_and_one_of_another_width_refused(
    benches: Callable[[str], Bench], tokenizer_files: Path, tmp_path: Path
) -> None:
    bench = benches("qwen2_vl")
    export(ExportConfig(model=bench.base, out=tmp_path / "base.gguf"))
    record = bench.qc(bench.export("f16"), mmproj=tmp_path / "mmproj-base.gguf")
    assert not {check for check in failed(record) if check.startswith("export.")}
    wide = build_wide(tmp_path / "wide", tokenizer_files)
    export(ExportConfig(model=wide, out=tmp_path / "wide.gguf"))
    with pytest.raises(ModelError, match="projects to 96 features"):
        bench.qc(bench.export("f16"), mmproj=tmp_path / "mmproj-wide.gguf")


def build_wide(directory: Path, tokenizer_files: Path) -> Path:
    """A Qwen2-VL whose text model is 96 wide."""
    import vision_models

    own = vision_models.KINDS["qwen2_vl"]
    wide = {
        **own.config,
        "text_config": {**own.config["text_config"], "hidden_size": 96},
        "vision_config": {**own.config["vision_config"], "hidden_size": 96},
    }
    import dataclasses

    vision_models.KINDS["wide"] = dataclasses.replace(own, config=wide)
    try:
        with pytest.MonkeyPatch.context() as patch:
            from transformers import AutoConfig

            real = AutoConfig.for_model
            patch.setattr(AutoConfig, "for_model", lambda _kind, **o: real("qwen2_vl", **o))
            return build("wide", directory, tokenizer_files)
    finally:
        del vision_models.KINDS["wide"]


def test_gates_that_the_training_kept_from_pictures_are_found_and_named(
    benches: Callable[[str], Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = benches("qwen2_vl")
    options: dict[str, Any] = {"model": bench.base, "rotations": bench.gates, "data": DATA}
    recorded = tmp_path / "right.safetensors"
    capture(CaptureConfig(**options, out=recorded, images=3, max_tokens=96))

    def judged(reference: Path) -> Record:
        return bench.qc(bench.baked, reference=reference, base=bench.base)

    right = judged(recorded)
    assert right.verdict is Verdict.PASS, [(c.id, c.detail) for c in right.checks if c.failed]
    with pytest.raises(DataError, match="no picture is there"):
        qc(QCConfig(reference=recorded, candidates=(bench.baked,), out=tmp_path / "blind"))

    own = GatedSource.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            GatedSource, "__init__", lambda self, *a, **_: own(self, *a, spare_pictures=True)
        )
        wrong = tmp_path / "wrong.safetensors"
        capture(CaptureConfig(**options, out=wrong, images=3, max_tokens=96))
    record = judged(wrong)
    assert "images.kl" in failed(record)
    assert "gates_off_images" in codes(record)


# the other commands


def test_calibrate_and_longtext_take_pictures(
    benches: Callable[[str], Bench], tmp_path: Path
) -> None:
    bench = benches("qwen2_vl")
    file = bench.export("q8_0")
    record = calibrate(
        CalibrateConfig(
            gguf=file, tokenizer=bench.baked, data=("builtin:images",), images=8,
            out=tmp_path / "calibrate", reference=bench.baked, allow_small=True, png=False,
            max_tokens=96,
        )
    )  # fmt: skip
    assert record.verdict is not Verdict.FAIL
    record = longtext(
        LongTextConfig(
            model=file, reference=bench.base, rotations=bench.gates, out=tmp_path / "long",
            tokenizer=bench.base, data=("builtin:images",), images=1, min_tokens=64,
            max_new_tokens=8, png=False,
        )
    )  # fmt: skip
    assert any("not continued freely" in notice for notice in record.notices)
    assert record.metrics["cases"]
