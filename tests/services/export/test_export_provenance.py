"""so8t.* keys of a GGUF: what the bake's provenance says, and nothing that it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from so8tqc.checkpoints.provenance import read_provenance
from so8tqc.config import BakeConfig
from so8tqc.rotations.enums import Convention
from so8tqc.services.bake import bake
from so8tqc.services.export.provenance import BAKED_KEY, provenance_keys, says_baked


def test_the_keys_are_those_of_the_bake(
    llama: Path, make_gates: Callable[..., Path], tmp_path: Path
) -> None:
    gates = make_gates(llama, convention=Convention.ROW)
    bake(BakeConfig(base=llama, rotations=gates, out=tmp_path / "baked"))
    found = read_provenance(tmp_path / "baked")
    assert found is not None
    keys = provenance_keys(found)
    assert says_baked(keys)
    assert (keys["so8t.convention"], keys["so8t.site"]) == ("row", "input")
    assert keys["so8t.rotations.fingerprint"] == found.rotations_fingerprint
    assert keys["so8t.base.fingerprint"] == found.base_fingerprint
    assert keys["so8t.version"] == found.versions["so8tqc"]
    bare = found.model_copy(update={"base_fingerprint": None, "versions": {}})
    assert "so8t.base.fingerprint" not in provenance_keys(bare)
    assert provenance_keys(bare)["so8t.version"] == ""


@pytest.mark.parametrize("value", [False, None, 1, "true", "yes"])
def test_only_true_says_baked(value: object) -> None:
    assert not says_baked({BAKED_KEY: value})
    assert not says_baked({})
