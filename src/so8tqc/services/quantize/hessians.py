"""Second moments of each matrix' inputs, from the model directory that a GGUF was exported from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from so8tqc.checkpoints.safetensors_index import Checkpoint, open_checkpoint
from so8tqc.disk.atomic import atomic_file
from so8tqc.disk.digests import file_ref, sha256_json
from so8tqc.disk.system import make_folder, remove
from so8tqc.errors import DataError, InputError, ModelError
from so8tqc.gguf.file import GGUFFile
from so8tqc.progress import SILENT, Progress
from so8tqc.quantizers.hessians import (
    Group,
    Manifest,
    MomentsFile,
    Part,
    triangle,
    write_moments,
)
from so8tqc.record_files import read_record, record_beside
from so8tqc.services.export.proof import explain, tensors_by_name
from so8tqc.services.quantize.calibration import calibration_texts
from so8tqc.sources.hf import HFModel
from so8tqc.sources.inputs.texts import concatenated, encode_plain, load_tokenizer
from so8tqc.sources.moments import HEAD, LayerMoments, chunks_of, layer_moments
from so8tqc.sources.protocol import TokenIds

METHOD = 2
"""How second moments come about; 2: values and keys as attention sees them."""

CHUNK_TOKENS = 512
"""Tokens of a chunk, as for importance matrices."""

_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Calibration:
    """What second moments are computed from.

    Attributes:
        model: directory that the GGUF was exported from.
        data: calibration texts.
        tokens: at most so many.
    """

    model: Path
    data: Sequence[str]
    tokens: int


def model_directory(given: Path | None, gguf: Path) -> Path:
    """The directory that a GGUF was exported from: as given, or as the record beside it says.

    Raises:
        InputError: neither says it.
    """
    if given is not None:
        return given
    for record in (record_beside(gguf), gguf.parent / "record.json"):
        if not record.is_file():
            continue
        said = read_record(record)
        made = said.outputs.get("gguf")
        if said.kind == "export" and made is not None and Path(made.path).name == gguf.name:
            return Path(str(said.config["model"]))
    raise InputError(
        "nothing says which model directory the file was exported from",
        where=str(gguf),
        remedy="Give it with --model DIRECTORY.",
    )


def compute_moments(
    calibration: Calibration, gguf: GGUFFile, out: Path, progress: Progress = SILENT
) -> MomentsFile:
    """Run calibration text through the model a layer at a time; write the file of second moments.

    A file that is there already and was computed from the same model, tokens and chunks stays. A
    layer that is done is kept in a folder beside ``out`` until all are, so that a run that was
    killed goes on with the next one.

    Args:
        calibration: model, texts, tokens.
        gguf: the file exported from that model.
        out: the file to write, complete or not at all.
        progress: told about layers.

    Raises:
        ModelError: the directory is no model, or not that of the GGUF; or its layers cannot be run
            one at a time.
        DataError: a text is one of those that judge, or there are fewer tokens than a chunk.
    """
    texts = calibration_texts(calibration.data)
    checkpoint = open_checkpoint(calibration.model)
    names = require_same_weights(checkpoint, gguf, progress)
    ids, bos = encode_plain(concatenated(texts), load_tokenizer(calibration.model))
    model = HFModel.load(calibration.model)
    try:
        chunks = _chunks(model, ids, bos, calibration)
        manifest = _manifest(calibration, chunks)
        if (there := _already(out, manifest)) is not None:
            return there
        folder = out.with_name(f".{out.name}.layers")
        make_folder(folder)
        key = sha256_json(manifest.model_dump(mode="json"))[:12]

        def place(layer: str) -> Path:
            return folder / f"{key}-{layer}.npz"

        done = layer_moments(
            model, chunks, wanted=lambda layer: not place(layer).is_file(), progress=progress
        )
        for layer in done:
            with atomic_file(place(layer.name)) as temporary:
                write_moments(temporary, manifest, _parts(layer, names, gguf))
    finally:
        model.close()
    layers = [place(str(index)) for index in range(int(model.config.num_hidden_layers))]
    with atomic_file(out) as temporary:
        write_moments(temporary, manifest, _stored([*layers, place(HEAD)]))
    remove(folder)
    return MomentsFile(out)


def require_same_weights(
    checkpoint: Checkpoint, gguf: GGUFFile, progress: Progress = SILENT
) -> dict[str, str]:
    """See that the file's matrices are those of a model directory.

    Returns:
        Source tensor → GGUF tensor, of matrices that are not stacked from several.

    Raises:
        ModelError: one is not, or none has a counterpart.
    """
    names = {}
    by_name = tensors_by_name(checkpoint, gguf)
    matrices = [
        name
        for name, sources in by_name.items()
        if len(gguf.tensors[name].shape) == 2 and len(sources) == 1
    ]
    with progress.task("comparing weights", total=len(matrices), unit="tensors") as task:
        for name in matrices:
            (source,) = by_name[name]
            if explain(checkpoint, source, gguf, name, 1) is None:
                raise ModelError(
                    f"{name} is not {source} of {checkpoint.directory}, rounded to its type",
                    where=str(gguf.path),
                    remedy="Give the directory that the file was exported from (--model).",
                )
            names[source] = name
            task.advance(1, item=name)
    if not names:
        raise ModelError(
            f"no matrix of the file comes from {checkpoint.directory}", where=str(gguf.path)
        )
    return names


def _chunks(
    model: HFModel, ids: TokenIds, bos: int | None, calibration: Calibration
) -> tuple[TokenIds, ...]:
    length = min(CHUNK_TOKENS, model.context)
    chunks = chunks_of(ids, bos, length, max(1, calibration.tokens // length))
    if not chunks:
        raise DataError(
            f"the text has {ids.size} tokens, fewer than a chunk of {length}",
            where=", ".join(calibration.data),
            remedy="Give more calibration text (--hessian-data).",
        )
    return chunks


def _already(out: Path, manifest: Manifest) -> MomentsFile | None:
    """The file of an earlier run, if it was computed from the same."""
    try:
        there = MomentsFile(out)
    except ModelError:
        return None
    return there if there.manifest.inputs == manifest.inputs else None


def _manifest(calibration: Calibration, chunks: Sequence[TokenIds]) -> Manifest:
    tokens = np.concatenate(chunks).astype("<i8")
    return Manifest(
        inputs={
            "model": file_ref(calibration.model).sha256,
            "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(),
            "chunk": len(chunks[0]),
            "chunks": len(chunks),
            "method": METHOD,
        }
    )


def _parts(layer: LayerMoments, names: dict[str, str], gguf: GGUFFile) -> Iterator[Part]:
    for number, moments in enumerate(layer.moments):
        if layer.name == HEAD:
            tensors = [_OUTPUT if _OUTPUT in gguf.tensors else _EMBEDDING]
        else:
            sources = (f"{module}.weight" for module in moments.modules)
            tensors = [names[source] for source in sources if source in names]
        if not tensors:
            continue
        total = np.diagonal(moments.kept) + np.diagonal(moments.held)
        group = Group(
            key=f"{layer.name}/{number}",
            tensors=tuple(tensors),
            columns=len(moments.kept),
            tokens=moments.tokens,
            held=moments.held_tokens,
            dead=int((total == 0).sum()),
        )
        if not np.isfinite(total).all():
            raise ModelError("its inputs are not finite", where=f"layer {layer.name}, {tensors[0]}")
        yield Part(group, triangle(moments.kept), triangle(moments.held))


def _stored(files: Sequence[Path]) -> Iterator[Part]:
    for path in files:
        part = MomentsFile(path)
        for group in part.manifest.groups:
            yield part.part(group)


def require_fit(moments: MomentsFile, gguf: GGUFFile) -> None:
    """See that second moments belong to a file's tensors.

    Raises:
        ModelError: they do not.
    """
    seen = Counter(name for group in moments.manifest.groups for name in group.tensors)
    for group in moments.manifest.groups:
        for name in group.tensors:
            where = f"{moments.path}, {name}"
            if name not in gguf.tensors:
                raise ModelError(
                    f"second moments for a tensor that {gguf.path.name} does not have", where=where
                )
            if gguf.tensors[name].shape[-1] != group.columns:
                raise ModelError(
                    f"second moments of {group.columns} columns; the tensor has "
                    f"{gguf.tensors[name].shape[-1]}",
                    where=where,
                )
            if seen[name] > 1:
                raise ModelError("second moments are given twice", where=where)
