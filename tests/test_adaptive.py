"""The logits processor: z / T(H), alone and inside generate()."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from so8tqc import AdaptiveTemperature
from so8tqc.disk.digests import sha256_file
from so8tqc.errors import DataError, ExitCode


def _expected(z: np.ndarray, a: float, b: float, bounds: tuple[float, float]) -> np.ndarray:
    logp = log_softmax(z, axis=1)
    finite = np.where(np.isfinite(logp), logp, 0.0)
    entropy = -(np.exp(logp) * finite).sum(axis=1, keepdims=True)
    return z / np.clip(a + b * entropy, *bounds)


@pytest.mark.parametrize(
    ("a", "b", "bounds"),
    [
        (1.3, 0.0, (0.5, 3.0)),
        (0.8, 0.3, (0.5, 3.0)),
        (2.0, -0.4, (0.9, 1.4)),
        (5.0, 0.0, (1.0, 2.0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_numpy(a: float, b: float, bounds: tuple[float, float], dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    z = generator.normal(size=(7, 50)) * generator.uniform(0.1, 9, size=(7, 1))
    z[2, 5:30] = -np.inf  # as another processor leaves what it forbids
    scores = torch.tensor(z, dtype=dtype)
    out = AdaptiveTemperature(a, b, bounds)(torch.zeros(7, 3, dtype=torch.long), scores)
    assert out.dtype is dtype
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    np.testing.assert_allclose(out.numpy(), _expected(z, a, b, bounds), rtol=tolerance)


def test_half_precision_logits_are_measured_in_float32() -> None:
    z = torch.tensor([[8.0, 1.0, 0.5, -2.0]], dtype=torch.bfloat16)
    processor = AdaptiveTemperature(0.8, 0.5)
    assert processor.temperatures(z).dtype is torch.float32
    exact = processor.temperatures(z.double())
    torch.testing.assert_close(processor.temperatures(z).double(), exact, rtol=1e-6, atol=0)
    assert processor(torch.zeros(1, 1), z).dtype is torch.bfloat16


@pytest.mark.parametrize("a", [1.4, 0.9])
def test_inside_generate(llama: Path, a: float) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32)
    b, bounds = 0.25, (0.7, 2.4)
    torch.manual_seed(0)
    out = model.generate(
        torch.tensor([[1, 17, 42, 99]]),
        max_new_tokens=12,
        do_sample=True,
        top_k=0,
        logits_processor=[AdaptiveTemperature(a, b, bounds)],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert len(out.scores) >= 1
    for raw, score in zip(out.logits, out.scores, strict=True):
        expected = _expected(raw.double().numpy(), a, b, bounds)
        np.testing.assert_allclose(score.numpy(), expected, rtol=1e-4, atol=1e-5)
        assert not np.allclose(score.numpy(), raw.numpy())


def test_comes_before_the_warpers(llama: Path) -> None:
    """top-k must see z/T(H), and H must be that of all tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32)
    out = model.generate(
        torch.tensor([[1, 17, 42, 99]]),
        max_new_tokens=1,
        do_sample=True,
        top_k=5,
        logits_processor=[AdaptiveTemperature(0.9, 0.2)],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    kept = torch.isfinite(out.scores[0][0])
    assert int(kept.sum()) == 5
    expected = _expected(out.logits[0].double().numpy(), 0.9, 0.2, (0.5, 3.0))[0]
    np.testing.assert_allclose(out.scores[0][0][kept].numpy(), expected[kept.numpy()], rtol=1e-4)


def _config(path: Path, *, entropy: bool = False, language: bool = False) -> Path:
    groups = {"significant": False, "temperatures": None}
    by_language = {
        "significant": True,
        "temperatures": {"en": {"temperature": 1.1}, "ja": {"temperature": 1.4}},
    }
    document = {
        "temperature": 1.2,
        "bounds": [0.5, 3.0],
        "group_temperatures": {"language": by_language if language else groups, "category": groups},
        "entropy_temperature": {
            "significant": entropy,
            "a": 0.9,
            "b": 0.1,
            "bounds": [0.6, 2.5],
        },
    }
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("found", "asked", "expected"),
    [
        ({}, {}, (1.2, 0.0, (0.5, 3.0))),
        ({}, {"language": "ja"}, (1.2, 0.0, (0.5, 3.0))),
        ({"entropy": True}, {}, (0.9, 0.1, (0.6, 2.5))),
        ({"language": True}, {}, (1.2, 0.0, (0.5, 3.0))),
        ({"language": True, "entropy": True}, {"language": "ja"}, (1.4, 0.0, (0.5, 3.0))),
        ({"language": True, "entropy": True}, {"category": "ethics"}, (0.9, 0.1, (0.6, 2.5))),
    ],
)
def test_takes_from_the_file_what_held_out_text_supports(
    found: dict[str, bool], asked: dict[str, str], expected: tuple[object, ...], tmp_path: Path
) -> None:
    path = _config(tmp_path / "temperature_config.json", **found)
    processor = AdaptiveTemperature.from_config(path, **asked)
    assert (processor.a, processor.b, processor.bounds) == expected


def test_unknown_groups_are_named(tmp_path: Path) -> None:
    path = _config(tmp_path / "t.json", language=True)
    with pytest.raises(DataError, match=r"no language 'fr'.*There are en, ja"):
        AdaptiveTemperature.from_config(path, language="fr")


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"temperature": 1.2}', '{"temperature": "x", "bounds": [0.5, 3]}', None]
)
def test_other_files_are_bad_input(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match="temperature configuration") as error:
        AdaptiveTemperature.from_config(path)
    assert error.value.exit_code is ExitCode.BAD_INPUT


@pytest.mark.parametrize(
    ("a", "b", "bounds"),
    [(float("nan"), 0, (0.5, 3)), (1, float("inf"), (0.5, 3)), (1, 0, (3, 0.5)), (1, 0, (0, 1))],
)
def test_impossible_temperatures_are_refused(
    a: float, b: float, bounds: tuple[float, float]
) -> None:
    with pytest.raises(ValueError, match="no temperature"):
        AdaptiveTemperature(a, b, bounds)


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, so8tqc; assert 'AdaptiveTemperature' in dir(so8tqc); "
        "heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        __import__("so8tqc").nothing  # noqa: B018


def test_a_temperature_of_another_model_is_refused(tmp_path: Path) -> None:
    served, other = tmp_path / "m.gguf", tmp_path / "n.gguf"
    declared, folded = tmp_path / "declared.gguf", tmp_path / "folded.gguf"
    for path in (served, other, declared, folded):
        path.write_bytes(path.name.encode())
    path = _config(tmp_path / "t.json")
    content = json.loads(path.read_text())
    content["model"] = {"file": "m.gguf", "sha256": sha256_file(served)}

    def of(served: Path, /, **more: object) -> AdaptiveTemperature:
        path.write_text(json.dumps({**content, **more}))
        return AdaptiveTemperature.from_config(path, model=served)

    assert of(served).a == content["temperature"]
    with pytest.raises(DataError, match=r"was fitted on m.gguf .* n.gguf .* is not.*calibrate"):
        of(other)
    copy = {"applied_sha256": sha256_file(declared), "applied": {"how": "metadata"}}
    assert of(declared, **copy).a == content["temperature"]
    copy = {"applied_sha256": sha256_file(folded), "applied": {"how": "norm"}}
    with pytest.raises(DataError, match="would count twice"):
        of(folded, **copy)
    with pytest.raises(DataError, match="does not say which file"):
        of(served, model=None)
