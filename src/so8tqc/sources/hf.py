"""Logits of a transformers model directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from so8tqc.checkpoints.plausible import require_plausible_config
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.checkpoints.skeleton import auto_class, run_options
from so8tqc.errors import DataError, ModelError
from so8tqc.sources.memory import BlockMemory
from so8tqc.sources.own_forward import OwnForward, attend_causally
from so8tqc.sources.placement import (
    enough_gpu_memory,
    execution_device,
    followed,
    ids_on,
    passing,
)
from so8tqc.sources.protocol import TokenIds
from so8tqc.sources.quiet import quiet_transformers
from so8tqc.sources.ranks import local_rank
from so8tqc.sources.seen import Embedded, Images, embedded_of, images_of

if TYPE_CHECKING:
    import torch


_PICTURE_IDS = ("image_token_id", "image_token_index")
"""Keys of configurations that name the id at a picture's positions."""


class OutputHead:
    """What follows a model's backbone: hidden states → logits.

    Args:
        head: the output head's module.
        forward: the model's forward in two parts.
        where: for messages.
    """

    def __init__(self, head: Any, forward: OwnForward, where: str) -> None:
        self._head = head
        self._forward = forward
        self._where = where
        self._memory = BlockMemory()
        self._width = int(head.weight.shape[0])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[t, D] hidden states → [t, V] logits as the model's own forward makes them.

        Where that is proved to be the product with the head's weight alone, it is computed on the
        CPU in memory that is used again.
        """
        import torch

        with (
            torch.inference_mode(),
            enough_gpu_memory(f"the logits of {hidden.shape[0]} tokens", self._where),
        ):
            head = self._head
            hidden = hidden.to(execution_device(head))
            hooks = hasattr(head, "_hf_hook") or head._forward_hooks or head._forward_pre_hooks
            if not self._forward.plain or hooks or hidden.device.type != "cpu":
                return self._forward.logits(hidden)
            block = self._memory.take((hidden.shape[0], self._width), hidden.dtype)
            return torch.mm(hidden, head.weight.T, out=block)


class HFModel:
    """A loaded model, its forward cut in two (see :class:`OwnForward`).

    The backbone gives [T, D] hidden states; what follows turns a few rows at a time into logits,
    so that no [T, V] array is ever made.

    Attributes:
        module: the transformers model, in eval mode.
        config: its text configuration.
        vocab_size: V, the head's output width.
        context: longest supported sequence, tokens.
        path: the directory it was loaded from.
    """

    def __init__(
        self, module: Any, path: Path, offloaded: TemporaryDirectory[str] | None = None
    ) -> None:
        self.module = module.eval()
        self._offloaded = offloaded
        self.path = path
        self.config = module.config.get_text_config()
        head = module.get_output_embeddings()
        if head is None:
            raise ModelError("the model has no output head", where=str(path))
        self._head = head
        attend_causally(self.module)
        self._forward = OwnForward(self.module, head, self.device, str(path))
        self._logits = OutputHead(head, self._forward, str(path))
        self.vocab_size = int(head.weight.shape[0])
        self.context = int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str | None = None,
        attention: str | None = None,
        device_map: str | None = None,
        max_memory: Mapping[int | str, int] | None = None,
    ) -> HFModel:
        """Load a model directory; no remote code, no network.

        Args:
            path: directory with config.json and safetensors weights.
            dtype: compute dtype, whatever the files store; None: float32, or bfloat16 on a GPU.
            attention: transformers' attention implementation, None for its default.
            device_map: ``auto`` lets accelerate spread the weights over GPUs, memory and, for what
                is left, a temporary folder; None: all on the first GPU, or in memory.
            max_memory: bytes to use at most for each device (``0`` …, ``cpu``), under ``auto``.

        Raises:
            ModelError: missing, unreadable, or no language model.
        """
        import torch
        from transformers import AutoConfig

        if not (path / "config.json").is_file():
            raise ModelError("not a model directory: config.json is missing", where=str(path))
        require_plausible_config(open_checkpoint(path))
        cuda = torch.cuda.is_available()
        compute = dtype or ("bfloat16" if cuda else "float32")
        options = run_options(compute, attention)
        offloaded = None
        if device_map is not None:
            offloaded = TemporaryDirectory(prefix="so8tqc-offload-")
            options |= {"device_map": device_map, "offload_folder": offloaded.name}
            options |= {"max_memory": dict(max_memory)} if max_memory else {}
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(
                    str(path), local_files_only=True, trust_remote_code=False
                )
                module, report = auto_class(config).from_pretrained(
                    str(path),
                    config=config,
                    dtype=getattr(torch, compute),
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                )
        except Exception as error:  # noqa: BLE001  each architecture fails in its own way
            reason = str(error).strip().splitlines()
            raise ModelError(
                f"transformers cannot load it: {reason[0] if reason else type(error).__name__}",
                where=str(path),
            ) from None
        if missing := sorted(report.get("missing_keys") or ()):
            raise ModelError(
                f"{len(missing)} weights are missing and would be random, first {missing[0]}",
                where=str(path),
            )
        if cuda and device_map is None:
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())  # some may share one
            with enough_gpu_memory("the model's weights", str(path)):
                module = module.to("cuda")
        return cls(module, path, offloaded)

    @property
    def device(self) -> torch.device:
        """The device on which the output head computes."""
        return execution_device(self._head)

    def check_length(self, tokens: TokenIds) -> None:
        """Refuse a text that is longer than the model's context."""
        if tokens.size > self.context:
            raise DataError(
                f"{tokens.size} tokens are more than the model's context of {self.context}",
                where=str(self.path),
                remedy=f"Use at most {self.context} tokens of each text: --set max_tokens="
                f"{self.context}; qc has windows, too: --ctx {self.context}.",
            )

    def hidden(self, tokens: TokenIds) -> torch.Tensor:
        """[T] ids → [T, D] hidden states, the backbone's output, in the compute dtype.

        Ids with pictures (``sources.seen``) go through the model's own vision tower.

        Raises:
            DataError: longer than the context, or pictures that do not fit their positions.
        """
        import torch

        self.check_length(tokens)
        images = self._pictures(tokens)
        with (
            torch.inference_mode(),
            enough_gpu_memory(f"a text of {tokens.size} tokens", str(self.path)),
            passing(self.device),
        ):
            ids = ids_on(tokens, self.device)[None]
            if images is None:
                return followed(self._forward.hidden(ids))
            with self._fitting(images):
                return followed(self._forward.hidden(ids, images.inputs))
        raise AssertionError("either they are returned, or something is raised")

    def embedded(self, tokens: TokenIds) -> Embedded:
        """What the model's vision tower and projector make of a text's pictures.

        Args:
            tokens: [T] ids with pictures.

        Raises:
            DataError: pictures that do not fit their positions.
        """
        import torch

        images = images_of(tokens)
        assert images is not None  # the caller's condition
        with torch.inference_mode(), self._fitting(images):
            ids = ids_on(tokens, self.device)[None]
            return embedded_of(self._forward.embedded(ids, images.inputs), images)
        raise AssertionError("either they are returned, or something is raised")

    def _pictures(self, tokens: TokenIds) -> Images | None:
        """A text's pictures; a text that lacks those that its ids stand for is refused."""
        images = images_of(tokens)
        signs = [getattr(self.module.config, name, None) for name in _PICTURE_IDS]
        if images is None and any(i is not None and bool((tokens == i).any()) for i in signs):
            raise DataError(
                "the text's ids stand for pictures, and no picture is there",
                where=str(self.path),
                remedy="Give the --data with its pictures; a capture of them needs it, too.",
            )
        return images

    @contextmanager
    def _fitting(self, images: Images) -> Iterator[None]:
        """What a forward refuses of pictures is said of them: each class checks its own way."""
        try:
            yield
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"the model does not take {images.count} picture(s) at {int(images.mask.sum())} "
                f"positions: {told}",
                where=str(self.path),
                remedy="The processor's files and the model must be of one checkpoint: how many "
                "positions a picture takes is said in both.",
            ) from None

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """See :meth:`OutputHead.logits`."""
        return self._logits.logits(hidden)

    def close(self) -> None:
        """Drop the weights."""
        self.module = None
        self._head = None
        vars(self).pop("_forward", None)
        vars(self).pop("_logits", None)
        if self._offloaded is not None:
            self._offloaded.cleanup()
            self._offloaded = None


class HFSource:
    """A transformers model as a logit source.

    Args:
        model: the loaded model; it may serve several sources at once.
        name: label for reports.
    """

    def __init__(self, model: HFModel, name: str) -> None:
        self.model = model
        self.name = name
        self.vocab_size = model.vocab_size

    def logits(self, tokens: TokenIds, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """See :class:`so8tqc.sources.protocol.LogitSource`."""
        yield from head_blocks(self.model, self.model.hidden(tokens)[first:], rows)

    def close(self) -> None:
        """Release the model."""
        self.model.close()


class HasHead(Protocol):
    """Anything that makes logits of hidden states."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[t, D] → [t, V]."""


def head_blocks(model: HasHead, hidden: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
    """[T, D] hidden states → [t, V] logit blocks of ``rows`` rows, in order."""
    for start in range(0, hidden.shape[0], rows):
        yield model.head(hidden[start : start + rows])
