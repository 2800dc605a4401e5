"""A capture judges as the live model does, and the document's recipe makes one."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from so8tqc.cli.main import run as run_main
from so8tqc.config import BakeConfig, CaptureConfig, ExportConfig, QCConfig
from so8tqc.errors import ConfigError, DataError, InputError
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention
from so8tqc.rotations.options import RotationOptions
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake
from so8tqc.services.capture import capture
from so8tqc.services.export.service import export
from so8tqc.services.qc.service import qc
from so8tqc.sources.capture import open_capture, vocabulary_digest

DOCUMENT = Path(__file__).parents[2] / "docs" / "capture.md"
Baked = tuple[Path, Path, Path]


def captured(baked: Baked, texts: Path, out: Path, **options: object) -> Path:
    capture(
        CaptureConfig(
            model=baked[0],
            rotations=baked[1],
            data=(str(texts),),
            out=out,
            max_tokens=64,
            **options,
        )  # type: ignore[arg-type]
    )
    return out


def judged(reference: Path, candidate: Path, out: Path, **options: object) -> Record:
    return qc(
        QCConfig(reference=reference, candidates=(candidate,), out=out, resamples=200, **options)  # type: ignore[arg-type]
    )


def table(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "tokens.npz", allow_pickle=False) as stored:
        return dict(stored)


def values(record: Record) -> dict[str, float | None]:
    return {c.id: c.value for c in record.checks}


def test_a_float32_capture_judges_bit_for_bit_as_the_live_model(
    baked: Baked, texts_file: Path, tmp_path: Path
) -> None:
    base, gates, candidate = baked
    recording = captured(baked, texts_file, tmp_path / "ref.safetensors")
    live = judged(
        base, candidate, tmp_path / "live", rotations=gates, data=(str(texts_file),), max_tokens=64
    )
    alone = judged(recording, candidate, tmp_path / "alone")
    both = judged(recording, candidate, tmp_path / "both", base=base, rotations=gates)

    expected = table(tmp_path / "live")
    for out in ("alone", "both"):
        got = table(tmp_path / out)
        assert got.keys() == expected.keys()
        for name, column in expected.items():
            np.testing.assert_array_equal(got[name], column, err_msg=name)
    of_base = {id_ for id_ in values(live) if id_.startswith(("rotation.", "algebra.", "effect."))}
    assert of_base
    assert not of_base & values(alone).keys()
    assert {"kl.mean", "calibration.ece"} <= values(alone).keys()
    assert values(both) == values(live) | {"structure.vocabulary": 0.0}
    assert live.verdict is both.verdict is Verdict.PASS
    assert both.metrics["noise_floor"] == live.metrics["noise_floor"]
    assert both.metrics["capture"]["gated"]["kl_max"] == 0  # type: ignore[index,call-overload]
    assert [c.limit for c in both.checks if c.id == "kl.mean"] == [
        c.limit for c in live.checks if c.id == "kl.mean"
    ]
    assert "no noise floor" in alone.notices[-1]
    assert both.notices == live.notices


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_capture_errs_by_its_rounding_and_still_passes_a_right_bake(
    dtype: str, baked: Baked, texts_file: Path, tmp_path: Path
) -> None:
    base, gates, _ = baked
    exact = captured(baked, texts_file, tmp_path / "exact.safetensors")
    rounded = tmp_path / "rounded.safetensors"
    with safe_open(str(exact), framework="pt") as handle:
        metadata = handle.metadata()
    tensors = {
        name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(str(exact)).items()
    }
    save_file(tensors, str(rounded), metadata=metadata)
    if dtype == "float16":
        record = capture(
            CaptureConfig(
                model=base,
                rotations=gates,
                data=(str(texts_file),),
                max_tokens=64,
                out=tmp_path / "own.safetensors",
                dtype="float16",
            )
        )
        for name, tensor in load_file(str(tmp_path / "own.safetensors")).items():
            torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)
        largest = max(
            float((t.float() - load_file(str(exact))[n]).abs().max()) for n, t in tensors.items()
        )
        assert record.metrics["rounding"] == largest

    # baked in float32, so that the capture's rounding is all the noise floor there is
    candidate = tmp_path / "baked-f32"
    bake(BakeConfig(base=base, rotations=gates, out=candidate, baked_dtype="float32"))
    judged(exact, candidate, tmp_path / "a")
    both = judged(rounded, candidate, tmp_path / "b", base=base, rotations=gates)
    assert [(c.id, c.value, c.limit) for c in both.checks if c.verdict is Verdict.FAIL] == []
    a, b = table(tmp_path / "a"), table(tmp_path / "b")
    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    biggest = max(float(t.abs().max()) for n, t in tensors.items() if n.startswith("logits"))
    for column in ("max_abs_logit", "max_logit_reference"):
        assert np.abs(a[f"baked-f32/{column}"] - b[f"baked-f32/{column}"]).max() <= u * biggest
    # |Δ ln p| ≤ 2 max|Δz|, as a log-softmax moves by at most the logit's and the normaliser's
    difference = np.abs(a["baked-f32/nll_reference"] - b["baked-f32/nll_reference"])
    assert 0 < difference.max() <= 2 * u * biggest


def recipe() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return str(block)


def test_the_recipe_is_short_and_needs_torch_and_safetensors_alone() -> None:
    lines = [line for line in recipe().splitlines() if line.strip()]
    assert len(lines) <= 16
    imports = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(recipe()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert imports == {"json", "torch", "safetensors"}


def trained(base: Path, gates: Path) -> torch.nn.Module:
    """Gates by hand, as training code has them: x ↦ R·x before each o_proj."""
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    for i, layer in enumerate(model.model.layers):
        blocks = torch.from_numpy(read_rotations(gates).blocks[Target(i)].copy())
        rotation = torch.block_diag(*blocks).float()
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, x, r=rotation: (x[0] @ r.T,))
    return model


def run_recipe(base: Path, gates: Path, texts: Path, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    items = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    token_ids = {item["id"]: tokenizer(item["text"])["input_ids"] for item in items}
    code = recipe().replace('"ref.safetensors"', "target")
    assert code != recipe()
    exec(
        code,
        {
            "model": trained(base, gates),
            "token_ids": token_ids,
            "target": str(folder / "ref.safetensors"),
        },
    )
    return folder / "ref.safetensors"


@pytest.mark.parametrize("convention", [Convention.COLUMN, Convention.ROW])
def test_the_recipe_makes_a_reference_that_no_wrong_assumption_can_fool(
    convention: Convention, baked: Baked, texts_file: Path, tmp_path: Path
) -> None:
    """Row convention on both sides, bake and qc, agrees with itself; the recording does not."""
    base, gates, _ = baked
    recording = run_recipe(base, gates, texts_file, tmp_path)
    options = RotationOptions(convention=convention)
    out = tmp_path / "as-told"
    bake(BakeConfig(base=base, rotations=gates, out=out, convention=convention))
    record = judged(
        recording, out, tmp_path / "qc", base=base, rotations=gates, rotation_options=options
    )
    failed = {c.id for c in record.checks if c.verdict is Verdict.FAIL}
    assert record.check("algebra.exact").verdict is Verdict.PASS
    told = [n for n in record.notices if "nats from the capture" in n]
    if convention is Convention.COLUMN:
        assert (failed, told) == (set(), [])
        skipped = record.check("structure.vocabulary")
        assert skipped.verdict is Verdict.SKIP
        assert "so8t.vocabulary_sha256" in skipped.detail
    else:
        assert {"kl.mean", "logits.max_abs", "kl.top1"} <= failed
        assert len(told) == 1


def test_the_recorded_vocabulary_is_the_candidates(
    baked: Baked, texts_file: Path, tmp_path: Path
) -> None:
    base, _, candidate = baked
    recording = captured(baked, texts_file, tmp_path / "ref.safetensors")
    swapped = tmp_path / "swapped"
    shutil.copytree(candidate, swapped)
    file = swapped / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content), encoding="utf-8")
    good, wrong = (
        judged(recording, path, tmp_path / "qc").check("structure.vocabulary")
        for path in (candidate, swapped)
    )
    assert (good.verdict, wrong.verdict) == (Verdict.PASS, Verdict.FAIL)
    with safe_open(str(recording), framework="pt") as handle:
        written = handle.metadata()["so8t.vocabulary_sha256"]
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    assert written == vocabulary_digest(tokenizer)
    assert "tokens.npz" in {p.name for p in (tmp_path / "qc").iterdir()}


def test_texts_come_from_the_capture_and_may_be_shortened(
    baked: Baked, texts_file: Path, tmp_path: Path
) -> None:
    _, _, candidate = baked
    recording = captured(baked, texts_file, tmp_path / "ref.safetensors")
    same = judged(recording, candidate, tmp_path / "same", data=(str(texts_file),))
    assert values(same) == values(judged(recording, candidate, tmp_path / "own"))
    assert table(tmp_path / "own")["position"].max() == 62
    judged(recording, candidate, tmp_path / "short", max_tokens=20)
    short, own = table(tmp_path / "short"), table(tmp_path / "own")
    assert short["position"].max() == 18
    np.testing.assert_allclose(
        short["baked/nll_candidate"],
        own["baked/nll_candidate"][own["position"] <= 18],
        rtol=1e-4,
    )
    np.testing.assert_array_equal(
        short["baked/nll_reference"], own["baked/nll_reference"][own["position"] <= 18]
    )
    other = tmp_path / "other.txt"
    other.write_text("Something else altogether.", encoding="utf-8")
    with pytest.raises(DataError, match="holds 6 texts, the data 1"):
        judged(recording, candidate, tmp_path / "qc", data=(str(other),))


def test_what_a_capture_cannot_be_used_for(
    baked: Baked, make_model: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, candidate = baked
    recording = captured(baked, texts_file, tmp_path / "ref.safetensors")
    out = tmp_path / "qc"
    with pytest.raises(InputError, match=r"not to a capture\. Give that directory too: --base"):
        judged(recording, candidate, out, rotations=gates)
    for reference, more in (
        (recording, {"base": base}),
        (base, {"base": base, "rotations": gates}),
    ):
        with pytest.raises(ConfigError, match="base is for a capture"):
            judged(reference, candidate, out, **more)
    with pytest.raises(InputError, match="nothing can be judged from files alone"):
        judged(recording, candidate, out, level="files")
    with pytest.raises(DataError, match="not a capture"):
        judged(base / "model.safetensors", candidate, out)
    narrow = tmp_path / "narrow.safetensors"
    tensors = load_file(str(recording))
    with safe_open(str(recording), framework="pt") as handle:
        metadata = handle.metadata()
    widened = {
        n: torch.nn.functional.pad(t, (0, 3)) if t.ndim == 2 else t for n, t in tensors.items()
    }
    save_file(widened, str(narrow), metadata=metadata)
    with pytest.raises(InputError, match="has 512 vocabulary entries, reference has 515"):
        judged(narrow, candidate, out)


def test_capture_refuses_before_it_runs(baked: Baked, texts_file: Path, tmp_path: Path) -> None:
    base, gates, _ = baked
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        captured(baked, texts_file, tmp_path / "ref.bin")
    with pytest.raises(InputError, match="not to a GGUF file"):
        capture(
            CaptureConfig(
                model=tmp_path / "m.gguf",
                rotations=gates,
                data=(str(texts_file),),
                out=tmp_path / "ref.safetensors",
            )
        )
    with pytest.raises(DataError, match="no such data file"):
        captured(baked, tmp_path / "absent.txt", tmp_path / "ref.safetensors")
    assert list(tmp_path.glob("*.safetensors")) == [gates]
    assert base.is_dir()


def test_the_same_inputs_make_the_same_bytes(
    baked: Baked, texts_file: Path, tmp_path: Path
) -> None:
    one, two = (captured(baked, texts_file, tmp_path / f"{i}.safetensors") for i in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert json.loads(open_capture(one).source).keys() == {"model", "rotations"}


@pytest.mark.llama
def test_a_gguf_is_captured_and_judged(baked: Baked, texts_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    _, _, candidate = baked
    gguf = tmp_path / "model-f32.gguf"
    export(ExportConfig(model=candidate, out=gguf, type="f32"))
    recording = tmp_path / "gguf.safetensors"
    capture(
        CaptureConfig(
            model=gguf, tokenizer=candidate, data=(str(texts_file),), out=recording, max_tokens=64
        )
    )
    record = judged(recording, gguf, tmp_path / "qc")
    assert record.verdict is Verdict.PASS
    assert record.check("kl.mean").value == pytest.approx(0, abs=1e-12)


def test_capture_and_qc_from_the_command_line(
    baked: Baked, texts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, gates, candidate = baked
    recording = tmp_path / "ref.safetensors"
    arguments = [
        "capture",
        str(base),
        "--rotations",
        str(gates),
        "--data",
        str(texts_file),
        "--max-tokens",
        "48",
        "--out",
        str(recording),
    ]
    assert run_main([*arguments, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert (metrics["texts"], metrics["vocab_size"], metrics["rounding"]) == (6, 512, 0)
    assert metrics["bytes"] == recording.stat().st_size
    assert (tmp_path / "ref.safetensors.record.json").is_file()
    qc_arguments = [
        "qc",
        "--reference",
        str(recording),
        "--base",
        str(base),
        "--rotations",
        str(gates),
        "--candidate",
        str(candidate),
        "--out",
        str(tmp_path / "qc"),
    ]
    assert run_main(qc_arguments) == 0
    assert "qc: pass" in capsys.readouterr().out
    assert run_main([*qc_arguments, "--convention", "row", "--quiet"]) == 1
    assert run_main([*arguments, "--dtype", "int8"]) == 2

    content = bytearray(recording.read_bytes())
    content[-48 * 512 * 4 : -48 * 512 * 4 + 4] = np.float32("nan").tobytes()
    recording.write_bytes(content)
    capsys.readouterr()
    assert run_main(qc_arguments) == 3
    message = capsys.readouterr().err
    assert re.search(r"error .*text t5 has a non-finite logit at\s+position 0", message)
    recording.write_bytes(content[:-1])
    assert run_main([*qc_arguments, "--quiet"]) == 3
