"""What makes a base the trained model: gates, adapters, or both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from so8tqc.adapters.files import SAFETENSORS_NAME, adapter_directory, adapter_kind, read_json
from so8tqc.rotations.files.content import weight_keys
from so8tqc.rotations.files.peft_oft import is_adapter, of_numbered_layers, within_orthogonality
from so8tqc.rotations.files.trained import gate_keys
from so8tqc.rotations.options import RotationOptions


@dataclass(frozen=True)
class Trained:
    """What was trained beside a base.

    Attributes:
        gates: a gate file, checkpoint, or an OFT adapter that is rotations and nothing else.
        adapters: PEFT adapter directories, in the order in which they apply.
    """

    gates: Path | None
    adapters: tuple[Path, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (*((self.gates,) if self.gates else ()), *self.adapters)


def trained(rotations: Path | None, options: RotationOptions) -> Trained:
    """Sort what ``rotations`` and ``--adapter`` name.

    An OFT adapter alone is a set of rotations, judged as such, unless it trains other things too
    (biases, whole modules, the head) or its own training left SO(n) (the truncated series): then it
    is baked as any adapter, as it was trained. An adapter whose modules have gates of their own is
    a checkpoint of gates with LoRA beside them.

    Raises:
        RotationError: an adapter directory cannot be read.
    """
    beside = tuple(options.adapters)
    kind = None if rotations is None else adapter_kind(rotations)
    if rotations is None or kind is None:
        return Trained(rotations, beside)
    if options.key is not None or _holds_gates(rotations, kind):
        return Trained(rotations, beside)
    if kind == "OFT" and not beside and _only_rotations(rotations, options):
        return Trained(rotations, ())
    return Trained(None, (rotations, *beside))


def _holds_gates(path: Path, kind: str) -> bool:
    """Whether the modules of an adapter that is no OFT adapter have gates of their own."""
    return kind != "OFT" and bool(gate_keys(weight_keys(adapter_directory(path))))


def _only_rotations(path: Path, options: RotationOptions) -> bool:
    if not is_adapter(path):  # in a sub-folder
        return False
    config = read_json(adapter_directory(path))
    plain = config.get("bias", "none") == "none" and not config.get("modules_to_save")
    asked = options.model_fields_set & {"convention", "parametrization", "site", "layers"}
    if asked or options.orthogonalize == "polar":
        return True  # what cannot be done to it is said where rotations are read
    if not plain or not (path / SAFETENSORS_NAME).is_file():
        return False
    # a head or a vision tower is no target of a set of rotations, but a weight like any other
    return of_numbered_layers(weight_keys(path)) and within_orthogonality(path)
