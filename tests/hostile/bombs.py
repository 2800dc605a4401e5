"""The corpus: inputs made by hand, each an attack or an accident that was thought of beforehand."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_HEAVY = ("million", "MB", "packed", "GB", "megabytes", "extended: ", "100,000 deep")

Plant = Callable[[Path], None]


@dataclass(frozen=True)
class Bomb:
    """One input.

    Attributes:
        reader: who reads it (see ``readers``).
        text: what it is.
        plant: changes a directory of valid files into it.
        refused: whether it must be refused; else it may also be read, if nothing else happens.
    """

    reader: str
    text: str
    plant: Plant
    refused: bool = True

    @property
    def heavy(self) -> bool:
        """Whether it takes a second or more to make: left to ``nox -s fuzz``."""
        return any(word in self.text for word in _HEAVY)


def _write(name: str, content: bytes | Callable[[], bytes]) -> Plant:
    def plant(folder: Path) -> None:
        (folder / name).write_bytes(content() if callable(content) else content)

    return plant


class _Runs:
    """A pickle that runs code when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def _torch_zip(payload: bytes, **members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, content in members.items():
            archive.writestr(f"archive/data/{name[1:]}", content)
    return out.getvalue()


def _code(*call: Any) -> bytes:
    return _torch_zip(pickle.dumps({"model.layers.0.rotation_gate.theta": _Runs(*call)}, 2))


def _expanded(folder: Path) -> None:
    """64 numbers stored, 2^34 claimed: every stride is 0."""
    import torch

    theta = torch.zeros(1, 8, 8).expand(1 << 28, 8, 8)
    torch.save({"layers.0.rotation_gate.theta": theta}, folder / "gates.pt")


def _overlapping(folder: Path) -> None:
    """Windows of one storage: stride 1 between blocks of 64."""
    import torch

    theta = torch.zeros(4 << 20).as_strided(((4 << 20) - 64, 8, 8), (1, 8, 1))
    torch.save({"layers.0.rotation_gate.theta": theta}, folder / "gates.pt")


def _deflated(folder: Path) -> None:
    """A gigabyte and a half of zeros, packed a thousandfold."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2) + bytes(3 << 29))
        archive.writestr("archive/version", b"3\n")
    (folder / "gates.pt").write_bytes(out.getvalue())


def _nested_tuples() -> bytes:
    """A key whose hash takes 2^60 steps: a tuple of one tuple twice, sixty times."""
    steps = (b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    return _torch_zip(b"\x80\x02})q\x00" + b"0".join([b"", *steps]) + b"K\x01s.")


def _recursive_dict() -> bytes:
    """A dict that holds itself as its state_dict."""
    return _torch_zip(b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.")


def _deep_pickle() -> bytes:
    return _torch_zip(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")


def _bytearray(count: int) -> bytes:
    return _torch_zip(
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x08" + struct.pack("<q", count) + b"\x85R."
    )


def _bytearray_of(count: int) -> Plant:
    return _write("gates.pt", partial(_bytearray, count))


def _header(value: object | str, told: int | None = None, data: bytes = b"") -> bytes:
    text = (value if isinstance(value, str) else json.dumps(value)).encode()
    return struct.pack("<Q", len(text) if told is None else told) + text + data


def _f32(shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


_W = "model.layers.0.self_attn.o_proj.weight"

HEADERS: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "a header of 2^63 bytes": _header("{}", 1 << 63),
    "a header of 2^64 − 1 bytes": _header("{}", (1 << 64) - 1),
    "a header of 4 GiB in a file of 10 bytes": _header("{}", 1 << 32),
    "a header that is a list": _header("[]"),
    "a header that is no JSON": _header("{" * 100),
    "a header nested 100,000 deep": _header("[" * 100_000 + "]" * 100_000),
    "overlapping tensors": _header({_W: _f32([4], 0, 16), "b": _f32([4], 8, 24)}, None, bytes(24)),
    "one range for two tensors": _header({_W: _f32([4], 0, 16), "b": _f32([4], 0, 16)}, None,
                                         bytes(16)),
    "a tensor beyond the file": _header({_W: _f32([4], 0, 16)}, None, bytes(8)),
    "offsets that run backwards": _header({_W: _f32([4], 16, 0)}, None, bytes(16)),
    "negative offsets": _header({_W: _f32([4], -16, 0)}, None, bytes(16)),
    "offsets of 2^64": _header(f'{{"{_W}":{{"dtype":"F32","shape":[4],"data_offsets":'
                               "[18446744073709551600,18446744073709551616]}}", None, bytes(16)),
    "a shape whose product wraps around": _header({_W: _f32([1 << 32, 1 << 32, 4], 0, 0)}),
    "a shape that does not fit the bytes": _header({_W: _f32([5], 0, 16)}, None, bytes(16)),
    "a tensor named twice": _header(
        f'{{"{_W}":{json.dumps(_f32([4], 0, 16))},"{_W}":{json.dumps(_f32([4], 0, 16))}}}', None,
        bytes(16)),
    "a hole between tensors": _header({_W: _f32([4], 0, 16), "b": _f32([4], 24, 40)}, None,
                                      bytes(40)),
    "bytes behind the tensors": _header({_W: _f32([4], 0, 16)}, None, bytes(99)),
    "an unknown dtype": _header({_W: {"dtype": "F7", "shape": [4], "data_offsets": [0, 16]}}, None,
                                bytes(16)),
    "metadata that is no text": _header({"__metadata__": {"a": 1}, _W: _f32([4], 0, 16)}, None,
                                        bytes(16)),
    "a lone surrogate as a name": _header('{"\\ud800":' + json.dumps(_f32([4], 0, 16)) + "}", None,
                                          bytes(16)),
}  # fmt: skip


def _many_tensors() -> bytes:
    """A header of 60 MB: over a million tensors without an element."""
    item = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return _header("{" + ",".join(item % i for i in range(1_050_000)) + "}")


def _json_bomb() -> bytes:
    """60 MB of empty objects, each 64 bytes in memory and more in its list."""
    return b'{"a":[' + b"{}," * 20_000_000 + b"{}]}"


def _index(**weight_map: str) -> Plant:
    def plant(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        value = json.loads(path.read_bytes())
        value["weight_map"] |= weight_map
        path.write_text(json.dumps(value))

    return plant


def _symlinked_shard(target: str) -> Plant:
    def plant(folder: Path) -> None:
        shard = folder / "model-00001-of-00002.safetensors"
        shard.unlink()
        shard.symlink_to(target)

    return plant


def _fifo(name: str) -> Plant:
    def plant(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return plant


def _link(name: str, target: str) -> Plant:
    def plant(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return plant


def _gguf(tensors: int = 0, keys: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _tensor_info(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(name) + dimensions + struct.pack("<IQ", kind, offset)


_HUGE = (1 << 64) - 1
GGUFS: dict[str, bytes] = {
    "empty": b"",
    "only the magic": b"GGUF",
    "2^64 − 1 tensors": _gguf(_HUGE, 0, bytes(64)),
    "2^64 − 1 keys": _gguf(0, _HUGE, bytes(64)),
    "10^9 keys of no length": _gguf(0, 10**9, bytes(1 << 20)),
    "a key of 2^63 bytes": _gguf(1, 1, struct.pack("<Q", 1 << 63)),
    "an array of 2^62 bytes": _gguf(1, 1, _text("a") + struct.pack("<IIQ", 9, 0, 1 << 62)),
    "an array of 2^61 texts": _gguf(1, 1, _text("a") + struct.pack("<IIQ", 9, 8, 1 << 61)
                                    + bytes(1 << 20)),
    "arrays of arrays, 5,000 deep": _gguf(1, 1, _text("a") + struct.pack("<I", 9)
                                          + struct.pack("<IQ", 9, 1) * 5000),
    "a value of an unknown type": _gguf(1, 1, _text("a") + struct.pack("<I", 99)),
    "a tensor of 2^32 − 1 dimensions": _gguf(1, 0, _text("a") + struct.pack("<I", 0xFFFFFFFF)),
    "dimensions whose product wraps around": _gguf(
        1, 0, _tensor_info("a", [1 << 32, 1 << 32], 0, 0) + bytes(64)),
    "a tensor of 2^63 elements": _gguf(1, 0, _tensor_info("a", [1 << 63], 0, 0) + bytes(64)),
    "a tensor beyond the file": _gguf(1, 0, _tensor_info("a", [64], 0, 1 << 40) + bytes(64)),
    "a tensor of an unknown type": _gguf(1, 0, _tensor_info("a", [4], 200, 0) + bytes(64)),
    "two tensors of one name": _gguf(2, 0, _tensor_info("a", [1], 0, 0) * 2 + bytes(64)),
    "a key given twice": _gguf(1, 2, (_text("a") + struct.pack("<IB", 0, 1)) * 2
                               + _tensor_info("a", [1], 0, 0) + bytes(64)),
    "an alignment of 0": _gguf(1, 1, _text("general.alignment") + struct.pack("<II", 4, 0)
                               + _tensor_info("a", [1], 0, 0) + bytes(64)),
    "version 0": _gguf(1, 0, _tensor_info("a", [1], 0, 0) + bytes(64), version=0),
    "random bytes after the magic": b"GGUF" + bytes((i * 7919) % 251 for i in range(4096)),
}  # fmt: skip

_LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)
)
YAMLS: dict[str, bytes] = {
    "a billion laughs": _LAUGHS.encode(),
    "merge keys, a billion": ("a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]}}\n"
        for i in range(1, 30))).encode(),
    "an alias inside itself": b"a: &a [*a]\n",
    "a Python object": b"qc: !!python/object/apply:os.system ['touch pwned']\n",
    "a Python name": b"qc: !!python/name:os.system\n",
    "ten megabytes": b"a: " + b"x" * (10 << 20),
    "nested 5,000 deep": b"[" * 5000 + b"]" * 5000,
    "nested 100,000 deep": b"a: " + b"[" * 100_000,
    "not UTF-8": b"a: \xff\xfe\n",
    "UTF-16": "a: b\n".encode("utf-16"),
    "a NUL": b"a: \x00\n",
    "a list": b"- a\n- b\n",
    "a number of 100,000 digits": b"qc: {max_tokens: " + b"9" * 100_000 + b"}\n",
    "hexadecimal of 100,000 digits": b"qc: {max_tokens: 0x" + b"f" * 100_000 + b"}\n",
    "a sexagesimal number of 50,000 places": b"qc: {max_tokens: 1" + b":01" * 50_000 + b"}\n",
    "a mapping as a key": b"? {a: 1}\n: 2\n",
    "a date that is none": b"qc: 2001-13-45\n",
    "a wrong type everywhere": b"qc: 1\nquantize: x\nbase: {a: 1}\nrotations: []\nout: null\n",
}  # fmt: skip


def _own_code(folder: Path, name: str) -> None:
    """A config that asks for a class in a file beside it, which would leave a trace."""
    (folder / "evil.py").write_text(f"open({str(folder / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    path = folder / "config.json"
    value = json.loads(path.read_bytes())
    value["model_type"] = "evil"
    value["auto_map"] = {"AutoConfig": name, "AutoModelForCausalLM": name}
    path.write_text(json.dumps(value))


def _configured(key: str, value: int, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {key: value}))


_LINE = 50 << 20
BOMBS: tuple[Bomb, ...] = (
    *(Bomb("PyTorch gates", f"pickle that calls {text}", _write("gates.pt", content))
      for text, content in {
          "os.system": _code(os.system, "touch pwned"),
          "eval": _code(eval, "open('pwned', 'w')"),
          "exec": _code(exec, "open('pwned', 'w')"),
          "open": _code(open, "pwned", "w"),
          "__import__": _code(__import__, "os"),
      }.items()),
    Bomb("PyTorch gates", "expanded tensor of 2^34 elements", _expanded),
    Bomb("PyTorch gates", "overlapping tensor, 64 times its storage", _overlapping),
    Bomb("PyTorch gates", "packed data, 1.5 GiB unpacked", _deflated),
    Bomb("PyTorch gates", "tuples nested so that a hash takes 2^60 steps",
         _write("gates.pt", _nested_tuples)),
    Bomb("PyTorch gates", "a dict that holds itself", _write("gates.pt", _recursive_dict)),
    Bomb("PyTorch gates", "lists nested 200,000 deep", _write("gates.pt", _deep_pickle)),
    Bomb("PyTorch gates", "a bytearray of 2^40 bytes", _bytearray_of(1 << 40)),
    Bomb("PyTorch gates", "a bytearray of 2 GiB", _bytearray_of(2 << 30)),
    Bomb("PyTorch gates", "empty file", _write("gates.pt", b"")),
    Bomb("PyTorch gates, old format", "a bare pickle that calls os.system",
         _write("gates.pt", pickle.dumps(_Runs(os.system, "touch pwned"), 2))),
    *(Bomb("native gates", text, _write("gates.safetensors", content))
      for text, content in HEADERS.items()),
    *(Bomb("capture", text, _write("capture.safetensors", content))
      for text, content in HEADERS.items()),
    *(Bomb("checkpoint", text, _write("model-00001-of-00002.safetensors", content))
      for text, content in HEADERS.items()),
    *(Bomb("PEFT adapter", text, _write("adapter_model.safetensors", content))
      for text, content in HEADERS.items()),
    Bomb("checkpoint", "a header of a million tensors",
         _write("model-00001-of-00002.safetensors", _many_tensors)),
    Bomb("capture", "a header of a million tensors",
         _write("capture.safetensors", _many_tensors)),
    Bomb("native gates", "a header of a million tensors",
         _write("gates.safetensors", _many_tensors)),
    Bomb("PEFT adapter", "a header of a million tensors",
         _write("adapter_model.safetensors", _many_tensors)),
    *(Bomb("checkpoint", f"60 MB of empty objects as {name}", _write(name, _json_bomb))
      for name in ("config.json", "model.safetensors.index.json")),
    Bomb("PEFT adapter", "60 MB of empty objects", _write("adapter_config.json", _json_bomb)),
    Bomb("provenance", "60 MB of empty objects", _write("so8tqc.json", _json_bomb)),
    Bomb("record", "60 MB of empty objects", _write("bake/record.json", _json_bomb)),
    Bomb("manifest", "60 MB of empty objects", _write("manifest.json", _json_bomb)),
    Bomb("temperature config", "60 MB of empty objects",
         _write("temperature_config.json", _json_bomb)),
    Bomb("texts .json", "60 MB of empty objects", _write("texts.json", _json_bomb)),
    *(Bomb("checkpoint", f"an index that names {name!r}", _index(**{"model.norm.weight": name}))
      for name in ("../x.safetensors", "/etc/passwd", ".", "..", "", "a/b.safetensors", "x\x00y",
                   "C:\\x.safetensors", "x" * 5000)),
    Bomb("checkpoint", "a shard that is a link to itself",
         _symlinked_shard("model-00001-of-00002.safetensors")),
    Bomb("checkpoint", "a shard that is a link to /dev/zero", _symlinked_shard("/dev/zero")),
    Bomb("checkpoint", "a shard that is a link to a directory", _symlinked_shard(".")),
    *(Bomb(reader, f"{name} is a named pipe", _fifo(name)) for reader, name in (
        ("checkpoint", "config.json"), ("checkpoint", "model.safetensors.index.json"),
        ("checkpoint", "model-00001-of-00002.safetensors"), ("capture", "capture.safetensors"),
        ("native gates", "gates.safetensors"), ("PyTorch gates", "gates.pt"),
        ("PEFT adapter", "adapter_config.json"), ("PEFT adapter", "adapter_model.safetensors"),
        ("GGUF", "model.gguf"), ("texts .txt", "texts.txt"), ("record", "bake/record.json"),
        ("importance matrix", "imatrix.gguf"), ("token table", "tokens.npz"),
        ("temperature config", "temperature_config.json"))),
    *(Bomb(reader, f"{name} is /dev/zero", _link(name, "/dev/zero")) for reader, name in (
        ("checkpoint", "config.json"), ("config", "run.yaml"), ("config", "low.yaml"),
        ("profiles", "profiles.yaml"), ("texts .txt", "texts.txt"), ("record", "bake/record.json"),
        ("manifest", "manifest.json"), ("temperature config", "temperature_config.json"),
        ("token table", "tokens.npz"), ("PEFT adapter", "adapter_config.json"))),
    *(Bomb("GGUF", text, _write("model.gguf", content)) for text, content in GGUFS.items()),
    *(Bomb("importance matrix", text, _write("imatrix.gguf", content))
      for text, content in GGUFS.items()),
    *(Bomb("importance matrix, old format", text, _write("imatrix.dat", content))
      for text, content in {
          "2^31 − 1 entries": struct.pack("<i", 0x7FFFFFFF),
          "−1 entries": struct.pack("<i", -1),
          "a name of 2^31 − 1 bytes": struct.pack("<ii", 1, 0x7FFFFFFF),
          "a name of −1 bytes": struct.pack("<ii", 1, -1) + bytes(64),
          "2^31 − 1 values": struct.pack("<ii1sii", 1, 1, b"a", 1, 0x7FFFFFFF),
          "−1 values": struct.pack("<ii1sii", 1, 1, b"a", 1, -1) + bytes(64),
      }.items()),
    *(Bomb("config", text, _write("run.yaml", content)) for text, content in YAMLS.items()),
    # the file on top sets max_tokens itself, whatever the one below says
    *(Bomb("config", f"extended: {text}", _write("low.yaml", content), b"max_tokens" not in content)
      for text, content in YAMLS.items() if not text.startswith("a wrong type")),
    *(Bomb("profiles", text, _write("profiles.yaml", content)) for text, content in YAMLS.items()),
    *(Bomb(f"texts {kind}", text, _write(f"texts{kind}", content), refused)
      for kind in (".txt", ".json", ".jsonl") for text, content, refused in (
          ("empty", b"", True), ("white space", b" \n\t\r\n", True),
          ("not UTF-8", b"abc \xff\xfe", True), ("UTF-16", '{"text": "a"}'.encode("utf-16"), True),
          ("one line of 50 MB", b"x" * _LINE, kind != ".txt"),
          ("50 MB of line ends", b"\n" * _LINE, True),
          ("NULs", b"\x00" * 1000, kind != ".txt"),
          ("a lone surrogate", b'{"text": "\\ud800", "texts": ["\\ud800"]}', kind != ".txt"),
          ("nested 100,000 deep", b"[" * 100_000, kind != ".txt"),
          ("an integer of 100,000 digits", b'{"text": ' + b"9" * 100_000 + b"}", kind != ".txt"),
      )),
    Bomb("texts .jsonl", "one text of 50 MB",
         _write("texts.jsonl", lambda: b'{"text": "' + b"x" * _LINE + b'"}'), refused=False),
    Bomb("texts .jsonl", "a million texts of one name",
         _write("texts.jsonl", lambda: b'{"id":"a","text":"b"}\n' * 1_000_000), refused=False),
    *(Bomb("texts .txt", f"3 GB of {text}", plant) for text, plant in (
        ("nothing (a sparse file)", lambda folder: os.truncate(folder / "texts.txt", 3 << 30)),)),
    *(Bomb(reader, text, _write(name, content)) for reader, name in (
        ("record", "bake/record.json"), ("manifest", "manifest.json"),
        ("provenance", "so8tqc.json"), ("temperature config", "temperature_config.json"))
      for text, content in {
          "empty": b"", "a list": b"[]", "null": b"null", "not UTF-8": b'{"a": "\xff"}',
          "nested 100,000 deep": b"[" * 100_000, "NaN": b"NaN",
          "an integer of 100,000 digits": b"9" * 100_000}.items()),
    *(Bomb("tokenizer", text, _write("tokenizer_config.json", json.dumps(value).encode()), False)
      for text, value in {
          "a tokenizer of its own code": {"auto_map": {"AutoTokenizer": ["evil.Evil", None]},
                                          "tokenizer_class": "Evil"},
          "code of a hub": {"auto_map": {"AutoTokenizer": ["who/evil--evil.Evil", None]},
                            "tokenizer_class": "Evil"}}.items()),
    *(Bomb("transformers model", text, plant) for text, plant in (
        ("a model of its own code", lambda folder: _own_code(folder, "evil.Evil")),
        ("code of a hub", lambda folder: _own_code(folder, "who/evil--evil.Evil")))),
    *(Bomb("transformers model", f"{key} of {value}", partial(_configured, key, value))
      for key, value in (
          ("vocab_size", 10**12), ("hidden_size", 10**9), ("num_hidden_layers", 10**9),
          ("intermediate_size", 10**12), ("num_hidden_layers", 4000),
          ("num_attention_heads", 10**9), ("vocab_size", 10**7))),
    Bomb("transformers model", "max_position_embeddings of 10^15",
         partial(_configured, "max_position_embeddings", 10**15), refused=False),
)  # fmt: skip
