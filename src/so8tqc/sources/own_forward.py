"""A model's own forward, cut in two: hidden states of a whole text, then logits of some rows.

No formula of any architecture stands here. The cut is at the output of the *backbone*, the largest
part of the model that holds the decoder layers and not the output head; what comes after it (final
scalings, multipliers, soft caps, the head itself) is done by the model's forward, given hidden
states in place of the backbone's run. Whether both halves make the whole is proved on a few tokens
of every model that is loaded, and that no logits depend on tokens that follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from so8tqc.decoder import decoder_stack
from so8tqc.errors import ModelError, RotationError

if TYPE_CHECKING:
    import torch

_TOKENS = 8
_PROOF = 64.0
"""Times the compute dtype's unit roundoff, relative to the largest logit: a product of the head's
rows in other blocks is summed in another order."""

_AHEAD = 0.01
"""Of the largest logit, that those of some tokens may change when others follow: kernels sum in
another order then, in 16 bits by up to a percent of it."""

_TINY = 1e-30

_SCALES = (1.0, 1e3)
"""Hidden states are also tried enlarged: a soft cap does nothing to small logits."""


class _EnoughError(Exception):
    """The text model was about to run: what it is given is known."""


class OwnForward:
    """A transformers model as two functions: tokens → hidden states, hidden states → logits.

    Attributes:
        plain: the second one is the product with the head's weight and nothing else.

    Raises:
        ModelError: the two together are not the model's forward, or its logits depend on tokens
            that follow.
    """

    def __init__(self, module: Any, head: Any, device: torch.device, where: str) -> None:
        self._module = module
        self._head = head
        self._names = parts_around_layers(module, head, where)
        self._name = ""
        self._output: Any = None
        self.plain = False
        self._prove(device, where)

    @classmethod
    def of_pass(cls, module: Any, head: Any, seen: SeenPass, where: str) -> OwnForward:
        """The same of a model whose layers are not there: both halves were seen in one pass.

        Args:
            module, head: the model; of its weights only those that follow the backbone are there.
            seen: what was seen of :func:`ordinary_ids`.
            where: for messages.

        Raises:
            ModelError: the second half does not make of the first's output what the pass made.
        """
        import torch

        made = cls.__new__(cls)
        made._module, made._head = module, head
        made._names, made._name, made._output = [], seen.backbone, seen.output
        made.plain = False
        with torch.inference_mode():
            made._require_same(made.logits(seen.hidden), seen.logits, where)
            made.plain = made._is_plain(seen.hidden)
        return made

    @property
    def _backbone(self) -> Any:
        return self._module.get_submodule(self._name)

    def hidden(
        self, ids: torch.Tensor, pictures: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> torch.Tensor:
        """[1, T] ids → [T, D], the backbone's output inside the model's own forward.

        Args:
            ids: of a text.
            pictures: further arguments of the forward; those that it does not take are left out.
        """
        kept: list[Any] = []
        handles = [
            self._backbone.register_forward_hook(lambda _m, _a, output: kept.append(output)),
            # of the head's logits only one row is made, and not looked at
            self._head.register_forward_pre_hook(
                lambda _m, args: (args[0][..., -1:, :], *args[1:])
            ),
        ]
        try:
            self._run(ids, pictures)
        finally:
            for handle in handles:
                handle.remove()
        self._output = type(kept[-1])
        hidden: torch.Tensor = states_of(kept[-1])[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[t, D] → [t, V], what the model's forward makes of the backbone's output."""
        import torch

        ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
        with self._given(hidden[None]):
            logits: torch.Tensor = self._run(ids).logits[0]
        return logits

    @contextmanager
    def _given(self, hidden: torch.Tensor) -> Iterator[None]:
        """The backbone returns these hidden states, whatever it is asked."""
        backbone = self._backbone
        own = vars(backbone).get("forward")

        def forward(*_args: Any, **_options: Any) -> Any:
            if self._output is tuple:
                return (hidden,)
            return self._output(last_hidden_state=hidden)

        backbone.forward = forward
        try:
            yield
        finally:
            if own is None:
                del backbone.forward
            else:
                backbone.forward = own

    def embedded(self, ids: torch.Tensor, pictures: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What the model's forward hands to its text model: keyword → value; that is not run."""
        stack = decoder_stack(self._module)[0]
        text_model = self._module.get_submodule(stack.rpartition(".")[0])
        given: dict[str, Any] = {}

        def stop(_module: Any, _args: Any, options: dict[str, Any]) -> None:
            given.update(options)
            raise _EnoughError

        handle = text_model.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._run(ids, pictures)
        except _EnoughError:
            return given
        finally:
            handle.remove()
        raise AssertionError("the forward did not come by its text model")

    def _run(
        self, ids: torch.Tensor, pictures: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> Any:
        options: dict[str, Any] = dict(plain_options(self._module))
        accepted = inspect.signature(type(self._module).forward).parameters
        for name, value in pictures.items():
            if name in accepted:
                floating = value.is_floating_point()
                options[name] = value.to(ids.device, self._module.dtype if floating else None)
        return self._module(input_ids=ids, **options)

    def _called(self, ids: torch.Tensor) -> tuple[str, torch.Tensor]:
        """The outermost of these parts that the forward calls, and the whole model's logits."""
        called: set[str] = set()
        handles = [
            self._module.get_submodule(name).register_forward_hook(
                lambda _m, _a, _o, name=name: called.add(name)
            )
            for name in self._names
        ]
        try:
            logits: torch.Tensor = self._run(ids).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return next(name for name in self._names if name in called), logits

    def _prove(self, device: torch.device, where: str) -> None:
        import torch

        ids = torch.tensor([ordinary_ids(self._module.config)], device=device)
        with torch.inference_mode():
            try:
                self._name, whole = self._called(ids)
                hidden = self.hidden(ids)
                parted = self.logits(hidden)
            except Exception as error:  # noqa: BLE001  each architecture fails in its own way
                lines = str(error).strip().splitlines() or [""]
                raise ModelError(
                    f"the forward of {type(self._module).__name__} fails on {_TOKENS} tokens: "
                    f"{type(error).__name__}: {lines[0]}",
                    where=where,
                ) from None
            self._require_same(parted, whole, where)
            self._require_causal(ids, whole, where)
            self.plain = self._is_plain(hidden)

    def _require_causal(self, ids: torch.Tensor, whole: torch.Tensor, where: str) -> None:
        some = ids.shape[1] // 2
        alone = self._run(ids[:, :some]).logits[0]
        changed = float((alone - whole[:some]).abs().nan_to_num().max())
        if changed > _AHEAD * float(whole.abs().nan_to_num().max()):
            raise ModelError(
                f"{type(self._module).__name__} is not causal: the logits of {some} tokens change "
                f"by up to {changed:.2g} when {ids.shape[1] - some} more follow",
                where=where,
                remedy="Its logits say nothing of how it predicts the next token.",
            )

    def _require_same(self, parted: torch.Tensor, whole: torch.Tensor, where: str) -> None:
        if not _same(parted, whole, whole):
            raise ModelError(
                f"{type(self._module).__name__} makes other logits of its hidden states than "
                f"of its tokens (largest difference {float((parted - whole).abs().max()):.2g})",
                where=where,
                remedy="Its logits cannot be computed part by part.",
            )

    def _is_plain(self, hidden: torch.Tensor) -> bool:
        import torch

        head = self._head
        if type(head) is not torch.nn.Linear or getattr(head, "bias", None) is not None:
            return False
        weight = head.weight
        if weight.device != hidden.device or weight.shape[1] != hidden.shape[1]:
            return False
        return all(
            _same((hidden * scale) @ weight.T, own := self.logits(hidden * scale), own)
            for scale in _SCALES
        )


class SeenPass(NamedTuple):
    """What was seen of one pass over a few tokens.

    Attributes:
        backbone: dotted name of the outermost part around the layers that the forward called.
        output: the type of what it returned.
        hidden: [T, D] the hidden states therein.
        logits: [T, V] what the whole forward made of the tokens.
    """

    backbone: str
    output: type
    hidden: torch.Tensor
    logits: torch.Tensor


def attend_causally(module: Any) -> None:
    """Let tokens see none that follow, where a class leaves that to its masks alone.

    An attention that says of itself that it is not causal (``is_causal``) relies on a mask; where
    transformers leaves out a mask that is causal and nothing else, its kernel for
    ``scaled_dot_product_attention`` then masks nothing (PaliGemma, transformers 5.23.0), and the
    plain one always has its mask.

    Args:
        module: a transformers model; changed in place.
    """
    try:
        _, layers = decoder_stack(module)
    except RotationError:  # said where its forward is looked at
        return
    if any(getattr(part, "is_causal", True) is False for part in layers.modules()):
        module.set_attn_implementation("eager")


def plain_options(module: Any) -> dict[str, bool]:
    """What a model's forward is given besides tokens: no cache, where it has a choice."""
    accepted = inspect.signature(type(module).forward).parameters
    return {"use_cache": False} if "use_cache" in accepted else {}


def parts_around_layers(module: Any, head: Any, where: str) -> list[str]:
    """Modules around the decoder layers that do not hold the output head, the outermost first.

    Some of them are never called themselves: which, shows the first run.

    Raises:
        ModelError: the layers cannot be told apart, or are in no such part.
    """
    try:
        layers = decoder_stack(module)[0].split(".")
    except RotationError as error:
        raise ModelError(error.what, where=where) from None
    around = [".".join(layers[:i]) for i in range(1, len(layers))]
    names = [
        name
        for name in around
        if all(part is not head for part in module.get_submodule(name).modules())
    ]
    if not names:
        raise ModelError(
            f"the decoder layers of {type(module).__name__} are in no part of their own",
            where=where,
        )
    return names


def states_of(output: Any) -> Any:
    """The hidden states of a backbone's output."""
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _same(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> bool:
    import torch

    if found.shape != expected.shape or bool((found.isfinite() != expected.isfinite()).any()):
        return False
    zero = torch.zeros_like(found)
    finite = expected.isfinite()
    difference = float(torch.where(finite, (found - expected).abs(), zero).max())
    largest = float(torch.where(finite, scale.abs(), zero).max())
    return difference <= _PROOF * torch.finfo(scale.dtype).eps * max(largest, _TINY)


def ordinary_ids(config: Any) -> list[int]:
    """A few token ids that mean no image, sound or padding to the model."""
    special: set[int] = set()

    def look(part: Any) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                look(value)
            elif str(key).endswith(("token_id", "token_index", "token_ids")):
                special.update(
                    v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)
                )

    look(config.to_dict())
    text = config.get_text_config(decoder=True)
    count = min(_TOKENS, int(getattr(text, "max_position_embeddings", None) or _TOKENS))
    size = int(text.vocab_size)
    ids = [i for i in range(min(size, 256)) if i not in special][:count]
    return ids or [0]
