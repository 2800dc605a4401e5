"""Tensors that stay unrounded: which are meant, and that their values are the source's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_export_proof import EXPERTS, HEADS, permuted, source_values, write_pair

from so8tqc.checkpoints.provenance import BakedTensor, Provenance
from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.errors import ConfigError, ModelError
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.gguf.rewrite import rewrite
from so8tqc.records import Verdict
from so8tqc.rotations.enums import Convention, Parametrization, Site
from so8tqc.services.export.kept_tensors import (
    choose,
    float32_values,
    kept_checks,
    kept_notices,
    refuse_unbaked,
)
from so8tqc.services.export.proof import compare_tensors
from so8tqc.services.export.provenance import provenance_keys

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def provenance(*names: str, base: str | None = "b" * 64) -> Provenance:
    return Provenance(
        base="base",
        base_fingerprint=base,
        rotations="gates.safetensors",
        rotations_fingerprint="f" * 64,
        convention=Convention.ROW,
        parametrization=Parametrization.CAYLEY,
        site=Site.INPUT,
        tensors=tuple(
            BakedTensor(name=n, layer=0, dtype="F32", sha256_before="0", sha256_after="1")
            for n in names
        ),
        versions={"so8tqc": "0.1.0"},
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Checkpoint, GGUFFile]:
    checkpoint, path = write_pair(tmp_path)
    return checkpoint, open_gguf(path)


@pytest.mark.parametrize(
    ("pattern", "means"),
    [
        ("baked", ["attn_output"]),
        ("*.o_proj.weight", ["attn_output"]),
        ("blk.*.attn_[qo]*.weight", ["attn_output", "attn_q"]),
        ("*.experts.1.*", ["ffn_gate_exps"]),  # one expert stands for its stack
    ],
)
def test_patterns_mean_names_of_either_kind(
    pattern: str, means: list[str], pair: tuple[Checkpoint, GGUFFile]
) -> None:
    chosen = choose([pattern], pair[0], provenance(O_PROJ), pair[1])
    assert sorted(chosen) == [f"blk.0.{name}.weight" for name in means]


def test_what_means_nothing_is_an_error(pair: tuple[Checkpoint, GGUFFile]) -> None:
    with pytest.raises(ConfigError, match=r"'\*\.k_proj\.weight' means no tensor"):
        choose(["*.o_proj.weight", "*.k_proj.weight"], pair[0], None, pair[1])
    with pytest.raises(ModelError, match=r"baked tensor model\.other"):
        choose(["baked"], pair[0], provenance(O_PROJ, "model.other"), pair[1])
    with pytest.raises(ConfigError, match="nothing says what was baked"):
        refuse_unbaked(["baked"], pair[0], baked=False)
    refuse_unbaked(["*"], pair[0], baked=False)


@pytest.mark.parametrize("architecture", ["llama", "orion"])
def test_kept_values_are_the_sources_own_in_the_files_order(
    architecture: str, tmp_path: Path
) -> None:
    """Also where no layout is known: the converted bytes tell which arrangement it was."""
    checkpoint, path = write_pair(tmp_path, architecture)
    converted = open_gguf(path)
    chosen = choose(["*"], checkpoint, None, converted)
    target = tmp_path / "kept.gguf"
    rewrite(path, target, {}, float32_values(chosen, checkpoint, converted))
    kept = {t.name: t for t in gguf.GGUFReader(str(target)).tensors}
    q = source_values(tmp_path, "self_attn.q_proj.weight")
    wanted = {
        "attn_q": permuted(q, HEADS) if architecture == "llama" else q,
        "attn_output": source_values(tmp_path, "self_attn.o_proj.weight"),
        "ffn_gate_exps": np.stack(
            [
                source_values(tmp_path, f"block_sparse_moe.experts.{e}.w1.weight")
                for e in range(EXPERTS)
            ]
        ),
    }
    if architecture == "orion":  # whose name map has no experts
        del wanted["ffn_gate_exps"]
    for name, values in wanted.items():
        assert kept[f"blk.0.{name}.weight"].tensor_type is gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(kept[f"blk.0.{name}.weight"].data, values)
    assert compare_tensors(checkpoint, open_gguf(target)).different == []
    assert kept_checks(chosen, open_gguf(target))[0].verdict is Verdict.PASS
    assert kept_checks(chosen, converted)[0].verdict is Verdict.FAIL  # all rounded still
    assert kept_checks({}, converted) == []


def test_a_kept_tensor_that_was_rounded_on_the_way_is_different(tmp_path: Path) -> None:
    """F32 promises every bit: a value that went through F16 fails the proof."""
    checkpoint, path = write_pair(tmp_path)
    values = source_values(tmp_path, "self_attn.o_proj.weight").astype(np.float16)
    target = tmp_path / "kept.gguf"
    rewrite(
        path, target, {}, {"blk.0.attn_output.weight": lambda: iter([values.astype(np.float32)])}
    )
    assert compare_tensors(checkpoint, open_gguf(target)).different == [O_PROJ]


def test_values_are_not_taken_from_a_tensor_that_does_not_explain_the_file(tmp_path: Path) -> None:
    checkpoint, path = write_pair(tmp_path, attn_output=np.ones((16, 16), dtype=np.float32))
    converted = open_gguf(path)
    chosen = choose(["*.o_proj.weight"], checkpoint, None, converted)
    with pytest.raises(ModelError, match=r"is not .*o_proj\.weight rounded"):
        rewrite(path, tmp_path / "kept.gguf", {}, float32_values(chosen, checkpoint, converted))


def test_keeping_what_has_16_bits_itself_is_said(pair: tuple[Checkpoint, GGUFFile]) -> None:
    checkpoint, converted = pair
    chosen = choose(["*.o_proj.weight"], checkpoint, None, converted)
    assert kept_notices(chosen, checkpoint) == []
    narrow = {
        n: replace(entry, dtype="BF16" if n == O_PROJ else entry.dtype)
        for n, entry in checkpoint.tensors.items()
    }
    (notice,) = kept_notices(chosen, replace(checkpoint, tensors=narrow))
    assert "BF16" in notice


def test_an_unverified_bake_has_no_base_fingerprint_to_write() -> None:
    keys = provenance_keys(provenance(O_PROJ))
    assert keys == {
        "so8t.baked": True,
        "so8t.convention": "row",
        "so8t.parametrization": "cayley",
        "so8t.site": "input",
        "so8t.rotations.fingerprint": "f" * 64,
        "so8t.base.fingerprint": "b" * 64,
        "so8t.version": "0.1.0",
    }
    del keys["so8t.base.fingerprint"]
    assert provenance_keys(provenance(O_PROJ, base=None)) == keys
