"""The vision tower's file: six types of models, their tensors, constants, and what is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.cli.main import run as run_main
from so8tqc.config import AttestConfig, BakeConfig, ExportConfig, RunConfig, VerifyConfig
from so8tqc.errors import ModelError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.mmproj import mmproj_beside, open_mmproj, require_same_width
from so8tqc.gguf.rewrite import changed_copy
from so8tqc.llama.vendor import find_converter, is_vendored
from so8tqc.records import Check, Record, Verdict
from so8tqc.services.attest.service import attest
from so8tqc.services.attest.verify_statement import verify_statement
from so8tqc.services.bake import bake
from so8tqc.services.export.comparison import TensorComparison
from so8tqc.services.export.service import export
from so8tqc.services.export.vision import Vision, vision_checks, write_vision
from so8tqc.services.run.pipeline import run
from vision_models import KINDS

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

Maker = Callable[[str], Path]


def of_vision(record: Record) -> dict[str, Verdict]:
    """Verdicts on the vision tower's file."""
    return {c.id: c.verdict for c in record.checks if c.subject.startswith("mmproj-")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type_", ["f16", "q8_0"])
def test_every_type_is_written_beside_its_text_and_proved(
    kind: str, type_: Any, make_vision_model: Maker, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    record = export(ExportConfig(model=make_vision_model(kind), out=out, type=type_))
    assert record.verdict is Verdict.PASS, [c.detail for c in record.checks if c.failed]
    wanted = ("tensors", "missing", "extra", "mmproj_constants", "mmproj_width")
    assert of_vision(record) == dict.fromkeys((f"export.{w}" for w in wanted), Verdict.PASS)
    assert not any(check.id == "export.unmapped" for check in record.checks)
    mmproj = open_mmproj(tmp_path / "mmproj-x.gguf")
    assert record.outputs["mmproj"].path == str(tmp_path / "mmproj-x.gguf")
    assert record.metrics["mmproj"]["file_type"] == type_.upper()
    assert mmproj.width == 64
    source = load_file(str(make_vision_model(kind) / "model.safetensors"))
    # an oracle of its own: the patches' convolution
    (name,) = (n for n in source if n.endswith(("patch_embed.proj.weight", "patch_conv.weight",
                                                "patch_embedding.weight")))  # fmt: skip
    patches = source[name].float().numpy()
    stored = mmproj.gguf.tensors["v.patch_embd.weight"]
    expected = patches[:, :, 0] if patches.ndim == 5 else patches
    if stored.type == "F16":  # the converter keeps it F32 in other files
        expected = expected.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(stored.values(), expected)


@pytest.mark.parametrize("type_", ["bf16", "f32"])
def test_the_other_types(type_: Any, make_vision_model: Maker, tmp_path: Path) -> None:
    model = make_vision_model("qwen2_vl")
    export(ExportConfig(model=model, out=tmp_path / "x.gguf", type=type_))
    tensor = open_gguf(tmp_path / "mmproj-x.gguf").tensors["v.blk.0.attn_out.weight"]
    assert tensor.type == type_.upper()
    source = load_file(str(model / "model.safetensors"))["visual.blocks.0.attn.proj.weight"]
    np.testing.assert_array_equal(tensor.values(), source.float().numpy())


def test_the_bakes_vision_tower_is_the_bases(
    make_vision_model: Maker, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_vision_model("qwen2_vl")
    bake(BakeConfig(base=base, rotations=make_gates(base), out=tmp_path / base.name))
    for directory, out in ((base, "base.gguf"), (tmp_path / base.name, "baked.gguf")):
        export(ExportConfig(model=directory, out=tmp_path / out))
    base_file, baked = (tmp_path / f"mmproj-{name}.gguf" for name in ("base", "baked"))
    assert base_file.read_bytes() == baked.read_bytes()


def test_text_only_leaves_it_out_and_says_so(make_vision_model: Maker, tmp_path: Path) -> None:
    config = ExportConfig(
        model=make_vision_model("qwen2_vl"), out=tmp_path / "x.gguf", text_only=True
    )
    record = export(config)
    assert not mmproj_beside(config.out).exists()
    assert record.check("export.mmproj").verdict is Verdict.SKIP
    assert any("Text only, as asked" in notice for notice in record.notices)
    assert "mmproj" not in record.outputs


def test_without_the_processors_constants_there_is_no_file_and_that_is_said(
    make_vision_model: Maker, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_vision_model("gemma3"), model)
    (model / "preprocessor_config.json").unlink()
    record = export(ExportConfig(model=model, out=tmp_path / "x.gguf"))
    assert record.check("export.mmproj").verdict is Verdict.SKIP
    assert any("image_mean" in notice for notice in record.notices)
    assert not (tmp_path / "mmproj-x.gguf").exists()


def test_a_text_model_has_no_such_check(make_model: Callable[..., Path], tmp_path: Path) -> None:
    record = export(ExportConfig(model=make_model("llama"), out=tmp_path / "x.gguf"))
    assert not any(check.id.startswith("export.mmproj") for check in record.checks)


def test_a_tower_that_the_converter_does_not_know_is_named(
    make_vision_model: Maker, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_vision_model("qwen2_vl"), model)
    config = json.loads((model / "config.json").read_text())
    config["vision_config"]["architectures"] = ["NobodyKnowsThisVisionModel"]
    (model / "config.json").write_text(json.dumps(config))
    record = export(ExportConfig(model=model, out=tmp_path / "x.gguf"))
    assert record.check("export.mmproj").verdict is Verdict.SKIP
    assert "NobodyKnowsThisVisionModel is not supported" in record.check("export.mmproj").detail


# faults


@pytest.fixture(scope="module")
def written(
    make_vision_model: Maker, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Vision, Path]:
    """A Qwen2-VL, its vision file, and the text file beside it."""
    folder = tmp_path_factory.mktemp("written")
    checkpoint = open_checkpoint(make_vision_model("qwen2_vl"))
    export(ExportConfig(model=checkpoint.directory, out=folder / "x.gguf"))
    vision = write_vision(
        checkpoint, find_converter(), folder / "mmproj-x.gguf", "f16", (), folder / "log"
    )
    return checkpoint, vision, folder / "x.gguf"


def judged(written: tuple[Checkpoint, Vision, Path], file: Path) -> dict[str, Check]:
    """The checks on another file in the place of the vision file."""
    checkpoint, vision, text = written
    unmapped = [name for name in checkpoint.tensors if name.startswith("visual.")]
    other = dataclasses.replace(vision, mmproj=open_mmproj(file))
    of_text = TensorComparison("qwen2vl", unmapped=unmapped, traced=True)
    return {c.id: c for c in vision_checks(checkpoint, other, open_gguf(text), of_text)}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.failed}


def edited(path: Path, source: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a vision file with other tensors or keys, written by gguf-py."""
    reader = gguf.GGUFReader(str(source))
    content: dict[str, Any] = {
        "tensors": {t.name: (dequantize(t.data, t.tensor_type), t.tensor_type)
                    for t in reader.tensors},
        "mean": reader.fields["clip.vision.image_mean"].contents(),
        "std": reader.fields["clip.vision.image_std"].contents(),
        "width": reader.fields["clip.vision.projection_dim"].contents(),
    }  # fmt: skip
    change(content)
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_clip_projector_type("qwen2vl_merger")
    writer.add_vision_image_mean(content["mean"])
    writer.add_vision_image_std(content["std"])
    writer.add_vision_projection_dim(content["width"])
    for name, (values, kind) in content["tensors"].items():
        writer.add_tensor(name, quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PROJECTOR = "mm.0.weight"


def test_the_file_as_it_was_written_is_right(
    written: tuple[Checkpoint, Vision, Path], tmp_path: Path
) -> None:
    same = edited(tmp_path / "mmproj-y.gguf", written[1].mmproj.gguf.path, lambda _: None)
    assert failed(judged(written, same)) == set()


def test_a_projector_transposed_is_named(
    written: tuple[Checkpoint, Vision, Path], tmp_path: Path
) -> None:
    def transpose(content: dict[str, Any]) -> None:
        values, kind = content["tensors"][PROJECTOR]
        assert values.shape[0] == values.shape[1]  # by its shape it would not show
        content["tensors"][PROJECTOR] = (values.T, kind)

    path = written[1].mmproj.gguf.path
    checks = judged(written, edited(tmp_path / "mmproj-y.gguf", path, transpose))
    assert failed(checks) == {"export.tensors"}
    assert f"{PROJECTOR} (stored transposed)" in checks["export.tensors"].detail


@pytest.mark.parametrize(
    ("change", "wanted", "words"),
    [
        (lambda c: c.update(mean=c["std"], std=c["mean"]), "export.mmproj_constants",
         "mean and standard deviation are exchanged"),
        (lambda c: c.update(mean=c["mean"][::-1], std=c["std"][::-1]), "export.mmproj_constants",
         "red and blue are exchanged"),
        (lambda c: c.update(mean=[0.5, 0.45, 0.4]), "export.mmproj_constants", "image_mean"),
        (lambda c: c.update(width=32), "export.mmproj_width", "32 features"),
        (lambda c: c["tensors"].pop("v.blk.0.ln1.bias"), "export.missing", "v.blk.0.ln1.bias"),
        (lambda c: c["tensors"].update(more=c["tensors"]["v.post_ln.bias"]),
         "export.extra", "more"),
        (lambda c: c["tensors"]["v.blk.1.attn_q.weight"][0].__iadd__(0.25), "export.tensors",
         "v.blk.1.attn_q.weight"),
    ],
)  # fmt: skip
def test_every_fault_of_the_file_has_its_check(
    change: Callable[[dict[str, Any]], None],
    wanted: str,
    words: str,
    written: tuple[Checkpoint, Vision, Path],
    tmp_path: Path,
) -> None:
    path = written[1].mmproj.gguf.path
    checks = judged(written, edited(tmp_path / "mmproj-y.gguf", path, change))
    assert failed(checks) == {wanted}
    assert words in checks[wanted].detail


def test_a_source_tensor_that_is_in_neither_file_is_missing(
    make_vision_model: Maker, tmp_path: Path
) -> None:
    """A tensor beside the ones that the class knows: the converter refuses or drops it."""
    model = tmp_path / "model"
    shutil.copytree(make_vision_model("gemma3"), model)
    tensors = load_file(str(model / "model.safetensors"))
    tensors["vision_tower.vision_model.head.probe"] = tensors["vision_tower.post_layernorm.bias"]
    save_file(
        {k: v.clone() for k, v in tensors.items()},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    record = export(ExportConfig(model=model, out=tmp_path / "x.gguf"))
    (check,) = (c for c in record.checks if c.id == "export.missing" and c.subject)
    assert check.failed
    assert "head.probe" in check.detail


def test_a_vision_tower_of_another_width_is_refused(
    written: tuple[Checkpoint, Vision, Path], tmp_path: Path
) -> None:
    path = written[1].mmproj.gguf.path
    other = edited(tmp_path / "y.gguf", path, lambda c: c.update(width=32))
    with pytest.raises(ModelError, match="projects to 32 features"):
        require_same_width(open_mmproj(other), open_gguf(written[2]))
    require_same_width(open_mmproj(path), open_gguf(written[2]))
    with pytest.raises(ModelError, match="where a file of a vision tower"):
        open_mmproj(written[2])


def test_both_files_are_attested_and_made_again(
    make_vision_model: Maker,
    make_gates: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, out = make_vision_model("qwen2_vl"), tmp_path / "run"
    gates = make_gates(base)
    config = RunConfig(name="tiny", base=str(base), rotations=str(gates), out=out)
    for stage in ("bake", "export"):
        run(config, only=stage)
    statement = attest(AttestConfig(directory=out))
    assert {"export/tiny-F16.gguf", "export/mmproj-tiny-F16.gguf"} <= set(
        statement.metrics["subjects"]
    )
    again = VerifyConfig(file=out / "attestation.json", base=base, rotations=gates)
    record = verify_statement(again)
    assert record.metrics["links"]["export"]["found"] == "identical", record.metrics["links"]
    assert record.verdict is Verdict.PASS
    file = out / "export" / "mmproj-tiny-F16.gguf"
    changed_copy(file, tmp_path / "changed.gguf", {"so8t.note": "changed"})
    shutil.copy(tmp_path / "changed.gguf", file)
    assert verify_statement(again).check("statement.files").failed
    assert run_main(["verify", str(again.file), "--level", "files"]) == 1
    assert "mmproj-tiny-F16.gguf" in capsys.readouterr().out
