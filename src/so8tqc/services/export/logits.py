"""The exported file is run: libllama's logits against transformers', on fixed tokens.

What may differ is what the file's types cost. That is measured in transformers itself, with
ggml's arithmetic imitated: every matrix rounded to the type that the file stores it in, and
every matrix's input rounded as ggml rounds it for that type (to the same type; F32 stays). It
needs no libllama, and a damaged file cannot widen its own limit, which is a multiple of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from so8tqc.checkpoints.safetensors_index import Checkpoint
from so8tqc.errors import DataError, MissingToolError, ModelError, ToolError
from so8tqc.gguf.file import GGUFFile
from so8tqc.gguf.tensor_map import gguf_names
from so8tqc.llama.isolated import first_logits
from so8tqc.llama.libllama import bindings
from so8tqc.metrics.columns import COLUMNS
from so8tqc.metrics.distributions import distribution, rows_per_block
from so8tqc.metrics.divergence import token_rows
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Check, judge, skipped
from so8tqc.sources.hf import HFModel, head_blocks
from so8tqc.sources.inputs.texts import encode, load_texts, load_tokenizer
from so8tqc.sources.placement import on_cpu
from so8tqc.sources.protocol import TokenIds
from so8tqc.sources.routing import Choice, ties, watching

if TYPE_CHECKING:
    import torch

CHECK = "export.logits"
TOKENS = 64
"""Enough for attention to matter; a wrong norm, rope or row order shows within a few tokens."""

KL_TARGET = 1e-6
"""Mean KL, nats, that is always allowed. F32 files, whose types cost nothing, measured
1e-7 to 4e-7 on SmolLM2-135M and tiny models of seven architectures: libllama caches keys and values
in F16."""

FLOOR_FACTOR = 3.0
"""Measured KL was 0.9 to 1.5 times what the types cost (the same models, F16, BF16, Q8_0). Of the
random models of ``docs/architectures.md`` (F16) three have more: 1.9, 2.2, and 2.7 (gpt_oss)."""

CHECK_MAX = "export.logits_max"
MAX_TARGET = 2.0**-10
"""Share of the largest logit that is always allowed: keys and values are cached in F16, whose unit
roundoff is 2⁻¹¹."""

MAX_FACTOR = 3.0
"""Measured maxima were at most 1.74 times what the types cost (the types of
``docs/architectures.md``, F16), but for gpt_oss: 2.0 and 2.7 in two sweeps."""

LEAST_CLEAN = 8
"""Tokens before the first routing tie that suffice to judge by. A large model with experts has a
tie nearly everywhere; it is judged by all tokens, and its limit has the ties in it, too."""

_TEXTS = "builtin:validation"
_Q8_BLOCK = 32


@dataclass(frozen=True)
class ModelRun:
    """The model directory, run on the fixed tokens.

    Attributes:
        model: ready to be run again.
        tokens: [T] ids.
        logits: [T, V] float32.
        choices: of experts, by each router.
    """

    model: HFModel
    tokens: TokenIds
    logits: torch.Tensor
    choices: tuple[Choice, ...] = ()


def run_model(checkpoint: Checkpoint) -> ModelRun | Check:
    """Run the model directory in transformers, in float32.

    Returns:
        The run; or, where there can be none, a skipped check with the reason: libllama is missing,
        memory does not suffice, or transformers does not know the model.
    """
    try:
        bindings()
    except MissingToolError as error:
        return skipped(CHECK, f"The file was not run. {error}")
    need = 4 * sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    if (free := _memory_available()) < need:
        return skipped(
            CHECK,
            f"The file was not run: transformers would need {need / 2**30:.1f} GiB of memory for "
            f"its reference, {free / 2**30:.1f} GiB are free.",
        )
    try:
        model = HFModel.load(checkpoint.directory, dtype="float32")
    except ModelError as error:
        return skipped(CHECK, f"The file was not run: there is no reference. {error}")
    tokens = fixed_tokens(checkpoint.directory, model)
    return ModelRun(model, tokens, *_logits(model, tokens))


def logits_checks(
    run: ModelRun | Check, gguf: GGUFFile, progress: Progress = SILENT
) -> list[Check]:
    """Mean KL and largest logit difference of the file, against what its types cost.

    Args:
        run: of the model directory; its model's weights are rounded in place, then dropped.
        gguf: the file.

    Returns:
        A failed check, too, where libllama cannot run the file.
    """
    if isinstance(run, Check):
        return [run]
    with (
        progress.task(f"running {gguf.path.name}", total=2, unit="passes") as task,
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        libllama = pool.submit(first_logits, gguf.path, run.tokens)
        with imitate_storage(run.model, gguf):
            rounded, choices = _logits(run.model, run.tokens)
        run.model.close()
        task.advance(1, item="transformers")
        try:
            candidate = libllama.result()
        except (DataError, ModelError, ToolError) as error:
            return [_failed(str(error))]
        task.advance(1, item="libllama")
    if candidate.shape != rounded.shape:
        return [_failed(f"The file has {candidate.shape[1]} tokens, the model {rounded.shape[1]}.")]
    found, floor = (_table(run.logits, other, run.tokens) for other in (candidate, rounded))
    clean, apart = _before_ties(found, run, choices)
    found, floor = ({k: v[:clean] for k, v in table.items()} for table in (found, floor))
    scale = float(run.logits[: clean + 1].abs().max())
    return [_verdict(found, floor, apart), _largest(found, floor, scale)]


def _before_ties(
    found: Mapping[str, Any], run: ModelRun, choices: tuple[Choice, ...]
) -> tuple[int, str]:
    """How many tokens are judged, and a sentence on those that are not."""
    marked = ties(run.choices, choices)[: len(found["kl"])]
    if not marked.any():
        return len(found["kl"]), ""
    first = int(marked.argmax())
    said = f" Rounding may turn the choice of experts at {int(marked.sum())} tokens"
    if first < LEAST_CLEAN:
        return len(found["kl"]), f"{said}; they are judged with the others, and so is their limit."
    apart = float(found["kl"][first:].mean())
    return first, f"{said}: from the first of them on they are counted apart (mean KL {apart:.1e})."


def _failed(reason: str) -> Check:
    return judge(CHECK, float("nan"), KL_TARGET, unit="nats", detail=reason)


def _memory_available() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def fixed_tokens(directory: Path, model: HFModel) -> TokenIds:
    """The first tokens of a fixed text; without a tokenizer, seeded random ids."""
    count = min(TOKENS, model.context)
    try:
        text = encode(load_texts([_TEXTS])[:1], load_tokenizer(directory), count)[0].tokens
    except ModelError:
        return np.random.default_rng(0).integers(0, model.vocab_size, size=count)
    return text


def imitate_storage(model: HFModel, gguf: GGUFFile) -> Any:
    """Round the model's matrices, in place, and their inputs as ggml does for the file's types.

    Returns:
        A context to run the model in: there the inputs of fused experts are rounded, too, which are
        no module's.
    """
    import torch

    types = _types(model, gguf)
    with torch.inference_mode():
        for name, parameter in model.module.named_parameters():
            parameter.copy_(rounded(parameter, types.get(name, "F32")))
    by_identity = {id(p): types.get(name, "F32") for name, p in model.module.named_parameters()}
    for module in model.module.modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or isinstance(module, torch.nn.Embedding):
            continue
        module.register_forward_pre_hook(_RoundInput(by_identity.get(id(weight), "F32")))
    return _rounding_experts(
        {
            parameter.untyped_storage().data_ptr(): types.get(name, "F32")
            for name, parameter in model.module.named_parameters()
            if parameter.ndim == _STACKED
        }
    )


_STACKED = 3
"""Dimensions of experts in one parameter."""

_PRODUCTS = ("linear", "matmul", "__matmul__", "bmm", "grouped_mm", "_grouped_mm")


def _rounding_experts(types: Mapping[int, str]) -> Any:
    """A context in which what is multiplied with a part of these weights is rounded.

    Args:
        types: address of a weight's memory → GGML type to round to.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Rounding(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "__name__", "") in _PRODUCTS and len(args) > 1:
                weight = args[1]
                if isinstance(weight, torch.Tensor):
                    kind = types.get(weight.untyped_storage().data_ptr(), "F32")
                    args = (rounded(args[0], kind), *args[1:])
            return func(*args, **(kwargs or {}))

    return Rounding()


class _RoundInput:
    """A forward hook that rounds a module's input to a GGML type."""

    def __init__(self, type_: str) -> None:
        self.type = type_

    def __call__(self, _module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(arguments[0], self.type), *arguments[1:])


def _types(model: HFModel, gguf: GGUFFile) -> dict[str, str]:
    """Parameter → the GGML type the file stores it in.

    Matrices whose name the map does not know (experts that transformers has stacked) have the
    type of most of the file's weights.
    """
    parameters = dict(model.module.named_parameters())
    names = gguf_names(parameters.keys(), gguf.architecture, model.config.num_hidden_layers)
    weights: dict[str, int] = {}
    for tensor in gguf.tensors.values():
        weights[tensor.type] = weights.get(tensor.type, 0) + tensor.elements
    common = max(weights, key=lambda kind: weights[kind])
    found: dict[str, str] = {}
    for name, parameter in parameters.items():
        stored = gguf.tensors.get(names[name] or "")
        if stored is not None:
            found[name] = stored.type
        elif parameter.ndim > 1:
            found[name] = common
    return found


def rounded(values: torch.Tensor, type_: str) -> torch.Tensor:
    import torch

    match type_:
        case "F16":
            return values.to(torch.float16).to(values.dtype)
        case "BF16":
            return values.to(torch.bfloat16).to(values.dtype)
        case "Q8_0" if values.shape[-1] % _Q8_BLOCK == 0:
            blocks = values.reshape(-1, _Q8_BLOCK)
            scale = blocks.abs().amax(dim=1, keepdim=True) / 127
            steps = (blocks / scale.clamp_min(torch.finfo(values.dtype).tiny)).round()
            return (steps * scale.to(torch.float16)).reshape(values.shape)
        case _:
            return values


def _logits(model: HFModel, tokens: TokenIds) -> tuple[torch.Tensor, tuple[Choice, ...]]:
    import torch

    with watching(tokens.size) as watch:
        hidden = model.hidden(tokens)
    logits = on_cpu(torch.cat(list(head_blocks(model, hidden, tokens.size))))
    return logits, tuple(watch.choices)


def _table(reference: Any, candidate: Any, tokens: TokenIds) -> Mapping[str, Any]:
    """Column of a token table → [T − 1] values."""
    import torch

    targets = torch.from_numpy(np.ascontiguousarray(tokens[1:]))
    step = rows_per_block(reference.shape[1])
    rows = []
    for start in range(0, targets.shape[0], step):
        goal = targets[start : start + step]
        window = slice(start, start + goal.shape[0])
        sides = [distribution(torch.as_tensor(z[window]), goal) for z in (reference, candidate)]
        rows.append(token_rows(sides[0], sides[1]))
    return dict(zip(COLUMNS, torch.cat(rows).T, strict=True))


def _largest(found: Mapping[str, Any], floor: Mapping[str, Any], scale: float) -> Check:
    """``export.logits_max``; ``scale`` is the reference's largest logit."""
    value, cost = (float(table["max_abs_logit"].max()) for table in (found, floor))
    target = MAX_TARGET * scale
    return judge(
        CHECK_MAX,
        value,
        max(target, MAX_FACTOR * cost),
        target=target,
        noise_floor=cost,
        detail=f"Largest difference of one logit on {len(found['kl'])} fixed tokens, where the "
        f"largest logit is {scale:.3g}. Allowed is {MAX_FACTOR:g} times what its types cost.",
    )


def _verdict(found: Mapping[str, Any], floor: Mapping[str, Any], apart: str) -> Check:
    kl, cost = float(found["kl"].mean()), float(floor["kl"].mean())
    return judge(
        CHECK,
        kl,
        max(KL_TARGET, FLOOR_FACTOR * cost),
        unit="nats",
        target=KL_TARGET,
        noise_floor=cost,
        detail=f"Mean KL of libllama's logits from transformers' on {len(found['kl'])} fixed "
        f"tokens; same top token at {float(found['same_top'].mean()):.1%}, largest difference "
        f"{float(found['max_abs_logit'].max()):.2e}. Allowed is {FLOOR_FACTOR:g} times what the "
        f"file's types cost, measured in transformers.{apart}",
    )
