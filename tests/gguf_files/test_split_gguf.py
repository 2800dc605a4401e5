"""A model in several files is one: read, hashed, rewritten, run, quantized, judged."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from so8tqc.config import QuantizeConfig, VerifyConfig
from so8tqc.disk.digests import file_ref, sha256_file, sha256_model
from so8tqc.errors import ExitCode, ModelError
from so8tqc.gguf.file import open_gguf
from so8tqc.gguf.rewrite import CALIBRATION_TEMPERATURE, changed_copy, key_values
from so8tqc.record_files import write_record
from so8tqc.services.attest.stored import differing_parts, resource
from so8tqc.services.attest.verify_file import verify
from so8tqc.services.quantize.service import quantize
from so8tqc.services.run.directory import RunDirectory
from split_gguf import split_gguf
from tiny_gguf import write_llama, write_wide


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "whole.gguf")


@pytest.mark.parametrize("bare_first", [False, True])
def test_all_parts_are_read_as_the_whole(whole: Path, tmp_path: Path, bare_first: bool) -> None:
    first = split_gguf(whole, tmp_path / "parts", bare_first=bare_first)
    one, several = open_gguf(whole), open_gguf(first)
    assert [part.name for part in several.parts] == [
        f"split-0000{i}-of-00003.gguf" for i in (1, 2, 3)
    ]
    assert list(several.tensors) == list(one.tensors)
    for name, tensor in one.tensors.items():
        assert several.tensors[name].sha256 == tensor.sha256
    for key in one.fields.keys() - {"GGUF.kv_count", "GGUF.tensor_count"}:
        assert several.fields[key] == one.fields[key], key
    assert several.size == sum(p.stat().st_size for p in (tmp_path / "parts").iterdir())


def test_a_later_part_names_the_first(whole: Path, tmp_path: Path) -> None:
    split_gguf(whole, tmp_path / "parts")
    with pytest.raises(ModelError, match=r"part 2 of 3.*Give its first part.*split-00001-of-00003"):
        open_gguf(tmp_path / "parts/split-00002-of-00003.gguf")


def test_a_missing_part_is_named(whole: Path, tmp_path: Path) -> None:
    first = split_gguf(whole, tmp_path / "parts")
    (tmp_path / "parts/split-00003-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match="missing, first split-00003-of-00003") as raised:
        open_gguf(first)
    assert raised.value.exit_code is ExitCode.BAD_INPUT


def test_a_renamed_part_is_told_so(whole: Path, tmp_path: Path) -> None:
    first = split_gguf(whole, tmp_path / "parts")
    first = first.rename(first.with_name("mine.gguf"))
    with pytest.raises(ModelError, match="under another name"):
        open_gguf(first)


def test_parts_of_another_width_count_or_cut_are_refused(whole: Path, tmp_path: Path) -> None:
    first = split_gguf(whole, tmp_path / "parts")
    second = first.with_name("split-00002-of-00003.gguf")
    good = second.read_bytes()
    wider = split_gguf(write_wide(tmp_path / "wide.gguf", layers=2), tmp_path / "wide")
    shutil.copy(wider.with_name(second.name), second)
    with pytest.raises(ModelError, match="not a part of the model"):
        open_gguf(first)
    shutil.copy(first.with_name("split-00003-of-00003.gguf"), second)
    with pytest.raises(ModelError, match="calls itself part 3, not 2"):
        open_gguf(first)
    other_cut = split_gguf(whole, tmp_path / "bare", bare_first=True)
    shutil.copy(other_cut.with_name(second.name), second)
    with pytest.raises(ModelError, match=r"in an earlier part, too"):
        open_gguf(first)
    second.write_bytes(good)
    open_gguf(first)
    lying = split_gguf(whole, tmp_path / "lying", stated=99)
    with pytest.raises(ModelError, match="hold 21 tensors, and should 99"):
        open_gguf(lying)


def test_its_digest_is_that_of_all_parts(whole: Path, tmp_path: Path) -> None:
    first = split_gguf(whole, tmp_path / "parts")
    paths = sorted((tmp_path / "parts").iterdir())
    listed = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    text = json.dumps(listed, sort_keys=True, separators=(",", ":"))
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert sha256_model(first) == file_ref(first).sha256 == expected
    assert file_ref(first).bytes == sum(path.stat().st_size for path in paths)
    assert RunDirectory(tmp_path / "run").ref(first).sha256 == expected
    stated = resource(first, first.name)
    paths[2].write_bytes(paths[2].read_bytes()[:-4] + b"\1\2\3\4")
    assert RunDirectory(tmp_path / "run").ref(first).sha256 != expected
    assert differing_parts(first, stated) == ["output.weight"]


def test_a_copy_with_other_keys_is_one_file(whole: Path, tmp_path: Path) -> None:
    """Byte for byte the copy of the whole file, up to where keys stand."""
    first = split_gguf(whole, tmp_path / "parts", bare_first=True)
    for source, out in ((whole, "a.gguf"), (first, "b.gguf")):
        changed_copy(source, tmp_path / out, {CALIBRATION_TEMPERATURE: 1.5})
    one, joined = open_gguf(tmp_path / "a.gguf"), open_gguf(tmp_path / "b.gguf")
    assert len(joined.parts) == 1
    assert key_values(joined.path) == key_values(one.path)
    assert {n: t.sha256 for n, t in joined.tensors.items()} == {
        n: t.sha256 for n, t in one.tensors.items()
    }
    assert "split.count" not in joined.fields


def test_replaced_tensors_of_a_later_part(whole: Path, tmp_path: Path) -> None:
    first = split_gguf(whole, tmp_path / "parts")
    values = np.arange(32, dtype=np.float32)
    changed_copy(first, tmp_path / "out.gguf", {}, tensors={"output_norm.weight": lambda: [values]})
    made, one = open_gguf(tmp_path / "out.gguf"), open_gguf(whole)
    np.testing.assert_array_equal(made.tensors["output_norm.weight"].values(), values)
    for name in one.tensors.keys() - {"output_norm.weight"}:
        assert made.tensors[name].sha256 == one.tensors[name].sha256


@pytest.mark.llama
def test_quantized_and_verified_as_the_whole(tmp_path: Path) -> None:
    whole = write_wide(tmp_path / "tiny-F16.gguf", layers=2)
    first = split_gguf(whole, tmp_path / "parts", stem="tiny-F16")
    made = {}
    for source, out in ((whole, tmp_path / "a"), (first, tmp_path / "b")):
        record = quantize(QuantizeConfig(gguf=source, types=("Q4_K_M",), out=out, threads=1))
        write_record(out / "record.json", record)
        made[out.name] = open_gguf(out / "tiny-Q4_K_M.gguf")
    digests = [{n: t.sha256 for n, t in f.tensors.items()} for f in made.values()]
    assert digests[0] == digests[1]
    assert "split.count" not in made["b"].fields
    record = verify(VerifyConfig(file=made["b"].path))
    assert record.verdict == "pass", [c for c in record.checks if c.verdict != "pass"]


@pytest.mark.llama
def test_libllama_runs_it_by_its_first_part(whole: Path, tmp_path: Path) -> None:
    from so8tqc.sources.gguf import GGUFSource

    first = split_gguf(whole, tmp_path / "parts")
    tokens = np.arange(12)
    found = []
    for path in (whole, first):
        source = GGUFSource(path, "x", threads=1)
        found.append(np.concatenate([b.numpy() for b in source.logits(tokens, 4)]))
        source.close()
    np.testing.assert_array_equal(found[0], found[1])


def test_a_file_that_is_no_part_has_its_own_digest(whole: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone-00001-of-00002.gguf"
    shutil.copy(whole, lone)
    assert sha256_model(lone) == sha256_file(whole)
    assert len(open_gguf(lone).parts) == 1
