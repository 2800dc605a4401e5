"""From options to recipes: what can be seen to be wrong before any work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from so8tqc.config import QuantizeConfig
from so8tqc.errors import ConfigError, InputError, ModelError
from so8tqc.gguf.file import GGUFFile, GGUFTensor
from so8tqc.llama.imatrix import ImportanceMatrix
from so8tqc.llama.quantizer import PlannedTensor
from so8tqc.services.quantize.recipe import (
    Output,
    Overrides,
    outputs,
    overrides,
    recipe,
    refuse_source,
    require_effect,
    require_importance,
    stem,
)

pytestmark = pytest.mark.llama


def source(**types: str) -> GGUFFile:
    names = {
        "token_embd.weight": "F16",
        "blk.0.attn_v.weight": "F16",
        "blk.0.attn_norm.weight": "F32",
    }
    tensors = {
        name: GGUFTensor(name, kind, (64, 64), 8192, 0, np.empty(0))
        for name, kind in (names | types).items()
    }
    return GGUFFile(Path("m-F16.gguf"), {}, tensors)


def config(**options: Any) -> QuantizeConfig:
    return QuantizeConfig.model_validate({"gguf": "m-F16.gguf", "out": "q", **options})


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("m-F16.gguf", "m"),
        ("m-bf16.gguf", "m"),
        ("m-auto.gguf", "m"),
        ("m.gguf", "m"),
        ("m-Q8_0.gguf", "m-Q8_0"),
        ("F16.gguf", "F16"),
        ("a-F16-b.gguf", "a-F16-b"),
    ],
)
def test_a_files_own_type_leaves_its_name(name: str, wanted: str) -> None:
    assert stem(Path(name)) == wanted


def test_each_type_is_one_file_whatever_its_spelling() -> None:
    found = outputs(config(types=("Q4_K_M", "q4_k_m", "Q8_0")))
    assert [(one.name, one.path) for one in found] == [
        ("Q4_K_M", Path("q/m-Q4_K_M.gguf")),
        ("Q8_0", Path("q/m-Q8_0.gguf")),
    ]
    with pytest.raises(InputError):
        outputs(config(types=("Q4_X",)))


def test_an_output_never_replaces_the_input() -> None:
    with pytest.raises(ConfigError, match="would replace the input"):
        outputs(config(gguf="q/m-F16.gguf", types=("F16",)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attn_v", "PATTERN=TYPE"),
        ("=Q8_0", "PATTERN=TYPE"),
        ("attn_v=", "PATTERN=TYPE"),
        ("(=Q8_0", "no.* regular expression"),
    ],
)
def test_what_is_no_override_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        overrides(config(tensor_types=(text,)), source())


def test_overrides_are_resolved_and_become_a_recipe() -> None:
    wanted = config(tensor_types=("a=b=q8_0",), output_tensor_type="Q6_K", pure=True)
    chosen = overrides(wanted, source())
    assert chosen.tensors[0][:2] == ("a=b", "Q8_0")
    assert chosen.head is not None
    assert (chosen.head[0], chosen.embedding) == ("Q6_K", None)
    made = recipe(wanted, Output("Q4_K_M", 15, Path("x")), chosen, None)
    assert (made.file_type, made.pure) == (15, True)
    assert made.tensor_types == (("a=b", chosen.tensors[0][2]),)
    assert made.output_type == chosen.head[1]


def test_a_head_whose_columns_do_not_fit_is_refused_by_name() -> None:
    with pytest.raises(
        InputError, match=r"token_embd.weight.*64 columns are no multiple of the 256"
    ):
        overrides(config(token_embedding_type="Q6_K"), source())


def test_a_quantized_input_is_refused() -> None:
    quantized = source(**{"blk.0.attn_v.weight": "Q4_K"})
    with pytest.raises(ModelError, match=r"already quantized \(Q4_K\)"):
        refuse_source(quantized, allow_requantize=False)
    assert refuse_source(quantized, allow_requantize=True) == {"Q4_K"}
    assert refuse_source(source(), allow_requantize=False) == frozenset()


PLAN = {
    "token_embd.weight": PlannedTensor("Q8_0"),
    "blk.0.attn_v.weight": PlannedTensor("Q5_0", wanted="Q5_K", block=256),
    "blk.0.attn_norm.weight": PlannedTensor("F32"),
}
OUTPUT = Output("Q5_K_M", 17, Path("x"))


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (Overrides((("attn_v", "Q5_K", 0),), None, None), ""),
        (Overrides((("attn_v", "Q5_0", 0),), None, None), ""),
        (Overrides((), ("Q8_0", 0), ("Q8_0", 0)), ""),
        (Overrides((("ffn", "Q5_K", 0),), None, None), "no tensor's name has it"),
        (Overrides((("norm", "Q5_K", 0),), None, None), "gives none of 1 tensors that type"),
        (Overrides((), ("Q6_K", 0), None), "token_embd.weight will be Q8_0"),
    ],
)
def test_a_choice_that_changes_nothing_is_told(chosen: Overrides, says: str) -> None:
    if not says:
        require_effect(OUTPUT, chosen, PLAN)
        return
    with pytest.raises(InputError, match=says):
        require_effect(OUTPUT, chosen, PLAN)


def test_types_that_need_importance_ask_for_it() -> None:
    plan = {
        "blk.0.attn_v.weight": PlannedTensor("IQ2_XS"),
        "token_embd.weight": PlannedTensor("IQ2_XS"),
    }
    with pytest.raises(InputError, match=r"1 tensors as IQ2_XS, first blk.0.attn_v.weight"):
        require_importance(OUTPUT, plan, source(), None)
    matrix: Any = SimpleNamespace(means={"blk.0.attn_v.weight": None}, path=Path("i"))
    require_importance(OUTPUT, plan, source(), matrix)
    empty = ImportanceMatrix(Path("i.gguf"), {}, 0, {}, {})
    with pytest.raises(ModelError, match=r"no importance for blk.0.attn_v.weight"):
        require_importance(OUTPUT, plan, source(), empty)
    require_importance(OUTPUT, PLAN, source(), None)
    already = source(**{"blk.0.attn_v.weight": "IQ2_XS"})  # stays as it is: nothing is weighed
    require_importance(OUTPUT, plan, already, None)
