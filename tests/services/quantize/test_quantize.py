"""Quantization of small hand-made files by the real libllama."""

from __future__ import annotations

import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from so8tqc.config import QuantizeConfig
from so8tqc.errors import ConfigError, InputError, ModelError, ToolError
from so8tqc.gguf.file import open_gguf
from so8tqc.llama import quantizer
from so8tqc.llama.imatrix import read_imatrix
from so8tqc.llama.quantizer import Job, Quantizer, Recipe, quantization_types, resolve_type
from so8tqc.records import Record, Verdict
from so8tqc.services.quantize.service import quantize
from tiny_gguf import write_wide

pytestmark = pytest.mark.llama


def write_imatrix(path: Path, model: Path, without: str = "", **replace: np.ndarray) -> Path:
    """Importance for every matrix of the layers; ``replace`` by ``NAME_in_sum2`` or ``…counts``."""
    writer = gguf.GGUFWriter(str(path), "imatrix")
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_count", 7)
    make = np.random.default_rng(1)
    for name, tensor in open_gguf(model).tensors.items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            sums = make.gamma(0.3, size=(1, tensor.shape[1])).astype(np.float32) * 50
            short = name.split(".")[2]
            if short == without:
                continue
            writer.add_tensor(f"{name}.in_sum2", replace.get(f"{short}_in_sum2", sums))
            counts = np.full((1, 1), 50, dtype=np.float32)
            writer.add_tensor(f"{name}.counts", replace.get(f"{short}_counts", counts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_wide(tmp_path / "tiny-F16.gguf")


def run(model: Path, out: Path, *types: str, **options: object) -> Record:
    config = QuantizeConfig(gguf=model, out=out, types=types, threads=1, **options)  # type: ignore[arg-type]
    return quantize(config)


def test_every_type_is_written_once_and_described(model: Path, tmp_path: Path) -> None:
    record = run(model, tmp_path / "q", "q8_0", "Q8_0", "q5_k_m")
    assert record.verdict is Verdict.PASS
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == [
        "tiny-Q5_K_M.gguf",
        "tiny-Q8_0.gguf",
    ]
    files = record.metrics["files"]
    assert files["tiny-Q5_K_M.gguf"]["fallbacks"] == {}
    assert record.notices == ()
    # Q8_0 has 8 bits and one float16 scale for 32 weights
    assert 8.5 <= files["tiny-Q8_0.gguf"]["bits_per_weight"] < 8.6


def test_errors_are_relative_frobenius_norms(model: Path, tmp_path: Path) -> None:
    record = run(model, tmp_path / "q", "Q8_0")
    weight = "blk.0.attn_output.weight"
    read = {t.name: t for t in gguf.GGUFReader(str(model)).tensors}[weight].data.astype(np.float64)
    blocks = read.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
    rounded = (np.round(blocks / scale) * scale).reshape(read.shape)
    expected = np.linalg.norm(rounded - read) / np.linalg.norm(read)
    file = record.metrics["files"]["tiny-Q8_0.gguf"]
    assert file["attention_output_error"]["0"] == pytest.approx(expected, rel=0.02)
    assert file["tensors"][weight]["relative_error"] == file["attention_output_error"]["0"]


@pytest.mark.parametrize("recipe", ["Q4_0", "Q3_K_M", "Q6_K", "IQ4_XS", "TQ2_0", "BF16"])
def test_errors_are_those_of_gguf_pys_dequantization(
    recipe: str, model: Path, tmp_path: Path
) -> None:
    """Ours come from libggml's functions; gguf-py's are numpy code of their own."""
    file = run(model, tmp_path / "q", recipe).metrics["files"][f"tiny-{recipe}.gguf"]
    read = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "q" / f"tiny-{recipe}.gguf")).tensors}
    error = norm = 0.0
    for name, before in open_gguf(model).tensors.items():
        w = before.values().astype(np.float64)
        stored = read[name]
        q = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float64).reshape(w.shape)
        entry = file["tensors"][name]
        assert entry["type"] == stored.tensor_type.name
        assert entry["bits_per_weight"] == 8 * stored.n_bytes / stored.n_elements
        expected = np.linalg.norm(q - w) / np.linalg.norm(w)
        assert entry["relative_error"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
        if name.startswith("blk.0."):
            error += float(((q - w) ** 2).sum())
            norm += float((w**2).sum())
    assert file["layer_error"] == {"0": pytest.approx((error / norm) ** 0.5, rel=1e-4)}


def test_every_type_offered_can_be_made(model: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model)
    types = [name for name in quantization_types() if name != "F16"]
    record = run(model, tmp_path / "q", *types, imatrix=imatrix)
    assert record.verdict is Verdict.PASS
    assert len(record.metrics["files"]) == len(types) > 30


def test_two_are_made_at_a_time_where_both_fit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    types, memory = ("Q8_0", "Q4_K_M", "Q6_K"), psutil.virtual_memory()
    options = {"gguf": model, "types": types, "threads": 4}
    both = quantize(QuantizeConfig(out=tmp_path / "two", **options))
    hands: Any = both.run.measured["workers"]
    need = hands["bytes"]
    assert both.run.measured["workers"] == {"count": 2, "threads": 2, "bytes": need}
    little = memory._replace(available=2 * need - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    one = quantize(QuantizeConfig(out=tmp_path / "one", **options))
    assert one.run.measured["workers"] == {"count": 1, "threads": 4, "bytes": need}
    assert {n: r.sha256 for n, r in both.outputs.items()} == {
        n: r.sha256 for n, r in one.outputs.items()
    }
    assert list(both.outputs) == list(types)


def stored(directory: Path, recipe: str) -> dict[str, str]:
    file = gguf.GGUFReader(str(directory / f"tiny-{recipe}.gguf"))
    return {t.name: t.tensor_type.name for t in file.tensors}


def test_types_of_single_tensors(model: Path, tmp_path: Path) -> None:
    record = run(
        model,
        tmp_path / "q",
        "Q4_K_M",
        tensor_types=("attn_(v|output)=q8_0", "attn=Q6_K"),
        output_tensor_type="F16",
        token_embedding_type="Q5_0",
    )
    assert record.verdict is Verdict.PASS
    types = stored(tmp_path / "q", "Q4_K_M")
    assert types["blk.0.attn_v.weight"] == types["blk.0.attn_output.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == "Q6_K"
    assert (types["output.weight"], types["token_embd.weight"]) == ("F16", "Q5_0")
    assert types["blk.0.ffn_gate.weight"] == "Q4_K"


def test_pure_is_one_type_for_all_matrices(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "q", "Q4_K_M", pure=True)
    types = stored(tmp_path / "q", "Q4_K_M")
    assert {t for name, t in types.items() if "norm" not in name} == {"Q4_K"}


def test_a_choice_that_does_not_fit_falls_back_and_is_named(tmp_path: Path) -> None:
    model = write_wide(tmp_path / "tiny-F16.gguf", 64)
    record = run(model, tmp_path / "q", "Q8_0", tensor_types=("attn_v=Q4_K",))
    tensor = record.metrics["files"]["tiny-Q8_0.gguf"]["tensors"]["blk.0.attn_v.weight"]
    assert tensor["fallback"] == {"wanted": "Q4_K", "stored": "Q5_0", "columns": 64, "block": 256}
    assert tensor["type"] == "Q5_0"


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"tensor_types": ("attn_v",)}, ConfigError, "expected PATTERN=TYPE"),
        ({"tensor_types": ("attn_(v=Q8_0",)}, ConfigError, "not a regular expression"),
        ({"tensor_types": ("attn_v=Q9",)}, InputError, "no tensor type 'Q9'"),
        ({"tensor_types": ("attn_x=Q6_K",)}, InputError, "no effect: no tensor's name has it"),
        ({"tensor_types": ("_norm=Q6_K",)}, InputError, "no effect.*norms are never"),
        ({"tensor_types": ("attn=Q6_K", "attn_v=Q5_K")}, InputError, "attn_v=Q5_K.*no effect"),
        ({"token_embedding_type": "Q4_K"}, InputError, "64 columns.*256 that Q4_K packs"),
        ({"output_tensor_type": "IQ4_XS"}, InputError, "output.weight.*64 columns.*256"),
        ({"output_tensor_type": "Q8_1"}, InputError, "no tensor type 'Q8_1'"),
    ],
)
def test_a_choice_that_cannot_be_met_is_refused(
    options: dict[str, object], kind: type[Exception], says: str, tmp_path: Path
) -> None:
    model = write_wide(tmp_path / "tiny-F16.gguf", 64)
    with pytest.raises(kind, match=says):
        run(model, tmp_path / "q", "Q8_0", **options)
    assert not (tmp_path / "q").exists()


def test_plain_types_take_no_tensor_types(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no effect: BF16 does not quantize"):
        run(model, tmp_path / "q", "BF16", tensor_types=("attn_v=Q8_0",))


def test_a_quantized_input_needs_to_be_allowed(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, "Q8_0")
    with pytest.raises(ModelError, match=r"already quantized.*--allow-requantize"):
        run(tmp_path / "tiny-Q8_0.gguf", tmp_path / "q", "Q4_0")
    assert not (tmp_path / "q").exists()
    record = run(tmp_path / "tiny-Q8_0.gguf", tmp_path / "q", "Q4_0", allow_requantize=True)
    assert record.verdict is Verdict.PASS
    assert any("already quantized (Q8_0)" in notice for notice in record.notices)


@pytest.mark.parametrize("cut", [2, 60, 900, -64])
def test_a_truncated_input_is_refused(cut: int, model: Path, tmp_path: Path) -> None:
    model.write_bytes(model.read_bytes()[:cut])
    with pytest.raises(ModelError):
        run(model, tmp_path / "q", "Q8_0")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("change", ["type", "weight"])
def test_a_file_that_is_not_what_was_planned_fails(
    change: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libllama's output is exchanged, or damaged, before it is read back."""
    real = Quantizer.write

    def tampering(self: Quantizer, job: Job, on_tensor: Callable[[str], None]) -> None:
        if change == "type":
            real(self, replace(job, recipe=replace(job.recipe, pure=True)), on_tensor)
            return
        real(self, job, on_tensor)
        assert job.destination is not None
        with job.destination.open("r+b") as stream:  # the scale of the last block
            stream.seek(-34, 2)
            stream.write(b"\xff\xff")

    monkeypatch.setattr(Quantizer, "write", tampering)
    recipe, check = (
        ("Q4_K_M", "quantize.types") if change == "type" else ("Q8_0", "quantize.finite")
    )
    record = run(model, tmp_path / "q", recipe)
    failed = [c.id for c in record.checks if c.verdict is Verdict.FAIL]
    assert failed == [check]


@pytest.mark.parametrize(
    ("width", "recipe", "kinds", "sentence"),
    [
        (64, "Q5_K_M", {"Q5_1", "Q8_0"}, "no multiple of 256"),
        (80, "Q5_K_M", {"F16"}, "no multiple of 32"),
        (80, "Q8_0", {"F16"}, "no multiple of 32"),
        (64, "Q8_0", set(), None),
        (80, "BF16", set(), None),
    ],
)
def test_tensors_whose_width_forbids_the_recipe_are_named(
    width: int, recipe: str, kinds: set[str], sentence: str | None, tmp_path: Path
) -> None:
    model = write_wide(tmp_path / "tiny-F16.gguf", width)
    record = run(model, tmp_path / "q", recipe)
    fell = record.metrics["files"][f"tiny-{recipe}.gguf"]["fallbacks"]
    assert set(fell.values()) == kinds
    assert "blk.0.ffn_down.weight" not in fell  # 256 columns
    assert len(fell) == (8 if kinds else 0)
    assert [sentence in notice for notice in record.notices] == ([True] if sentence else [])


def test_the_input_is_never_replaced(model: Path) -> None:
    before = model.read_bytes()
    with pytest.raises(ConfigError, match="F16 would replace the input"):
        run(model, model.parent, "Q8_0", "F16")
    assert model.read_bytes() == before
    assert list(model.parent.iterdir()) == [model]


def test_types_that_cannot_be_read_back_are_not_offered(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no quantization type 'Q2_0'"):
        run(model, tmp_path / "q", "Q2_0")


@pytest.mark.parametrize("recipe", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "Q2_K_S"])
def test_a_type_that_needs_importance_is_refused_before_any_work(
    recipe: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quantizer, "write", None)  # must not be reached
    with pytest.raises(
        InputError, match=rf"{recipe} needs an importance matrix.*blk\.0.*--imatrix"
    ):
        run(model, tmp_path / "q", "Q8_0", recipe)
    assert not (tmp_path / "q").exists()


def test_importance_that_lacks_a_needy_tensor_is_refused(model: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model, without="attn_v")
    with pytest.raises(
        ModelError, match=r"no importance for blk\.0\.attn_v.*Q2_K_S stores as Q2_K"
    ):
        run(model, tmp_path / "q", "Q2_K_S", imatrix=imatrix)
    record = run(model, tmp_path / "q", "Q4_K_M", imatrix=imatrix)
    assert "blk.0.attn_v.weight" in record.metrics["imatrix"]["without"]
    assert any("rounded without weights" in n and "attn_v" in n for n in record.notices)


def test_libllamas_reason_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    """libllama has no fallback from Q1_0, and says so."""
    model = write_wide(tmp_path / "tiny-F16.gguf", 96)
    with pytest.raises(ToolError, match=r"no tensor type fallback is defined for type q1_0"):
        run(model, tmp_path / "q", "Q1_0")
    assert not (tmp_path / "q").exists()


def test_a_model_of_which_parts_are_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("output.weight", np.ones((4, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="files missing"):
        run(path, tmp_path / "q", "Q8_0")


def test_a_disk_without_room_for_all_files_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_wide(tmp_path / "tiny-F16.gguf", layers=3)
    record = run(model, tmp_path / "made", "Q8_0", "Q4_0")
    total = sum(ref.bytes for ref in record.outputs.values())

    def free(share: float) -> None:
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, share * total)
        )

    free(0.98)
    with pytest.raises(ToolError, match="are needed"):
        run(model, tmp_path / "q", "Q8_0", "Q4_0")
    assert not (tmp_path / "q").exists()
    free(1.02)
    assert run(model, tmp_path / "q", "Q8_0", "Q4_0").verdict is Verdict.PASS


def test_importance_changes_the_weighted_error_in_its_favour(model: Path, tmp_path: Path) -> None:
    """The claim of an importance matrix: less error where the inputs are large."""
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model)
    record = run(model, tmp_path / "with", "Q4_K_M", imatrix=imatrix)
    run(model, tmp_path / "without", "Q4_K_M")
    assert record.verdict is Verdict.PASS
    assert record.inputs["imatrix"].path == str(imatrix)
    metrics = record.metrics["imatrix"]
    assert (metrics["tensors"], metrics["chunks"]) == (7, 7)
    assert set(metrics["without"]) == {"token_embd.weight", "output.weight"}
    assert any("token_embd.weight" in notice for notice in record.notices)
    name = "blk.0.attn_q.weight"
    importance = read_imatrix(imatrix).means[name][0]

    def weighted(directory: Path) -> float:
        before = open_gguf(model).tensors[name].values()
        after = open_gguf(directory / "tiny-Q4_K_M.gguf").tensors[name].values()
        return float((importance * (after - before) ** 2).sum())

    assert weighted(tmp_path / "with") < 0.9 * weighted(tmp_path / "without")


def test_types_that_need_importance_get_it(model: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model)
    record = run(model, tmp_path / "q", "IQ2_XXS", imatrix=imatrix)
    assert record.verdict is Verdict.PASS
    assert "IQ2_XXS" in record.metrics["files"]["tiny-IQ2_XXS.gguf"]["types"]


def test_means_are_sums_over_counts_and_unseen_experts_weigh_alike(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(str(path), "imatrix")
    writer.add_tensor("w.in_sum2", np.array([[2, 4], [0, 0]], dtype=np.float32))
    writer.add_tensor("w.counts", np.array([[2], [0]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(read_imatrix(path).means["w"], [[1, 2], [1, 1]])


@pytest.mark.parametrize(
    ("replace", "says"),
    [
        ({"attn_q_in_sum2": np.full((1, 256), np.nan, np.float32)}, "attn_q.*not finite"),
        ({"attn_q_in_sum2": np.full((1, 256), -1, np.float32)}, "attn_q.*negative"),
        ({"attn_q_in_sum2": np.zeros((1, 256), np.float32)}, "attn_q.*every importance is zero"),
        ({"attn_q_in_sum2": np.ones((1, 128), np.float32)}, r"attn_q.*needs \[1, 256\]"),
        ({"attn_q_counts": np.ones((3, 1), np.float32)}, "attn_q.*do not belong to 3 counts"),
        ({"attn_q_counts": np.zeros((1, 1), np.float32)}, "attn_q.*every count is zero"),
        ({"attn_q_counts": np.full((1, 1), np.nan, np.float32)}, "attn_q.*not finite"),
    ],
)
def test_an_importance_that_cannot_be_right_is_refused(
    replace: dict[str, np.ndarray], says: str, model: Path, tmp_path: Path
) -> None:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model, **replace)
    with pytest.raises(ModelError, match=says):
        run(model, tmp_path / "q", "Q4_K_M", imatrix=imatrix)


def test_silent_columns_and_unseen_experts_are_named(model: Path, tmp_path: Path) -> None:
    sums = np.ones((1, 256), np.float32)
    sums[0, 32:96] = 0  # two whole blocks that libllama could not weigh
    sums[0, 0] = 0.5
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model, attn_q_in_sum2=sums)
    means = read_imatrix(imatrix).means["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(means[0, 32:96], np.float32(0.01))  # 0.5 over 50 tokens
    record = run(model, tmp_path / "q", "IQ2_XXS", imatrix=imatrix)
    assert record.verdict is Verdict.PASS
    assert record.metrics["imatrix"]["silent_columns"] == {"blk.0.attn_q.weight": 64}
    assert any("64 of blk.0.attn_q.weight" in notice for notice in record.notices)


def legacy(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    """The older format: every value is a mean times the number of calls."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, values.size) + values.astype("<f4").tobytes()
    return data + tail


def test_the_older_format_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    new = write_imatrix(tmp_path / "imatrix.gguf", model)
    means = read_imatrix(new).means
    old = tmp_path / "imatrix.dat"
    old.write_bytes(
        legacy(
            {name: (4, 4 * value) for name, value in means.items()},
            struct.pack("<ii", 7, 5) + b"a.txt",
        )
    )
    read = read_imatrix(old)
    assert read.chunks == 7
    assert read.means.keys() == means.keys()
    for name, value in means.items():
        np.testing.assert_allclose(read.means[name], value, rtol=1e-6)
    same = [run(model, tmp_path / k, "Q4_K_M", imatrix=k_) for k, k_ in (("a", new), ("b", old))]
    assert same[0].outputs["Q4_K_M"].sha256 == same[1].outputs["Q4_K_M"].sha256


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\1", struct.pack("<i", 0), struct.pack("<i", -1), struct.pack("<ii", 1, -5),
        struct.pack("<ii", 1, 1 << 30), legacy({"w": (1, np.ones(4))})[:-1],
        legacy({"w": (1, np.ones(0))}), struct.pack("<ii1sii", 1, 1, b"w", 1, -1) + b"abcd" * 9,
        b"plain text that is no matrix at all",
    ],
)  # fmt: skip
def test_what_is_no_importance_matrix_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"not an importance matrix|there are no importances"):
        read_imatrix(path)


@pytest.mark.parametrize(
    ("value", "says"),
    [(np.nan, "w: an importance.*not finite"), (-1.0, "negative"), (0.0, "every importance is")],
)
def test_values_of_the_older_format_are_checked(value: float, says: str, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy({"w": (1, np.full(4, value))}))
    with pytest.raises(ModelError, match=says):
        read_imatrix(path)


def test_importance_of_another_model_or_none_is_refused(model: Path, tmp_path: Path) -> None:
    other = write_imatrix(tmp_path / "other.gguf", write_wide(tmp_path / "o-F16.gguf", layers=2))
    with pytest.raises(ModelError, match=r"blk\.1\..*tiny-F16.gguf does not have"):
        run(model, tmp_path / "q", "Q4_K_M", imatrix=other)
    with pytest.raises(ModelError, match="holds no importance matrix"):
        run(model, tmp_path / "q", "Q4_K_M", imatrix=model)


def worker_that_writes_by(code: str) -> tuple[str, ...]:
    """The real worker until it is to write a file."""
    script = (
        "import os, signal, sys, time; from so8tqc.llama import quantize_worker as module; "
        "real = module.run\n"
        "def run(lib, job):\n"
        "    if job['destination'] is None: return real(lib, job)\n"
        f"    {code}\n"
        "module.run = run; sys.exit(module.main())"
    )
    return (sys.executable, "-c", script)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("print('GGML_ASSERT failed', flush=True); os.abort()", "SIGABRT.*GGML_ASSERT failed"),
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("print('error: no'); sys.exit(1)", "exit 1.*error: no"),
    ],
)
def test_a_dying_libllama_is_a_message(
    code: str, says: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "WORKER", worker_that_writes_by(code))
    with pytest.raises(ToolError, match=says):
        run(model, tmp_path / "q", "Q8_0", "Q4_0")
    assert not (tmp_path / "q").exists()


def test_a_dead_process_tells_every_later_job_why(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of several files is reported first."""
    code = "print('GGML_ASSERT failed', flush=True); os.abort()"
    monkeypatch.setattr(quantizer, "WORKER", worker_that_writes_by(code))
    process = Quantizer()
    job = Job(model, tmp_path / "x.gguf", Recipe(resolve_type("Q8_0")[1]))
    try:
        assert process.plan(model, job.recipe)
        for _ in range(2):
            with pytest.raises(ToolError, match=r"SIGABRT.*GGML_ASSERT failed"):
                process.write(job, lambda _: None)
    finally:
        process.close()


def test_a_disk_that_is_full_is_named_by_libllamas_process(model: Path) -> None:
    """Its C++ streams tell only that something failed, and nothing when the last bytes do."""
    process = Quantizer()
    job = Job(model, Path("/dev/full"), Recipe(resolve_type("Q8_0")[1]))
    try:
        with pytest.raises(ToolError, match="No space left on device"):
            process.write(job, lambda _: None)
    finally:
        process.close()


def test_ctrl_c_ends_a_quantization_at_once_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    """Interrupted at its first tensor, while libllama would go on for ten minutes."""
    endless = worker_that_writes_by(
        "signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "print('[   1/   9] x', flush=True); time.sleep(600)"
    )
    script = f"""
import os, signal
from pathlib import Path
from so8tqc.config import QuantizeConfig
from so8tqc.llama import quantizer
from so8tqc.services.quantize import service as module
signal.signal(signal.SIGINT, signal.default_int_handler)
quantizer.WORKER = {endless!r}
write = quantizer.Quantizer.write
def interrupted(self, job, on_tensor):
    write(self, job, lambda tensor: os.kill(os.getpid(), signal.SIGINT))
quantizer.Quantizer.write = interrupted
module.quantize(QuantizeConfig(gguf=Path({str(model)!r}), out=Path({str(tmp_path / "q")!r}),
                               types=("Q5_K_M",), threads=1))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    assert not (tmp_path / "q").exists()
