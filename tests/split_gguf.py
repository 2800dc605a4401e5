"""A GGUF file cut into parts, as ``llama-gguf-split`` does it: all keys are in the first."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from so8tqc.disk.parts import part_paths


def split_gguf(
    whole: Path,
    folder: Path,
    count: int = 3,
    *,
    stem: str = "split",
    bare_first: bool = False,
    stated: int | None = None,
) -> Path:
    """Write the parts of a file; returns the first.

    Args:
        whole: a GGUF file of one part.
        folder: where they go.
        count: how many.
        stem: their name.
        bare_first: the first part has no tensors (``--no-tensor-first-split``).
        stated: what they say of the number of tensors; None: the truth.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(str(whole))
    tensors = reader.tensors
    paths = part_paths(folder / f"{stem}-00001-of-{count:05d}.gguf")
    shares = np.array_split(np.arange(len(tensors)), count - bare_first)
    shares = [np.array([], int), *shares] if bare_first else shares
    for number, (path, share) in enumerate(zip(paths, shares, strict=True)):
        writer = gguf.GGUFWriter(str(path), "llama")
        if number:
            writer.kv_data[0].clear()
        else:
            _copy_keys(reader, writer)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors) if stated is None else stated)
        for index in share:
            tensor = tensors[index]
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths[0]


def _copy_keys(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
