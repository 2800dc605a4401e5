"""Steps of adapters and gates, collected tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from so8tqc.adapters.changed import Changed, Part
from so8tqc.adapters.files import AdapterFiles
from so8tqc.adapters.methods import module_steps
from so8tqc.adapters.methods.context import ModuleSteps, Shape
from so8tqc.adapters.methods.lora import expert_steps
from so8tqc.adapters.methods.tokens import require_apart, trains_tokens
from so8tqc.adapters.methods.vera import vera_projections
from so8tqc.adapters.names import EXPERT_PARAMETERS, ExpertSlice, StoredNames
from so8tqc.adapters.steps import AddLowRank, BlockColumns, BlockRows, Step, same_rows, same_sums
from so8tqc.checkpoints.patch import tensor_view
from so8tqc.checkpoints.plan import DTYPE_NAMES
from so8tqc.checkpoints.safetensors_index import Checkpoint, TensorEntry, torch_dtype
from so8tqc.checkpoints.sites import locate
from so8tqc.errors import RotationError, ShapeError
from so8tqc.rotations.enums import Site
from so8tqc.rotations.rotation_set import FloatArray, RotationSet, orthogonality_error


class Builder:
    """Collects steps tensor by tensor."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, kept: Mapping[str, str]) -> None:
        self._kept = kept
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._names = StoredNames(checkpoint)
        self._parts: dict[str, dict[int | None, Part]] = {}
        self._sources: dict[str, tuple[torch.Tensor, str]] = {}
        self._owner: dict[tuple[int, str], tuple[str, tuple[Step, ...]]] = {}
        self._before: frozenset[str] = frozenset()
        self.notices: list[str] = []
        self.drift: dict[str, FloatArray] = {}

    def changed(self) -> tuple[Changed, ...]:
        """Everything, in the order of the files."""
        touched = self._parts.keys() | self._sources.keys()
        found = []
        for name, entry in self._checkpoint.tensors.items():
            if name not in touched:
                continue
            torch_dtype(entry.dtype)
            source = self._sources.get(name)
            found.append(
                Changed(
                    entry,
                    DTYPE_NAMES.get(self._dtype, self._kept.get(name, entry.dtype)),
                    tuple(self._parts.get(name, {}).values()),
                    None if source is None else source[0],
                )
            )
        return tuple(found)

    def add_group(self, group: list[AdapterFiles]) -> None:
        """Adapters of one method."""
        if group[0].kind == "OFT" and len(group) > 1:
            self.notices.append(
                "Two OFT adapters apply as PEFT's forward does, x·R_1·R_2: W·R_2ᵀ·R_1ᵀ. Its "
                "merge_and_unload multiplies in the other order and gives another model."
            )
        _require_sum(group)
        require_apart(group)
        self._before = frozenset(self._parts)
        for files in group:
            self._replace(files)
            zero = self._add(files)
            if zero and len(zero) == len(files.parts) and not files.whole:
                raise RotationError(
                    f"the adapter is untrained: its effect is zero in all {len(zero)} modules, "
                    f"first {zero[0]} (B is zero, or R the identity)",
                    where=str(files.directory),
                    remedy="Give the adapter that was saved after the training.",
                )
            if zero:
                self.notices.append(
                    f"{len(zero)} of {len(files.parts)} modules of {files.directory.name} have no "
                    f"effect (untrained), first {zero[0]}."
                )

    def _add(self, files: AdapterFiles) -> list[str]:
        """Add an adapter's steps; the modules in which it has no effect."""
        zero = []
        files = self._with_projections(files)
        for module, parts in files.parts.items():
            if container := _expert_container(module, files):
                self._add_experts(files, module, container, parts)
                if not parts["lora_B.weight"].any():
                    zero.append(module)
                continue
            found = self._add_module(files, module, parts)
            if found.zero:
                zero.append(module)
        return zero

    def _with_projections(self, files: AdapterFiles) -> AdapterFiles:
        if files.kind != "VERA" or files.shared:
            return files
        entries = [self._entry(files, module) for module in files.parts]
        stored = torch_dtype(entries[0].dtype)
        drawn = vera_projections(files, [self._shape(entry) for entry in entries])
        # PEFT moves what it has drawn to the dtype of the base, and computes with that
        a, b = (projection.to(stored).float() for projection in drawn)
        self.notices.append(
            "VeRA's projections were not saved; they were drawn again from projection_prng_key, "
            "as PEFT does."
        )
        return replace(files, shared={"vera_A": a, "vera_B": b})

    def _entry(self, files: AdapterFiles, module: str) -> TensorEntry:
        return self._names.weight(module, str(files.directory))

    def _shape(self, entry: TensorEntry) -> Shape:
        if len(entry.shape) != 2:
            raise ShapeError(
                f"{entry.name} has shape {list(entry.shape)}, expected a matrix",
                where=str(entry.file),
                remedy="Adapters of convolutions cannot be baked.",
            )
        rows, columns = entry.shape
        transposed = self._names.transposed(entry)
        return Shape(columns, rows) if transposed else Shape(rows, columns)

    def _add_module(
        self, files: AdapterFiles, module: str, parts: Mapping[str, torch.Tensor]
    ) -> ModuleSteps:
        entry = self._entry(files, module)
        if not (trains_tokens(parts) and self._names.is_embedding(module)):  # PEFT ties them itself
            self._tell_tied(files, module, entry)
        if trains_tokens(parts):
            self._require_head_without_bias(files, module, entry)
        if entry.name in self._before and _takes_the_base_alone(files):
            raise RotationError(
                f"{files.kind} on {module}, which an adapter of another method has changed before: "
                "PEFT's forward computes it from the base's own weight and leaves the other out",
                where=str(files.directory),
                remedy="Which was meant is not told: bake them one after the other.",
            )
        transposed = self._names.transposed(entry)
        embedding = any(name.startswith("lora_embedding") for name in parts)

        def weight() -> torch.Tensor:
            stored = self._sources[entry.name][0] if entry.name in self._sources else None
            values = tensor_view(entry) if stored is None else stored
            return values.T if transposed else values

        shape = self._shape(entry)
        found = module_steps(files, module, parts, shape, weight, embedding=embedding)
        if self._is_owned(files, entry.name, module, found.steps):
            return found
        if files.kind == "OFT":
            step = found.steps[0]
            assert isinstance(step, BlockColumns)
            self.drift[module] = orthogonality_error(step.blocks)
        self._append(entry, found.steps, transposed=transposed or found.columnwise)
        if found.mix is not None or found.bias is not None:
            self._add_to_bias(files, module, found)
        return found

    def _require_head_without_bias(
        self, files: AdapterFiles, module: str, entry: TensorEntry
    ) -> None:
        """Refuse trained tokens of a head that has a bias, which PEFT's forward leaves out."""
        head = next((n for n in self._checkpoint.tensors if self._names.is_head_bias(n)), None)
        tied = self._names.ties_embeddings and entry == self._names.embedding()
        if head is not None and (tied or self._names.is_head(module)):
            raise RotationError(
                f"the adapter trains single tokens of {module}, and the base has {head}: PEFT's "
                "forward of such a head leaves the bias out",
                where=str(files.directory),
                remedy="No weight can hold that, and what was meant is not told.",
            )

    def _add_to_bias(self, files: AdapterFiles, module: str, found: ModuleSteps) -> None:
        bias = self._names.find(f"{module}.bias")
        if found.mix is not None and bias is not None:
            self._append(bias, (found.mix,))
        if found.bias is None:
            return
        if bias is None:
            raise RotationError(
                f"the adapter adds to a bias, but the base has no {module}.bias",
                where=str(files.directory),
                remedy="No weight can hold it: train without biases (lora_bias, BEFT).",
            )
        self._append(bias, (AddLowRank(found.bias[:, None], np.ones((1, 1))),))

    def _add_experts(
        self, files: AdapterFiles, module: str, container: str, parts: Mapping[str, torch.Tensor]
    ) -> None:
        parameter = self._expert_parameter(files, module, container, parts)
        source = str(files.directory)
        slices = self._names.experts(container, parameter, source)
        experts = _expert_count(slices)
        full = f"{container}.{parameter}"
        for one in slices:
            steps = expert_steps(files, full, parts, experts, one.rows)
            numbers = range(experts) if one.expert is None else (one.expert,)
            for e in numbers:
                size = one.entry.shape[-2:]
                got = steps[e].shape
                transposed = one.transposed or (one.expert is None and got == size[::-1] != size)
                if got != (size[::-1] if transposed else size):
                    raise ShapeError(
                        f"{full}: lora_B·lora_A is {got[0]} × {got[1]}, the weight "
                        f"{size[0]} × {size[1]} ({one.entry.name}, {list(one.entry.shape)})",
                        where=source,
                    )
                self._append(
                    one.entry,
                    (steps[e],),
                    expert=e if one.expert is None else None,
                    transposed=transposed,
                )

    def _expert_parameter(
        self, files: AdapterFiles, module: str, container: str, parts: Mapping[str, torch.Tensor]
    ) -> str:
        """Which parameter a nested wrapper adapts: PEFT wraps in the order of definition, so the
        innermost (most ``base_layer``) is the first of those that are targeted."""
        targets = [str(t) for t in files.config.get("target_parameters") or ()]
        named = [p for p in EXPERT_PARAMETERS if any(t.rsplit(".", 1)[-1] == p for t in targets)]
        depth = module.split(".").count("base_layer")
        nested = sorted(
            (m.split(".").count("base_layer") for m in files.parts if _bare(m) == container),
            reverse=True,
        )
        place = nested.index(depth)
        if len(named) == len(nested):
            return named[place]
        a, b = parts["lora_A.weight"], parts["lora_B.weight"]
        raise RotationError(
            f"which parameter of {container} this is cannot be told: {len(nested)} wrappers, "
            f"target_parameters {targets}; lora_A {list(a.shape)}, lora_B {list(b.shape)}",
            where=str(files.directory),
        )

    def _append(
        self,
        entry: TensorEntry,
        steps: tuple[Step, ...],
        *,
        expert: int | None = None,
        transposed: bool = False,
    ) -> None:
        known = self._parts.setdefault(entry.name, {})
        part = known.get(expert, Part((), expert, transposed))
        if part.transposed != transposed:
            raise RotationError(
                f"steps along the rows and along the columns of {entry.name} cannot be combined"
            )
        known[expert] = replace(part, steps=part.steps + steps)

    def _is_owned(
        self, files: AdapterFiles, name: str, module: str, steps: tuple[Step, ...]
    ) -> bool:
        """Whether the adapter has put the same change on a tensor under another module's name.

        Raises:
            RotationError: it has put another one there.
        """
        other, its = self._owner.setdefault((id(files), name), (module, steps))
        if other == module:
            return False
        if same_sums(its, steps) or same_rows(its, steps):
            return True
        tied = self._names.is_head(other) or self._names.is_head(module)
        raise RotationError(
            f"{other} and {module} are one stored weight ({name}) that the adapter changes in "
            "two ways, which no single weight can hold",
            where=str(files.directory),
            remedy="Train with ensure_weight_tying, or save the base with tie_word_embeddings "
            "false first."
            if tied
            else "Layers that share a block must be trained with one adapter for all.",
        )

    def _tell_tied(self, files: AdapterFiles, module: str, entry: TensorEntry) -> None:
        tied = self._names.ties_embeddings and entry == self._names.embedding()
        names = {name.removesuffix(".weight") for name in (*files.parts, *files.whole)}
        both = any(map(self._names.is_head, names)) and any(map(self._names.is_embedding, names))
        if both:  # equal, or refused
            return
        if tied and (self._names.is_head(module) or self._names.is_embedding(module)):
            where = "head" if self._names.is_head(module) else "embedding"
            self.notices.append(
                f"{files.directory.name} changes {module}, but the base ties head and embedding: "
                f"one stored tensor, {entry.name}, is both. The bake changes both; in the training "
                f"the adapter changed the {where} alone (unless ensure_weight_tying was set)."
            )

    def _replace(self, files: AdapterFiles) -> None:
        """Saved modules and biases, and wrapped modules' own weights, in place of the base's."""
        for name, tensor in files.whole.items():
            entry = self._names.find(name)
            if entry is None and self._is_tied_head(files, name, tensor):
                continue
            tied = self._names.ties_embeddings and self._names.is_head(name.removesuffix(".weight"))
            one = self._names.embedding() if tied else None
            if entry is None and one is not None and tuple(tensor.shape) != one.shape:
                entry = one
            if entry is None:
                raise RotationError(
                    f"the adapter saves {name}, which the base does not have",
                    where=str(files.directory),
                    remedy="The base ties its head to the embedding, and the training untied them: "
                    "save the base with tie_word_embeddings false first."
                    if tied
                    else "The adapter belongs to another base model.",
                )
            if tuple(tensor.shape) != entry.shape:
                raise ShapeError(
                    f"the adapter saves {name} with shape {list(tensor.shape)}, the base has "
                    f"{list(entry.shape)}",
                    where=str(files.directory),
                    remedy="The training resized the vocabulary, or the base is another one.",
                )
            stored = tensor_view(entry)
            if torch.equal(stored.double(), tensor.double()):
                continue
            if entry.name in self._sources:
                raise RotationError(
                    f"two adapters save {name}; PEFT allows one",
                    where=f"{self._sources[entry.name][1]} and {files.directory}",
                )
            if name.endswith(".weight"):
                self._tell_tied(files, name.removesuffix(".weight"), entry)
            self._sources[entry.name] = (tensor, str(files.directory))

    def _is_tied_head(self, files: AdapterFiles, name: str, tensor: torch.Tensor) -> bool:
        """Whether this is the head, which the base keeps as its embedding, with the same values:

        unchanged, or those that the adapter saves for the embedding (``ensure_weight_tying``).
        """
        module, _, leaf = name.rpartition(".")
        entry = self._names.embedding()
        if leaf != "weight" or not self._names.is_head(module) or entry is None:
            return False
        if not self._names.ties_embeddings or tuple(tensor.shape) != entry.shape:
            return False
        saved = [
            values
            for other, values in files.whole.items()
            if self._names.is_embedding(other.removesuffix(".weight"))
        ]
        here = saved[0] if saved else tensor_view(entry)
        return torch.equal(here.double(), tensor.double())

    def add_gates(self, gates: RotationSet | None) -> None:
        """Rotations in front of (or behind) base and branches."""
        if gates is None:
            return
        for site in locate(tuple(gates), self._checkpoint):
            blocks = gates.column_blocks(site.target)
            weight = self._checkpoint.tensors[site.weight]
            shape = self._shape(weight)
            width = shape.into if gates.site is Site.INPUT else shape.out
            if blocks.shape[0] * blocks.shape[1] != width:
                raise ShapeError(
                    f"{site.target}: {blocks.shape[0]} blocks of {blocks.shape[1]} do not cover "
                    f"{width} features",
                    where=gates.source,
                )
            if gates.site is Site.INPUT:
                self._append(weight, (BlockColumns(blocks),), transposed=site.transposed)
                continue
            self._append(weight, (BlockRows(blocks),), transposed=site.transposed)
            if site.bias is not None:
                self._append(self._checkpoint.tensors[site.bias], (BlockRows(blocks),))


def _require_sum(group: Sequence[AdapterFiles]) -> None:
    """Refuse adapters that PEFT's forward, active together, does not compute as it merges them."""
    where = ", ".join(str(files.directory) for files in group)
    forms = {str(files.config.get("init_weights")) for files in group}
    if group[0].kind == "C3A" and len(group) > 1:
        raise RotationError(
            "several C3A adapters: PEFT's forward puts what the first adds into the second, its "
            "merge_and_unload does not",
            where=where,
            remedy="Which was meant is not told: bake them one after the other.",
        )
    if group[0].kind == "MISS" and len(forms) > 1 and forms & {"bat", "mini"}:
        raise RotationError(
            f"several MiSS adapters of different forms (init_weights {', '.join(sorted(forms))}): "
            "PEFT runs all of them as the first",
            where=where,
            remedy="Bake them one after the other.",
        )


def _takes_the_base_alone(files: AdapterFiles) -> bool:
    """Whether PEFT's forward multiplies with the innermost weight instead of running its layer."""
    return files.kind == "HRA" or (
        files.kind == "MISS" and files.config.get("init_weights") == "bat"
    )


def _bare(module: str) -> str:
    return ".".join(word for word in module.split(".") if word != "base_layer")


def _expert_container(module: str, files: AdapterFiles) -> str | None:
    """The module of a 3D parameter's wrapper, None for an ordinary module."""
    bare = _bare(module)
    targets = files.config.get("target_parameters") or ()
    for target in targets:
        container, _, parameter = str(target).rpartition(".")
        if parameter in EXPERT_PARAMETERS and bare.endswith(container):
            return bare
    return None


def _expert_count(slices: Sequence[ExpertSlice]) -> int:
    if slices[0].expert is None:
        return slices[0].entry.shape[0]
    return 1 + max(one.expert for one in slices if one.expert is not None)
