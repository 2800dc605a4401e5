"""``quantize --max-size``: types chosen by curvature, on a small Llama with rows of 96 and 256."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from so8tqc.cli.app import app
from so8tqc.config import AttestConfig, ExportConfig, QuantizeConfig, VerifyConfig
from so8tqc.errors import ConfigError, DataError, InputError
from so8tqc.gguf.file import open_gguf
from so8tqc.llama.vendor import is_vendored
from so8tqc.quantizers.hessians import Manifest, MomentsFile, write_moments
from so8tqc.quantizers.solve import chosen_rows
from so8tqc.record_files import write_record
from so8tqc.record_kinds.quantize import QuantizeMetrics
from so8tqc.records import Record, Verdict
from so8tqc.services.attest.service import attest
from so8tqc.services.attest.verify_file import verify
from so8tqc.services.export.service import write_gguf
from so8tqc.services.quantize import mixture as module
from so8tqc.services.quantize import pricing
from so8tqc.services.quantize.service import quantize
from wide_llama import write_calibration, write_wide

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

FILE = "wide-Q4_K_M-mixed.gguf"
LIMIT = 240_000


@pytest.fixture(scope="module")
def model(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("mixture") / "model", tokenizer_files)


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    out = model.parent / "wide-F16.gguf"
    write_gguf(ExportConfig(model=model, out=out))
    return out


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    return write_calibration(model.parent / "calibration.txt")


@pytest.fixture(scope="module")
def hessians(exported: Path, model: Path, text: Path) -> Path:
    out = model.parent / "plain"
    quantize(
        QuantizeConfig(
            gguf=exported,
            out=out,
            types=("Q4_K_M",),
            solver="hessian",
            model=model,
            hessian_data=(str(text),),
            hessian_tokens=2048,
        )
    )
    return out / "wide-hessians.npz"


def run(exported: Path, model: Path, text: Path, hessians: Path, out: Path, **more: Any) -> Record:
    options = {"max_size": LIMIT, **more}
    config = QuantizeConfig(
        gguf=exported,
        out=out,
        solver="hessian",
        model=model,
        hessians=hessians,
        hessian_data=(str(text),),
        **options,
    )
    record = quantize(config)
    write_record(out / "record.json", record)
    return record


@pytest.fixture(scope="module")
def mixed(exported: Path, model: Path, text: Path, hessians: Path) -> tuple[Path, Record]:
    out = model.parent / "mixed"
    return out, run(exported, model, text, hessians, out)


def test_it_fits_and_says_what_it_loses(mixed: tuple[Path, Record], exported: Path) -> None:
    out, record = mixed
    assert record.verdict is Verdict.PASS
    found = QuantizeMetrics.of(record).mixture
    assert found is not None
    size = (out / FILE).stat().st_size
    assert found.bytes == size
    # nothing that is worth more was left lying: no tensor is larger than 30 kB in any type
    assert LIMIT - 30_000 < size <= LIMIT
    stored = {name: tensor.type for name, tensor in open_gguf(out / FILE).tensors.items()}
    assert {name: chosen.type for name, chosen in found.tensors.items()} == {
        name: type_ for name, type_ in stored.items() if type_ != "F32"
    }
    assert len(set(stored.values())) > 3
    for name, chosen in found.tensors.items():
        wide = open_gguf(exported).tensors[name].shape[-1] % 256 == 0
        assert set(chosen.kl) == set(module._OF_WIDE_ROWS if wide else module._OF_OTHER_ROWS)
    assert "token_embd.weight" in found.tensors
    assert found.given == {}
    assert found.evaluations <= 6
    assert found.prediction_error == found.predicted_kl / found.measured_kl - 1
    assert abs(found.prediction_error) < 0.4
    assert any("predicted KL" in notice for notice in record.notices)


def test_the_measured_kl_is_that_of_the_models(
    mixed: tuple[Path, Record], model: Path, text: Path
) -> None:
    """Against transformers' own forwards, of the directory and of the file that was written."""
    from transformers import AutoModelForCausalLM

    from so8tqc.sources.inputs.texts import concatenated, encode_plain, load_texts, load_tokenizer
    from so8tqc.sources.moments import chunks_of

    out, record = mixed
    found = QuantizeMetrics.of(record).mixture
    assert found is not None
    ids, bos = encode_plain(concatenated(load_texts([str(text)])), load_tokenizer(model))
    chunks = chunks_of(ids, bos, 128, module.CHUNKS)
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    stored = AutoModelForCausalLM.from_pretrained(out, gguf_file=FILE, dtype=torch.float32)
    total = count = 0.0
    for chunk in chunks:
        with torch.no_grad():
            p, q = (
                torch.log_softmax(m(torch.from_numpy(chunk)[None]).logits[0, :-1].double(), -1)
                for m in (exact, stored)
            )
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    assert found.tokens == count
    assert found.measured_kl == pytest.approx(total / count, rel=1e-3)


def test_predictions_are_the_errors_of_decoded_bytes(
    exported: Path, hessians: Path, tmp_path: Path
) -> None:
    """Σ δ H δᵀ by numpy in float64, of what gguf-py decodes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    from so8tqc.quantizers.solve import solve

    source, moments = open_gguf(exported), MomentsFile(hessians)
    names = {"a.weight": "blk.1.ffn_down.weight", "b.weight": "blk.0.attn_q.weight"}
    sensitive = {"a": 3.0, "b": 0.5, "head": 7.0, "embedding": 2.0}
    priced = {price.name: price for price in pricing.prices(source, moments, sensitive, names)}
    assert set(priced) == {*names.values(), "token_embd.weight"}
    factors = {"blk.1.ffn_down.weight": 3.0, "blk.0.attn_q.weight": 0.5, "token_embd.weight": 7.0}
    for name, price in priced.items():
        weights = source.tensors[name].values()
        (group,) = [g for g in moments.manifest.groups if name in g.tensors]
        hessian = moments.moments(group).whole
        rows = list(chosen_rows(len(weights), pricing.FEWEST_ROWS))
        types = module.candidates(source.tensors[name])
        found = pricing.sampled_costs(price, source, types, 2)
        for type_ in types:
            stored = solve(weights[rows], price.curvature, type_).stored
            values = dequantize(stored, GGMLQuantizationType[type_]).astype(np.float64)
            delta = weights[rows].astype(np.float64) - values
            expected = factors[name] * np.trace(delta @ hessian @ delta.T)
            expected *= len(weights) / len(rows)
            if name == "token_embd.weight":
                expected += 2.0 * (delta**2).sum(axis=1).mean()
            assert found[type_] == pytest.approx(expected, rel=1e-9), (name, type_)
        assert found["Q8_0"] < found["Q5_0" if "Q5_0" in found else "Q6_K"]


def test_an_embedding_that_is_no_head_costs_by_its_rows(
    exported: Path, hessians: Path, tmp_path: Path
) -> None:
    moments = MomentsFile(hessians)
    kept = [g for g in moments.manifest.groups if "token_embd.weight" not in g.tensors]
    less = tmp_path / "less.npz"
    write_moments(less, Manifest(inputs=moments.manifest.inputs), map(moments.part, kept))
    sensitive = {"head": 7.0, "embedding": 2.0}
    source = open_gguf(exported)
    (price,) = pricing.prices(source, MomentsFile(less), sensitive, {})
    assert price.name == "token_embd.weight"
    assert price.hessian is None
    delta = np.random.default_rng(0).normal(size=(10, 96))
    assert price.nats(delta, 512) == pytest.approx(2.0 * (delta**2).sum() / 10)


def test_verify_and_a_statement_make_it_again(mixed: tuple[Path, Record], tmp_path: Path) -> None:
    out, _ = mixed
    record = verify(VerifyConfig(file=out / FILE))
    assert record.verdict is Verdict.PASS
    assert record.metrics["not_identical"] == {}
    statement = tmp_path / "statement.json"
    attest(AttestConfig(directory=out / FILE, out=statement))
    said = statement.read_text(encoding="utf-8")
    assert "token_embd" in said
    assert '"max_size": null' in said


def test_types_that_are_asked_for_stay_however_large_the_file_may_be(
    exported: Path, model: Path, text: Path, hessians: Path, tmp_path: Path
) -> None:
    record = run(
        exported,
        model,
        text,
        hessians,
        tmp_path,
        tensor_types=(r"ffn_(up|gate)=Q5_1",),
        token_embedding_type="Q5_0",
        output_tensor_type="Q5_0",
        max_size="1GB",
    )
    found = QuantizeMetrics.of(record).mixture
    assert found is not None
    assert found.given == {
        "token_embd.weight": "Q5_0",
        **{f"blk.{i}.ffn_{kind}.weight": "Q5_1" for i in range(3) for kind in ("gate", "up")},
    }
    assert {chosen.type for chosen in found.tensors.values()} == {"Q8_0"}
    assert any("more than the largest types of all tensors" in n for n in record.notices)
    stored = {name: tensor.type for name, tensor in open_gguf(tmp_path / FILE).tensors.items()}
    assert stored["token_embd.weight"] == "Q5_0"
    assert stored["blk.2.ffn_up.weight"] == "Q5_1"
    assert verify(VerifyConfig(file=tmp_path / FILE)).verdict is Verdict.PASS


def test_a_size_that_nothing_has(
    exported: Path, model: Path, text: Path, hessians: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"the smallest has .*\((\d+) bytes\)") as caught:
        run(exported, model, text, hessians, tmp_path, max_size=50_000)
    smallest = int(str(caught.value).partition("(")[2].split()[0])
    record = run(exported, model, text, hessians, tmp_path, max_size=smallest)
    assert smallest - 300 <= (tmp_path / FILE).stat().st_size <= smallest
    found = QuantizeMetrics.of(record).mixture
    assert found is not None
    assert {chosen.type for chosen in found.tensors.values()} <= {"Q2_K", "Q4_0", "IQ4_NL"}
    with pytest.raises(InputError):
        run(exported, model, text, hessians, tmp_path, max_size=smallest - 1)


def test_too_little_text_to_measure_on(
    exported: Path, model: Path, hessians: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("One sentence.", encoding="utf-8")
    with pytest.raises(DataError, match="too few to measure KL on"):
        run(exported, model, short, hessians, tmp_path)


@pytest.mark.parametrize("more", [{"types": ("F16",)}, {"tensor_types": (".=Q8_0",)}])
def test_nothing_to_choose(
    more: dict[str, Any], exported: Path, model: Path, text: Path, hessians: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no matrix whose type could be chosen"):
        run(exported, model, text, hessians, tmp_path, **more)
    assert list(tmp_path.glob("*.gguf")) == []


def test_who_cannot_choose_is_told(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--solver hessian"):
        quantize(QuantizeConfig(gguf=exported, out=tmp_path, max_size=LIMIT))
    runner = CliRunner()
    said = ["quantize", str(exported), "--out", str(tmp_path), "--max-size", "240kB"]
    for more, why in (
        (["--type", "Q4_K_M", "--type", "Q8_0"], "one file"),
        (["--pure"], "pure"),
    ):
        result = runner.invoke(app, [*said, "--solver", "hessian", *more])
        assert isinstance(result.exception, ConfigError)
        assert why in str(result.exception)
