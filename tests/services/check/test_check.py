"""``check`` of what commands made, and of a broken copy of each: every answer is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.cli.main import run as run_main
from so8tqc.config import BakeConfig, ExportConfig, QuantizeConfig
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_files import record_beside, write_record
from so8tqc.services.attest.chain import follow
from so8tqc.services.bake import bake

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run ``check`` and return its record, with the exit code as ``code``."""

    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        code = run_main(["check", *map(str, arguments), "--json", "--quiet"])
        out = capsys.readouterr().out
        found: dict[str, Any] = json.loads(out) if out else {}
        return found | {"code": code}

    return run


def failed(found: dict[str, Any]) -> set[str]:
    return {check["id"] for check in found["checks"] if check["verdict"] == "fail"}


def codes(found: dict[str, Any]) -> list[str]:
    return [diagnosis["code"] for diagnosis in found["diagnosis"]]


def altered(directory: Path, value: float) -> None:
    """One weight of an attention output becomes another."""
    checkpoint = open_checkpoint(directory)
    entry = next(e for n, e in checkpoint.tensors.items() if "o_proj" in n)
    with entry.file.open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(np.float32(value).tobytes()[2:])  # bfloat16


def test_a_bake_is_proved_by_what_its_provenance_names(
    baked: tuple[Path, Path, Path], ask: Ask
) -> None:
    base, gates, directory = baked
    found = ask(directory, "--level", "files")
    assert found["code"] == 0
    assert found["metrics"]["proved"]
    assert "exact fold" in found["metrics"]["trust"]
    assert found["metrics"]["found"]["base"] == str(base)
    assert found["metrics"]["found"]["rotations"] == str(gates)
    assert found["metrics"]["next"].startswith(f"so8tqc export {directory} --out ")


def test_a_small_one_is_run_too(baked: tuple[Path, Path, Path], texts_file: Path, ask: Ask) -> None:
    found = ask(baked[2], "--data", texts_file, "--max-tokens", "32")
    assert found["code"] == 0
    assert {"kl.mean", "effect.kl"} <= {check["id"] for check in found["checks"]}
    assert "mean KL" in found["metrics"]["trust"]


def test_a_weight_that_was_changed_is_found(baked: tuple[Path, Path, Path], ask: Ask) -> None:
    altered(baked[2], 1.0)
    found = ask(baked[2])
    assert found["code"] == 1
    assert {"file.recorded", "algebra.exact"} <= failed(found)
    assert "kl.mean" not in {check["id"] for check in found["checks"]}  # it need not be run
    assert found["metrics"]["next"].startswith(f"so8tqc bake {baked[0]} {baked[1]} --out ")
    altered(baked[2], float("nan"))
    assert "file.finite" in failed(ask(baked[2]))


def test_a_base_under_the_provenance_of_a_bake_is_told_as_not_baked(
    baked: tuple[Path, Path, Path], ask: Ask
) -> None:
    base, _, directory = baked
    for file in base.glob("*.safetensors"):
        shutil.copy(file, directory / file.name)
    found = ask(directory)
    assert found["code"] == 1
    assert "not_baked" in codes(found)


def test_the_wrong_gates_are_found(
    baked: tuple[Path, Path, Path], make_gates: Callable[..., Path], tmp_path: Path, ask: Ask
) -> None:
    base, _, directory = baked
    other = make_gates(base, "other.safetensors", seed=9)
    found = ask(directory, "--rotations", other, "--level", "files")
    assert found["code"] == 1
    assert "algebra.exact" in failed(found)


def test_what_has_moved_together_is_found_and_what_is_gone_is_named(
    baked: tuple[Path, Path, Path], tmp_path: Path, ask: Ask
) -> None:
    base, gates, _ = baked
    old = tmp_path / "old"
    old.mkdir()
    shutil.copytree(base, old / "model")
    shutil.copy(gates, old / "its-gates.safetensors")
    bake(BakeConfig(base=old / "model", rotations=old / "its-gates.safetensors", out=old / "b"))
    old.rename(tmp_path / "new")
    found = ask(tmp_path / "new" / "b", "--level", "files")
    assert found["metrics"]["proved"]
    assert found["metrics"]["found"]["base"] == str(tmp_path / "new" / "model")
    (tmp_path / "new" / "its-gates.safetensors").unlink()
    found = ask(tmp_path / "new" / "b", "--level", "files")
    assert found["code"] == 0  # its bytes are those that were recorded
    assert not found["metrics"]["proved"]
    assert "its-gates.safetensors not here" in " ".join(found["metrics"]["unseen"])


def test_a_plain_model_is_sound_and_nothing_more(llama: Path, ask: Ask) -> None:
    found = ask(llama)
    assert found["code"] == 0
    assert not found["metrics"]["proved"]
    assert "no so8tqc.json" in " ".join(found["metrics"]["unseen"])


@pytest.mark.parametrize("swapped", [False, True])
def test_base_and_bake_are_told_apart_in_either_order(
    swapped: bool, baked: tuple[Path, Path, Path], ask: Ask
) -> None:
    base, _, directory = baked
    pair = (directory, base) if swapped else (base, directory)
    found = ask(*pair, "--level", "files")
    assert found["code"] == 0
    assert found["metrics"]["proved"]
    assert found["metrics"]["what"].startswith(f"{directory.name}:")
    assert f"judged by {base.name}" in found["metrics"]["what"]


@pytest.mark.parametrize("swapped", [False, True])
def test_base_and_gates_fit_or_do_not(
    swapped: bool, llama: Path, make_gates: Callable[..., Path], ask: Ask
) -> None:
    def pair(gates: Path) -> tuple[Path, Path]:
        return (gates, llama) if swapped else (llama, gates)

    good = make_gates(llama)
    found = ask(*pair(good))
    assert found["code"] == 0
    assert found["metrics"]["next"].startswith(f"so8tqc bake {llama} {good} --out ")
    assert ask(*pair(make_gates(llama, "few.safetensors", layers=2)))["code"] == 3


def test_two_that_cannot_be_compared(llama: Path, texts_file: Path, ask: Ask) -> None:
    found = ask(llama, texts_file)
    assert found["code"] == 3
    assert "not a model" in found["metrics"]["trust"]
    assert ask(llama, llama.parent / "gone")["code"] == 3


@pytest.fixture
def chain(baked: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """F16 and Q8_0 of the bake, each with the record that its command leaves."""
    from so8tqc.services.export.service import export
    from so8tqc.services.quantize.service import quantize

    f16 = tmp_path / "tiny-F16.gguf"
    write_record(record_beside(f16), export(ExportConfig(model=baked[2], out=f16)))
    out = tmp_path / "q"
    record = quantize(QuantizeConfig(gguf=f16, types=("Q8_0",), out=out))
    write_record(out / "record.json", record)
    return f16, Path(record.outputs["Q8_0"].path)


needs_libllama = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]


class TestFiles:
    pytestmark = needs_libllama

    def test_a_quantized_file_is_followed_back_and_proved(
        self, chain: tuple[Path, Path], baked: tuple[Path, Path, Path], ask: Ask, texts_file: Path
    ) -> None:
        f16, q8 = chain
        way = follow(q8)
        assert [step.kind for step in way.steps] == ["quantize", "export"]
        assert (way.base, way.rotations, way.end) == (baked[0], baked[1], "")
        found = ask(q8, "--data", texts_file, "--max-tokens", "32")
        ids = {check["id"] for check in found["checks"]}
        assert {"file.recorded", "file.tokens", "algebra.nearest", "derivation.tensors"} <= ids
        assert found["metrics"]["proved"] == (found["code"] == 0)
        assert "made again from tiny-F16.gguf" in found["metrics"]["trust"] or failed(found) <= {
            "kl.mean", "kl.top1", "survival.kl",
        }  # fmt: skip
        found = ask(f16, "--level", "files")
        assert found["code"] == 0
        assert found["metrics"]["next"].startswith(f"so8tqc quantize {f16} --type ")
        serve = found["metrics"]["serve"].split()
        assert serve == ["so8tqc", "serve-config", str(f16), "--for", "llama-server"]
        assert run_main(serve[1:]) == 0

    def test_a_changed_file_is_found_and_its_tensor_named(
        self, chain: tuple[Path, Path], ask: Ask
    ) -> None:
        assert "serve" in ask(chain[1], "--level", "files")["metrics"]
        reader = gguf.GGUFReader(str(chain[1]), "r+")
        tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
        tensor.data[0, 5] += 1
        reader.data.flush()
        found = ask(chain[1], "--level", "files")
        assert found["code"] == 1
        assert failed(found) == {"file.recorded", "tensors.honest"}
        assert "blk.1.ffn_up.weight" in found["metrics"]["trust"]
        assert "serve" not in found["metrics"]
        assert found["metrics"]["next"].startswith(f"so8tqc quantize {chain[0]} --type Q8_0 ")

    def test_a_cut_file_says_how_to_make_it_again(self, chain: tuple[Path, Path], ask: Ask) -> None:
        chain[1].write_bytes(chain[1].read_bytes()[:-500])
        found = ask(chain[1])
        assert found["code"] == 3
        assert found["metrics"]["next"].startswith(f"so8tqc quantize {chain[0]} --type Q8_0 ")

    def test_the_vocabulary_of_another_model_is_found(
        self, chain: tuple[Path, Path], baked: tuple[Path, Path, Path], tmp_path: Path, ask: Ask
    ) -> None:
        other = tmp_path / "other"
        other.mkdir()
        content = json.loads((baked[0] / "tokenizer.json").read_text())
        names = list(content["model"]["vocab"])
        content["model"]["vocab"] = {n: i for i, n in enumerate([*names[:300], *names[:299:-1]])}
        (other / "tokenizer.json").write_text(json.dumps(content))
        found = ask(chain[0], "--tokenizer", other, "--level", "files")
        assert found["code"] == 1
        assert failed(found) == {"file.tokens"}
        assert "other ids" in found["metrics"]["trust"]

    def test_an_unbaked_file_in_its_place_is_named(
        self, chain: tuple[Path, Path], baked: tuple[Path, Path, Path], tmp_path: Path, ask: Ask
    ) -> None:
        from so8tqc.services.export.service import export

        plain = tmp_path / "x" / "plain.gguf"
        plain.parent.mkdir()
        export(ExportConfig(model=baked[0], out=plain))
        found = ask(plain, "--level", "files")
        assert "no key so8t.baked" in " ".join(found["metrics"]["unseen"])
        shutil.copy(plain, chain[0])
        found = ask(chain[0], "--level", "files")
        assert found["code"] == 1
        assert "file.recorded" in failed(found)
        assert "not_baked" in codes(found)

    def test_a_copy_without_its_record_is_known_by_its_keys(
        self, chain: tuple[Path, Path], tmp_path: Path, ask: Ask
    ) -> None:
        copy = tmp_path / "elsewhere" / "copy.gguf"
        copy.parent.mkdir()
        shutil.copy(chain[1], copy)
        found = ask(copy, "--level", "files")
        assert found["metrics"]["proved"]
        assert found["metrics"]["found"]["baked"].endswith("baked")

    @pytest.mark.parametrize("swapped", [False, True])
    def test_a_pair_of_files_is_judged_by_the_finer(
        self, swapped: bool, chain: tuple[Path, Path], baked: tuple[Path, Path, Path],
        texts_file: Path, ask: Ask,
    ) -> None:  # fmt: skip
        pair = chain[::-1] if swapped else chain
        options = ("--tokenizer", baked[0], "--data", texts_file, "--max-tokens", "32")
        found = ask(*pair, *options)
        assert found["metrics"]["what"].startswith(f"{chain[1].name}:")
        assert "kl.mean" in {check["id"] for check in found["checks"]}
