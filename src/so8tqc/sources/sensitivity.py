"""How much a model's predictions move when what its matrices put out is moved.

With an error δy in a matrix' outputs, independent of the gradient g of the loss there, the KL from
the model to the one with the error is, to second order, ½ E[(g·δy)²], where the loss is the
negative log-likelihood of tokens drawn from the model itself (the Fisher information is the Hessian
of that KL; Martens 2020, arXiv:1412.1193, section 8). Taking the outputs' errors to be independent
of one another and g to be as large in each, that is ½ Ē[g²] · E‖δy‖², with Ē the mean over tokens
and outputs: one number for each matrix (as in K-FAC with an output factor that is a multiple of the
identity).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from so8tqc.progress import SILENT, Progress
from so8tqc.sources.hf import HFModel
from so8tqc.sources.moments import HEAD, is_linear
from so8tqc.sources.protocol import TokenIds

EMBEDDING = "embedding"

SEED = 0
"""Of the tokens that are drawn."""

_THROUGH_ATTENTION = ("k_proj", "v_proj")
_ATTENTION_OUTPUT = "o_proj"


def sensitivities(
    model: HFModel, chunks: Sequence[TokenIds], progress: Progress = SILENT
) -> dict[str, float]:
    """½ Ē[g²] of every linear by the name of its module, of the output head and of the embedding.

    The latter two are called :data:`so8tqc.sources.moments.HEAD` and :data:`EMBEDDING`. Of linears
    that make keys and values it is that of what attention puts out, as their second moments are
    (``sources.attended``), where the layer has an ``o_proj`` that this enters.

    Args:
        model: as it was loaded; no weight's gradient is computed.
        chunks: of text, each run forward and back once.
        progress: told about chunks.
    """
    import torch

    sums: dict[str, float] = {}
    draw = torch.Generator(model.device).manual_seed(SEED)
    tokens = 0
    with (
        progress.task("gradients", total=len(chunks), unit="chunks") as task,
        _frozen(model.module),
        _watched(model.module, sums),
    ):
        for chunk in chunks:
            ids = torch.from_numpy(chunk).to(model.device)[None]
            logits = model.module(input_ids=ids, use_cache=False).logits[0].float()
            with torch.no_grad():
                gradient = torch.softmax(logits, -1)
                drawn = torch.multinomial(gradient, 1, generator=draw)[:, 0]
                gradient.scatter_add_(1, drawn[:, None], -torch.ones_like(gradient[:, :1]))
            logits.backward(gradient)
            tokens += len(drawn)
            task.advance(1)
    return {name: 0.5 * total / tokens for name, total in sums.items()}


@contextmanager
def _frozen(module: Any) -> Iterator[None]:
    """No weight asks for a gradient."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _watched(module: Any, sums: dict[str, float]) -> Iterator[None]:
    """Gradients' mean squares are added to ``sums``, token by token."""
    names = {id(one): name for name, one in module.named_modules()}
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    names |= {id(embedding): EMBEDDING, id(head): HEAD}

    def added(*to: str) -> Callable[[Any], None]:
        def add(gradient: Any) -> None:
            total = float(gradient.double().square().sum()) / gradient.shape[-1]
            for name in to:
                sums[name] = sums.get(name, 0.0) + total

        return add

    def begun(_module: Any, _arguments: Any, output: Any) -> Any:
        output = output.detach().requires_grad_()
        output.register_hook(added(EMBEDDING))
        return output

    def put_out(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            if output.requires_grad:
                output.register_hook(added(name))

        return hook

    def entered(inside: tuple[str, ...]) -> Callable[[Any, Any], None]:
        def hook(_module: Any, arguments: Any) -> None:
            if arguments[0].requires_grad:
                arguments[0].register_hook(added(*inside))

        return hook

    linears = {names[id(one)]: one for one in module.modules() if is_linear(one)}
    inside = _through_attention(linears)
    elsewhere = {name for some in inside.values() for name in some}
    with ExitStack() as stack:
        stack.callback(embedding.register_forward_hook(begun).remove)
        for name, linear in linears.items():
            if name not in elsewhere:
                stack.callback(linear.register_forward_hook(put_out(name)).remove)
            if name in inside:
                stack.callback(linear.register_forward_pre_hook(entered(inside[name])).remove)
        yield


def _through_attention(linears: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What makes an attention's output → what makes its keys and values."""
    found = {}
    for name in linears:
        parent, _, own = name.rpartition(".")
        beside = (f"{parent}.{one}" for one in _THROUGH_ATTENTION)
        if own == _ATTENTION_OUTPUT and (inside := tuple(n for n in beside if n in linears)):
            found[name] = inside
    return found
