"""A right bake passes, every wrong one fails and is named. Judged on two architectures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from so8tqc.config import BakeConfig, QCConfig, RotationOptions
from so8tqc.errors import ConfigError, DataError, InputError
from so8tqc.records import Record, Verdict
from so8tqc.rotations.enums import Convention, Parametrization
from so8tqc.rotations.read import read_rotations
from so8tqc.rotations.rotation_set import Target
from so8tqc.services.bake import bake
from so8tqc.services.profiles import load_profile
from so8tqc.services.qc import qc

Edit = Callable[[dict[str, torch.Tensor]], None]
O_PROJ = "model.layers.{}.self_attn.o_proj.weight"


def dense(rotations_file: Path, layer: int) -> torch.Tensor:
    blocks = read_rotations(rotations_file).blocks[Target(layer)]
    return torch.block_diag(*torch.from_numpy(blocks.copy()))


def edited(source: Path, out: Path, edit: Edit) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(str(out / "model.safetensors"))
    edit(tensors)
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    return out


def judged(
    base: Path, gates: Path, candidate: Path, texts: Path, out: Path, **options: object
) -> Record:
    config = QCConfig(
        reference=base, rotations=gates, candidates=(candidate,), data=(str(texts),), out=out,
        max_tokens=64, resamples=200, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return qc(config)


def codes(record: Record) -> set[str]:
    return {diagnosis.code for diagnosis in record.diagnosis}


@pytest.fixture
def baked(llama: Path, make_gates: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """(base, gates, correct bake) of a tiny bfloat16 Llama."""
    gates = make_gates(llama)
    out = tmp_path / "baked"
    bake(BakeConfig(base=llama, rotations=gates, out=out))
    return llama, gates, out


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text", "qwen2_vl"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_correct_bake_passes(
    architecture: str,
    dtype: str,
    make_model: Callable[..., Path],
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    base = make_model(architecture, dtype)
    gates = make_gates(base, seed=7)
    bake(BakeConfig(base=base, rotations=gates, out=tmp_path / "baked"))
    record = judged(base, gates, tmp_path / "baked", texts_file, tmp_path / "qc")
    failed = [(c.id, c.value, c.limit) for c in record.checks if c.verdict is not Verdict.PASS]
    assert failed == []
    assert record.verdict is Verdict.PASS
    assert record.diagnosis == ()
    kl = record.check("kl.mean")
    assert kl.ci95 is not None
    assert kl.ci95[0] <= kl.value <= kl.ci95[1]
    assert kl.noise_floor is not None


def fault(name: str, base: Path, gates: Path, correct: Path, out: Path) -> Path:
    """A wrong bake, made by hand in float64 from its description."""
    weights = load_file(str(base / "model.safetensors"))
    r = {i: dense(gates, i) for i in range(3)}

    def store(layer: int, value: torch.Tensor) -> None:
        key = O_PROJ.format(layer)
        weights[key] = value.to(weights[key].dtype).contiguous()

    w = {i: weights[O_PROJ.format(i)].double() for i in range(3)}
    theta = read_rotations(gates).theta
    for i in range(3):
        cayley = read_rotations(gates, RotationOptions(parametrization=Parametrization.CAYLEY))
        blocks = read_rotations(gates).blocks[Target(i)]
        assert theta[Target(i)].shape == blocks.shape
        match name:
            case "never_baked":
                pass
            case "one_layer_missing":
                if i != 1:
                    store(i, w[i] @ r[i])
            case "transposed":
                store(i, w[i] @ r[i].T)
            case "transposed_in_one_layer":
                store(i, w[i] @ (r[i].T if i == 2 else r[i]))
            case "baked_twice":
                store(i, w[i] @ r[i] @ r[i])
            case "other_parametrization":
                other = torch.block_diag(*torch.from_numpy(cayley.blocks[Target(i)].copy()))
                store(i, w[i] @ other)
            case "layers_shifted":
                store(i, w[i] @ r[(i + 1) % 3])
            case "blocks_reversed":
                store(i, w[i] @ torch.block_diag(*torch.from_numpy(blocks[::-1].copy())))
            case "left_product":
                store(i, r[i] @ w[i])
            case "rounded_rotation":
                store(i, w[i] @ r[i].to(torch.bfloat16).double())
            case "a_row_unrotated":
                value = w[i] @ r[i]
                value[5] = w[i][5]
                store(i, value)
            case "a_block_unrotated":
                value = w[i] @ r[i]
                value[:, 16:24] = w[i][:, 16:24]
                store(i, value)
            case "nan":
                value = w[i] @ r[i]
                value[0, 0] = float("nan") if i == 0 else value[0, 0]
                store(i, value)
            case _:
                raise AssertionError(name)
    shutil.copytree(correct, out)
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    return out


FAULTS = {
    "never_baked": ("not_baked", (0, 1, 2)),
    "one_layer_missing": ("layer_missing", (1,)),
    "transposed": ("transposed", (0, 1, 2)),
    "transposed_in_one_layer": ("transposed", (2,)),
    "baked_twice": ("double_baked", (0, 1, 2)),
    "other_parametrization": ("wrong_parametrization", (0, 1, 2)),
    "layers_shifted": ("layers_permuted", (0, 1, 2)),
    "blocks_reversed": ("blocks_permuted", (0, 1, 2)),
    "left_product": ("wrong_site", (0, 1, 2)),
    "a_row_unrotated": ("foreign_edit", (0, 1, 2)),
    "a_block_unrotated": ("foreign_edit", (0, 1, 2)),
    "nan": ("non_finite", (0,)),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_fault_is_caught_and_named_from_the_files(
    name: str,
    dtype: str,
    make_model: Callable[..., Path],
    make_gates: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    base = make_model("llama", dtype)
    gates = make_gates(base)
    bake(BakeConfig(base=base, rotations=gates, out=tmp_path / "baked"))
    wrong = fault(name, base, gates, tmp_path / "baked", tmp_path / "wrong")
    record = judged(base, gates, wrong, texts_file, tmp_path / "qc", level="files")
    assert record.verdict is Verdict.FAIL
    code, layers = FAULTS[name]
    print([d.text for d in record.diagnosis])
    assert codes(record) == {code}
    assert record.diagnosis[0].layers == layers
    assert "so8tqc bake" in record.diagnosis[0].remedy or "--" in record.diagnosis[0].remedy


def test_a_rotation_rounded_before_the_fold_is_caught(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, correct = baked
    wrong = fault("rounded_rotation", base, gates, correct, tmp_path / "wrong")
    record = judged(base, gates, wrong, texts_file, tmp_path / "qc", level="files")
    assert record.check("algebra.exact").verdict is Verdict.FAIL


@pytest.mark.parametrize("name", ["never_baked", "transposed", "baked_twice", "layers_shifted"])
def test_logits_alone_catch_a_wrong_bake(
    name: str, baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, correct = baked
    wrong = fault(name, base, gates, correct, tmp_path / "wrong")
    record = judged(base, gates, wrong, texts_file, tmp_path / "qc")
    for check in ("kl.mean", "logits.max_abs", "logits.rms"):
        assert record.check(check).verdict is Verdict.FAIL, check
    kl = record.check("kl.mean")
    assert kl.value > 10 * kl.limit


def alter(name: str) -> Edit:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        match name:
            case "structure.untouched":
                tensors["model.layers.1.self_attn.q_proj.weight"] *= 1.01
            case "structure.missing":
                del tensors["model.norm.weight"]
            case "structure.added":
                tensors["extra.weight"] = torch.zeros(3)
            case "structure.shapes":
                tensors["model.norm.weight"] = torch.ones(65, dtype=torch.bfloat16)
            case "structure.dtypes":
                name_ = "model.norm.weight"
                tensors[name_] = tensors[name_].float()
            case "structure.gates":
                tensors["model.layers.0.self_attn.rotation_gate.theta"] = torch.zeros(8, 8, 8)

    return edit


@pytest.mark.parametrize(
    "check",
    [
        "structure.untouched", "structure.missing", "structure.added", "structure.shapes",
        "structure.dtypes", "structure.gates",
    ],
)  # fmt: skip
def test_other_edits_are_caught(
    check: str, baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, correct = baked
    wrong = edited(correct, tmp_path / "wrong", alter(check))
    record = judged(base, gates, wrong, texts_file, tmp_path / "qc", level="files")
    assert record.check(check).verdict is Verdict.FAIL
    assert record.check("algebra.exact").verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("file", "check"), [("config.json", "structure.config"),
                        ("tokenizer.json", "structure.tokenizer")],
)  # fmt: skip
def test_changed_companions_are_caught(
    file: str, check: str, baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, correct = baked
    shutil.copytree(correct, tmp_path / "wrong")
    path = tmp_path / "wrong" / file
    content = json.loads(path.read_text())
    content["rope_theta"] = 123.0
    path.write_text(json.dumps(content))
    record = judged(base, gates, tmp_path / "wrong", texts_file, tmp_path / "qc", level="files")
    assert record.check(check).verdict is Verdict.FAIL


def test_gates_without_effect_fail(
    llama: Path, make_gates: Callable[..., Path], texts_file: Path, tmp_path: Path
) -> None:
    gates = make_gates(llama, scale=1e-5)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    record = judged(llama, gates, tmp_path / "baked", texts_file, tmp_path / "qc")
    assert record.check("effect.kl").verdict is Verdict.FAIL


def test_the_wrong_convention_in_qc_is_a_failed_verdict(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, correct = baked
    record = judged(
        base, gates, correct, texts_file, tmp_path / "qc",
        rotation_options=RotationOptions(convention=Convention.ROW),
    )  # fmt: skip
    assert record.verdict is Verdict.FAIL
    assert codes(record) == {"transposed"}


def test_the_token_table_is_written(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, correct = baked
    record = judged(base, gates, correct, texts_file, tmp_path / "qc")
    with np.load(tmp_path / "qc" / "tokens.npz", allow_pickle=False) as table:
        assert table["baked/kl"].mean() == pytest.approx(record.check("kl.mean").value)
        assert set(table["texts"]) == {f"t{i}" for i in range(6)}
        assert table["position"].max() == 62


def test_strict_enforces_the_absolute_targets(
    baked: tuple[Path, Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, gates, correct = baked
    record = judged(base, gates, correct, texts_file, tmp_path / "qc", profile="strict")
    check = record.check("logits.max_abs")
    assert check.verdict is Verdict.FAIL
    assert check.limit == check.target == 1e-5


def test_unusable_inputs(
    baked: tuple[Path, Path, Path],
    make_model: Callable[..., Path],
    texts_file: Path,
    tmp_path: Path,
) -> None:
    base, gates, correct = baked
    short = tmp_path / "short.txt"
    short.write_text("\n")
    with pytest.raises(DataError, match="no text"):
        judged(base, gates, correct, short, tmp_path / "qc")
    with pytest.raises(InputError, match=r"no such|missing"):
        judged(base, gates, tmp_path / "nowhere", texts_file, tmp_path / "qc")
    with pytest.raises(ConfigError, match="no profile 'none'"):
        judged(base, gates, correct, texts_file, tmp_path / "qc", profile="none")


def test_profiles_are_data(tmp_path: Path) -> None:
    assert load_profile("default").for_gguf("IQ1_S") == load_profile("default").gguf["default"]
    own = tmp_path / "own.yaml"
    own.write_text("mine:\n  models: {kl.mean: {limit: 0.5}}\n  gguf: {default: {}}\n")
    assert load_profile(f"{own}:mine").models["kl.mean"].limit == 0.5
    assert load_profile(str(own)) == load_profile(f"{own}:mine")
    own.write_text("mine:\n  models: {kl.mean: {limit: 0.5, target: 1}}\n  gguf: {default: {}}\n")
    with pytest.raises(ConfigError, match=r"own.yaml.*either limit or target"):
        load_profile(str(own))
