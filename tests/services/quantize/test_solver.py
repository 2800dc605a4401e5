"""``quantize --solver hessian`` on a small Llama: exported, solved for, run, verified, refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from so8tqc.config import ExportConfig, QuantizeConfig, VerifyConfig
from so8tqc.corpus.manifest import manifest_path
from so8tqc.errors import DataError, InputError, ModelError, So8tqcError
from so8tqc.gguf.file import open_gguf
from so8tqc.llama.vendor import is_vendored
from so8tqc.quantizers.hessians import Manifest, MomentsFile, Part, square, triangle, write_moments
from so8tqc.record_files import write_record
from so8tqc.records import Record, Verdict
from so8tqc.services.attest.verify_file import verify
from so8tqc.services.export.service import write_gguf
from so8tqc.services.quantize import solver as module
from so8tqc.services.quantize.calibration import calibration_texts
from so8tqc.services.quantize.imatrix import compute_imatrix
from so8tqc.services.quantize.service import quantize
from wide_llama import write_calibration, write_wide

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not is_vendored(), reason="run `so8tqc vendor` first"),
]

_TOKENS = 2048


@pytest.fixture(scope="module")
def model(tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose down projections have 256 columns, for K-quants, and the others 96."""
    folder = tmp_path_factory.mktemp("solver") / "model"
    return write_wide(folder, tokenizer_files, layers=2, seed=3)


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    out = model.parent / "wide-F16.gguf"
    write_gguf(ExportConfig(model=model, out=out))
    return out


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    return write_calibration(model.parent / "calibration.txt")


def run(exported: Path, out: Path, *types: str, **options: Any) -> Record:
    config = QuantizeConfig(
        gguf=exported, out=out, types=types, solver="hessian", hessian_tokens=_TOKENS, **options
    )
    record = quantize(config)
    write_record(out / "record.json", record)
    return record


@pytest.fixture(scope="module")
def solved(exported: Path, model: Path, text: Path) -> tuple[Path, Record]:
    out = model.parent / "solved"
    record = run(
        exported, out, "Q4_K_M", "Q3_K_M", model=model, hessian_data=(str(text),), threads=1
    )
    return out, record


def bytes_of(path: Path) -> dict[str, bytes]:
    return {name: tensor.raw.tobytes() for name, tensor in open_gguf(path).tensors.items()}


def test_types_and_sizes_are_libllamas_and_outputs_move_less(
    solved: tuple[Path, Record], exported: Path, tmp_path: Path
) -> None:
    out, record = solved
    assert record.verdict is Verdict.PASS
    plain = quantize(QuantizeConfig(gguf=exported, out=tmp_path, types=("Q4_K_M", "Q3_K_M")))
    assert plain.verdict is Verdict.PASS
    for name in ("wide-Q4_K_M.gguf", "wide-Q3_K_M.gguf"):
        ours, theirs = open_gguf(out / name), open_gguf(tmp_path / name)
        assert ours.path.stat().st_size == theirs.path.stat().st_size
        assert {n: (t.type, t.shape, t.offset) for n, t in ours.tensors.items()} == {
            n: (t.type, t.shape, t.offset) for n, t in theirs.tensors.items()
        }
        told: Any = record.metrics["solver"]["files"][name]
        # q, k, v, o, gate, up, down of two layers, and the tied head
        assert len(told["tensors"]) == 15
        assert told["left"] == {}
        for tensor, errors in told["tensors"].items():
            assert errors["solved"] < 0.95 * errors["libllama"], tensor


def test_errors_told_are_those_of_the_files(
    solved: tuple[Path, Record], exported: Path, tmp_path: Path
) -> None:
    """Against the model's own inputs: transformers' forward, numpy's products."""
    out, record = solved
    moments = MomentsFile(out / "wide-hessians.npz")
    (group,) = [g for g in moments.manifest.groups if "blk.1.ffn_down.weight" in g.tensors]
    part = moments.part(group)
    hessian = square(part.kept, 256) + square(part.held, 256)
    weights = open_gguf(exported).tensors["blk.1.ffn_down.weight"].values().astype(np.float64)
    stored = open_gguf(out / "wide-Q4_K_M.gguf").tensors["blk.1.ffn_down.weight"].values()
    delta = weights - stored
    share = np.einsum("ri,ij,rj->", delta, hessian, delta) / np.einsum(
        "ri,ij,rj->", weights, hessian, weights
    )
    told: Any = record.metrics["solver"]["files"]["wide-Q4_K_M.gguf"]["tensors"]
    assert told["blk.1.ffn_down.weight"]["solved"] == pytest.approx(share**0.5, rel=1e-3)


def test_libllama_runs_it_nearer_to_the_original(
    solved: tuple[Path, Record], exported: Path, text: Path, tmp_path: Path
) -> None:
    from so8tqc.llama.libllama import LlamaModel, tokenize

    out, _ = solved
    quantize(QuantizeConfig(gguf=exported, out=tmp_path, types=("Q3_K_M",)))
    tokens, _ = tokenize(exported, text.read_text(encoding="utf-8")[9000:9400])

    def logits(path: Path) -> np.ndarray:
        runner = LlamaModel(path, threads=1, context=128)
        runner.begin(100)
        return np.array(runner.decode(tokens[:100], 0))

    exact = logits(exported)
    ours, theirs = (
        float(np.abs(logits(folder / "wide-Q3_K_M.gguf") - exact).mean())
        for folder in (out, tmp_path)
    )
    assert ours < theirs


def test_the_bytes_do_not_depend_on_threads_and_verify_makes_them_again(
    solved: tuple[Path, Record], exported: Path, tmp_path: Path
) -> None:
    out, _ = solved
    run(exported, tmp_path, "Q4_K_M", hessians=out / "wide-hessians.npz", threads=3)
    name = "wide-Q4_K_M.gguf"
    assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    record = verify(VerifyConfig(file=out / name))
    assert record.verdict is Verdict.PASS
    assert record.metrics["tensors"]["different"] == 0
    assert record.metrics["not_identical"] == {}
    (out / "wide-hessians.npz").rename(tmp_path / "moved.npz")
    try:
        with pytest.raises(InputError, match="hessians that the file was made from"):
            verify(VerifyConfig(file=out / name))
        moved = VerifyConfig(file=out / name, hessians=tmp_path / "moved.npz")
        assert verify(moved).verdict is Verdict.PASS
    finally:
        (tmp_path / "moved.npz").rename(out / "wide-hessians.npz")


def test_verify_sees_other_codes(solved: tuple[Path, Record], tmp_path: Path) -> None:
    import shutil

    out, _ = solved
    changed = tmp_path / "wide-Q4_K_M.gguf"
    shutil.copy(out / changed.name, changed)
    tensor = open_gguf(changed).tensors["blk.0.attn_q.weight"]
    data = bytearray(changed.read_bytes())
    data[tensor.offset + 9] ^= 1
    changed.write_bytes(data)
    record = verify(VerifyConfig(file=changed, record=out / "record.json"))
    assert record.verdict is Verdict.FAIL
    assert list(record.metrics["not_identical"]) == ["blk.0.attn_q.weight"]


class _StopsAfter:
    """Progress that interrupts a task after some of its units."""

    def __init__(self, task: str, units: int) -> None:
        self._task, self._units = task, units

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Any]:
        del total, unit
        left = self._units

        class Task:
            def advance(_self, amount: float = 1.0, item: str | None = None) -> None:
                nonlocal left
                del amount, item
                left -= 1
                if description.startswith(self._task) and left == 0:
                    raise KeyboardInterrupt

        yield Task()

    def message(self, text: str) -> None:
        del text


@pytest.mark.parametrize("task", ["running layers", "solving"])
def test_what_was_done_is_not_done_again(
    task: str,
    solved: tuple[Path, Record],
    exported: Path,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, _ = solved
    options: dict[str, Any] = {"model": model, "hessian_data": (str(text),)}
    config = QuantizeConfig(
        gguf=exported,
        out=tmp_path,
        types=("Q4_K_M",),
        solver="hessian",
        threads=1,
        hessian_tokens=_TOKENS,
        **options,
    )
    with pytest.raises(KeyboardInterrupt):
        quantize(config, _StopsAfter(task, 3 if task == "solving" else 2))
    assert not (tmp_path / "wide-Q4_K_M.gguf").exists()
    solving = []
    solve_group = module._solved
    monkeypatch.setattr(
        module, "_solved", lambda names, *rest: solving.append(names) or solve_group(names, *rest)
    )
    run(exported, tmp_path, "Q4_K_M", **options)
    assert len(solving) == (13 - 3 if task == "solving" else 13)
    assert bytes_of(tmp_path / "wide-Q4_K_M.gguf") == bytes_of(out / "wide-Q4_K_M.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "record.json",
        "wide-Q4_K_M.gguf",
        "wide-hessians.npz",
    ]


def test_another_model_directory_is_refused(
    exported: Path, model: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(ModelError):
        run(exported, tmp_path, "Q4_K_M", model=llama, hessian_data=(str(text),))
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 5] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight is not model\.layers\.1"):
        run(exported, tmp_path, "Q4_K_M", model=other, hessian_data=(str(text),))


def test_a_file_that_nothing_says_the_model_of(exported: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--model"):
        run(exported, tmp_path, "Q4_K_M", hessian_data=(str(text),))


def _judging() -> str:
    path = Path(__file__).parents[3] / "data" / "validation_ja.json"
    text: str = json.loads(path.read_text(encoding="utf-8"))["texts"][3]
    return text


def _as_lines(judging: str) -> tuple[str, str]:
    lines = ["something else", judging.replace("\n", " \n ") + "\n"]
    return "mine.jsonl", "\n".join(json.dumps({"text": line}) for line in lines)


def _amid_others(judging: str) -> tuple[str, str]:
    return "mine.txt", f"Something else.\n\n{judging}\n\nAnd more."


def _a_paragraph(judging: str) -> tuple[str, str]:
    return "mine.txt", max(judging.split("\n\n"), key=len)


@pytest.mark.parametrize("write", [_as_lines, _amid_others, _a_paragraph])
def test_text_that_judges_is_refused(
    write: Callable[[str], tuple[str, str]], exported: Path, model: Path, tmp_path: Path
) -> None:
    name, content = write(_judging())
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="which judges"):
        run(exported, tmp_path, "Q4_K_M", model=model, hessian_data=(str(path),))
    with pytest.raises(DataError, match="which judges"):
        compute_imatrix(open_gguf(exported), (str(path),), tmp_path / "imatrix.gguf")
    path = tmp_path / "other.txt"
    path.write_text("Nothing of the kind.", encoding="utf-8")
    assert len(calibration_texts((str(path),))) == 1


def test_what_the_project_calibrates_with_does_not_judge() -> None:
    written = sorted(manifest_path().parent.glob("calibration_*.json"))
    assert len(calibration_texts([str(path) for path in written])) == 250


def test_too_little_text(exported: Path, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("One sentence.")
    with pytest.raises(DataError, match="fewer than a chunk"):
        run(exported, tmp_path, "Q4_K_M", model=model, hessian_data=(str(path),))


def test_fewer_tokens_than_columns_are_told(
    exported: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    config = QuantizeConfig(
        gguf=exported,
        out=tmp_path,
        types=("Q4_K_M",),
        solver="hessian",
        model=model,
        hessian_data=(str(text),),
        hessian_tokens=128,
    )
    record = quantize(config)
    assert record.verdict is Verdict.PASS
    assert any("128 calibration tokens are fewer than the 256 columns" in n for n in record.notices)
    assert any("1024 tokens would do" in notice for notice in record.notices)
    told: Any = record.metrics["solver"]["files"]["wide-Q4_K_M.gguf"]["tensors"]
    assert {errors["damping"] for errors in told.values()} == {module.UNJUDGED}


def _changed(path: Path, out: Path, tensor: str, change: Any) -> Path:
    """A copy of a file of second moments with one group changed."""
    moments = MomentsFile(path)
    parts = []
    for group in moments.manifest.groups:
        part = moments.part(group)
        parts.append(change(part) if tensor in group.tensors else part)
    write_moments(out, Manifest(inputs=moments.manifest.inputs), parts)
    return out


def _with(part: Part, value: float, index: int) -> Part:
    kept = part.kept.copy()
    kept[index] = value
    return part._replace(kept=kept)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda part: _with(part, np.nan, 7), "blk.1.attn_q.weight.*not finite"),
        (lambda part: _with(part, -1, 0), "blk.1.attn_q.weight.*negative"),
        (lambda part: part._replace(kept=part.kept * 0, held=part.held * 0), "every input was"),
        (lambda part: part._replace(kept=part.kept[:-1]), "second moments of"),
        (lambda part: part._replace(group=part.group.model_copy(update={"tensors": ("x",)})),
         "does not have"),
        (lambda part: part._replace(group=part.group.model_copy(update={"columns": 95})),
         "the tensor has 96"),
    ],
)  # fmt: skip
def test_second_moments_that_cannot_be_are_named(
    change: Any, said: str, solved: tuple[Path, Record], exported: Path, tmp_path: Path
) -> None:
    out, _ = solved
    broken = _changed(out / "wide-hessians.npz", tmp_path / "b.npz", "blk.1.attn_q.weight", change)
    with pytest.raises(So8tqcError, match=said):
        run(exported, tmp_path / "q", "Q4_K_M", hessians=broken)
    assert not (tmp_path / "q" / "wide-Q4_K_M.gguf").exists()


def test_dead_columns_are_named(
    solved: tuple[Path, Record], exported: Path, tmp_path: Path
) -> None:
    def kill(part: Part) -> Part:
        kept, held = square(part.kept, 96), square(part.held, 96)
        for matrix in (kept, held):
            matrix[:, 5:8] = matrix[5:8] = 0
        group = part.group.model_copy(update={"dead": 3})
        return Part(group, triangle(kept), triangle(held))

    out, _ = solved
    dead = _changed(out / "wide-hessians.npz", tmp_path / "d.npz", "blk.1.attn_q.weight", kill)
    record = run(exported, tmp_path / "q", "Q4_K_M", hessians=dead)
    assert record.verdict is Verdict.PASS
    assert any("3 of blk.1.attn_q.weight" in notice for notice in record.notices)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"GGUF"])
def test_what_is_no_file_of_second_moments(content: bytes, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "h.npz"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a file of second moments"):
        run(exported, tmp_path, "Q4_K_M", hessians=path)


def test_pickles_are_not_read(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "h.npz"
    np.savez(path, manifest=np.array([{"version": 1}], dtype=object))
    with pytest.raises(ModelError, match="not a file of second moments"):
        run(exported, tmp_path, "Q4_K_M", hessians=path)


def test_the_file_of_second_moments_has_the_same_bytes_each_time(
    solved: tuple[Path, Record], tmp_path: Path
) -> None:
    out, _ = solved
    again = _changed(out / "wide-hessians.npz", tmp_path / "a.npz", "", lambda part: part)
    assert again.read_bytes() == (out / "wide-hessians.npz").read_bytes()
