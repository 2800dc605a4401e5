"""Doctor: what is installed, what is missing and how to get it; or what a file is."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from so8tqc.checkpoints.provenance import Provenance, read_provenance
from so8tqc.checkpoints.safetensors_index import open_checkpoint
from so8tqc.checkpoints.sites import layers_of_text, layers_with_attention
from so8tqc.errors import InputError, So8tqcError
from so8tqc.gguf.file import GGUFFile, is_gguf, open_gguf
from so8tqc.llama.compiled import BUILD_MINUTES, compiled, cpu_words
from so8tqc.llama.kept_wheels import offered
from so8tqc.llama.pin import INSTALL_COMMAND, INSTALL_UNFUSED, PIN, UNFUSED
from so8tqc.llama.vendor import find_converter, is_vendored
from so8tqc.rotations.blocks import target_blocks
from so8tqc.rotations.files.names import looks_like_a_gate
from so8tqc.rotations.files.raw import RawRotations
from so8tqc.rotations.read import open_raw
from so8tqc.rotations.readings import FACTS, known_names, missing_facts, readings
from so8tqc.rotations.rotation_set import layers_of, orthogonality_error
from so8tqc.services.export.provenance import says_baked
from so8tqc.services.trained_base import is_trained_directory
from so8tqc.sources.inputs.builtin import demo_gguf

_PACKAGES = (
    "so8tqc",
    "torch",
    "transformers",
    "safetensors",
    "gguf",
    "numpy",
    "numba",
    "scipy",
    "plotly",
    "pydantic",
    "typer",
)
_LOAD_TIMEOUT_SECONDS = 60
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Finding(NamedTuple):
    """One line of a diagnosis.

    Attributes:
        name: what was looked at.
        value: what was found.
        ok: True, False, or None where there is nothing to judge.
        remedy: the command that mends it, "" if none is needed.
    """

    name: str
    value: str
    ok: bool | None = None
    remedy: str = ""


def examine() -> list[Finding]:
    """Versions, machine, GPU, libllama and its quantizers, converter, browser, demo model."""
    import psutil

    packages = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    memory = psutil.virtual_memory()
    return [
        Finding("python", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        Finding("packages", packages, "absent" not in packages),
        Finding("cpu", f"{os.cpu_count()} cores, {_cpu_features()}"),
        Finding(
            "memory",
            f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
            memory.available > 2 * 2**30,
        ),
        Finding("disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"),
        _gpu(),
        *_libllama(),
        _mtmd(),
        _converter(),
        _pictures(),
        _png(),
        _demo_model(),
    ]


def describe(path: Path) -> list[Finding]:
    """What a GGUF file, model directory, or rotation source is.

    Raises:
        InputError: it is none of them, or cannot be read.
    """
    if is_gguf(path):
        return _describe_gguf(path)
    if is_trained_directory(path):
        return _describe_rotations(path)
    if (path / "config.json").is_file():
        return _describe_model(path)
    if path.exists():
        return _describe_rotations(path)
    raise InputError("no such file or directory", where=str(path))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _cpu_features() -> str:
    """The features that decide which kernels run."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return platform.machine()
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "native bf16", "amx_bf16": "AMX"}
    found = [label for flag, label in known.items() if flag in flags]
    return ", ".join(found) or platform.machine()


def _gpu() -> Finding:
    """Where transformers models compute, and where their logits are compared."""
    import torch

    from so8tqc.metrics.gpu_divergence import works_on

    if not torch.cuda.is_available():
        return Finding("gpu", "none that torch can use: models compute on the CPU")
    free, total = torch.cuda.mem_get_info()
    name = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if works_on(torch.device("cuda", torch.cuda.current_device())):
        return Finding("gpu", f"{name}, compares logits", True)
    return Finding(
        "gpu",
        f"{name}; logits are compared on the CPU, which takes several times as long: Triton "
        "needs a C compiler and Python's headers",
        False,
        "apt install gcc python3-dev",
    )


_PROBE = """
import json, llama_cpp
from llama_cpp import _ggml
told = llama_cpp.llama_print_system_info().decode()
print(json.dumps([llama_cpp.__version__, told, str(_ggml.libggml_base_path)]), flush=True)
from so8tqc.llama.fused import quantizers_fuse
print("fused" if quantizers_fuse() else "as written")
"""


def _libllama() -> Iterator[Finding]:
    """Load it in a process of its own: a broken build may take the process with it."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_LOAD_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Finding("libllama", "does not load in time", False, INSTALL_COMMAND)
        return
    said = done.stdout.splitlines()
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        absent = reason.startswith(ModuleNotFoundError.__name__)
        yield Finding("libllama", reason, False, _install() if absent else INSTALL_COMMAND)
        return
    yield _compiled(*json.loads(said[0]))
    if said[-1] == "fused":
        yield Finding(
            "quantizers",
            "round products and sums at once: some blocks of quantized files differ from those "
            "that other machines make",
            False,
            INSTALL_UNFUSED,
        )
    else:
        yield Finding("quantizers", "round as written: the same files on other machines", True)


def _install() -> str:
    """By the wheel that was compiled here before, if one is kept: in seconds."""
    for folder in offered():
        links = f"--no-index --find-links {shlex.quote(str(folder))}"
        return f"pip install --force-reinstall --no-deps {links} {PIN.name}=={PIN.version}"
    return INSTALL_COMMAND


def _compiled(package: str, system_info: str, folder: str) -> Finding:
    """How it was compiled, and whether that can be trusted on this CPU."""
    libraries = sorted(Path(folder).glob("*ggml-cpu*"))
    content = libraries[0].read_bytes() if libraries else b""
    build = compiled(system_info, content, cpu_words())
    by = f" by {build.compiler}" if build.compiler else ""
    value = f"llama-cpp-python {package}, compiled{by} for {' '.join(build.flags) or 'any CPU'}"
    if build.trusted:
        return Finding("libllama", f"{value}: this CPU has these (built in {BUILD_MINUTES})", True)
    wrong = build.broken or f"this CPU lacks {' '.join(build.lacking)}"
    value = f"{value}: not to be trusted here, {wrong}; a build takes {BUILD_MINUTES}"
    return Finding("libllama", value, False, _WITHOUT_AMX)


_WITHOUT_AMX = INSTALL_UNFUSED.replace(UNFUSED, f'"{UNFUSED} -mno-amx-int8"')
"""Compiled here, for this CPU; see the noxfile."""


def _mtmd() -> Finding:
    """Whether the bindings bring llama.cpp's own image code, which nothing here depends on."""
    found = importlib.util.find_spec("llama_cpp")
    places = found.submodule_search_locations if found else None
    folders = [Path(folder) / "lib" for folder in places or ()]
    built = [path.name for folder in folders for path in folder.glob("*mtmd*")]
    if built:
        return Finding("mtmd", f"built in ({', '.join(built)})", True)
    return Finding("mtmd", "not built in: pictures are shown as a vision tower's embeddings")


def _pictures() -> Finding:
    if _version("pillow") == "absent":
        return Finding("pictures", "Pillow is not installed", False, "pip install 'so8tqc[vision]'")
    pillow, vision = _version("pillow"), _version("torchvision")
    if vision == "absent":
        rest = "no torchvision, which some processors need"
        return Finding("pictures", f"Pillow {pillow}, {rest}", True)
    # a build for another torch breaks transformers' classes that see, and not only its processors
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import torchvision"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return Finding("pictures", f"Pillow {pillow}, torchvision {vision}", True)
    reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return Finding(
        "pictures",
        f"torchvision {vision} does not load beside torch {_version('torch')}: {reason}",
        False,
        "pip uninstall torchvision (or install its build for this torch)",
    )


def _converter() -> Finding:
    try:
        converter = find_converter()
    except So8tqcError as error:
        return Finding("converter", error.what, False, "so8tqc vendor")
    pinned = "pinned revision" if is_vendored() else "not the pinned revision"
    return Finding("converter", f"{converter.script} ({pinned})", is_vendored())


def _png() -> Finding:
    if _version("kaleido") == "absent":
        return Finding("png", "kaleido is not installed", False, "pip install 'so8tqc[png]'")
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        return Finding("png", "no Chrome or Chromium", False, "apt-get install -y chromium")
    return Finding("png", f"kaleido {_version('kaleido')} with {found}", True)


def _demo_model() -> Finding:
    try:
        return Finding("demo model", str(demo_gguf()), True)
    except So8tqcError as error:
        return Finding("demo model", error.what, False, "pip install 'so8tqc[demo]'")


def _describe_gguf(path: Path) -> list[Finding]:
    gguf = open_gguf(path)
    types = ", ".join(f"{name} × {count}" for name, count in gguf.types.items())
    ours = {k: v for k, v in gguf.fields.items() if k.startswith(("so8t.", "general.sampling."))}
    return [
        Finding("kind", f"GGUF, architecture {gguf.architecture}, {gguf.file_type or 'mixed'}"),
        Finding("name", str(gguf.fields.get("general.name", ""))),
        Finding("tensors", f"{len(gguf.tensors)}: {types}"),
        Finding(
            "size",
            f"{gguf.size / 1e6:.1f} MB{_in_files(gguf)}, {gguf.bits_per_weight:.2f} bits per "
            "weight",
        ),
        *([] if says_baked(gguf.fields) else [Finding("baked", "no so8t.baked: not known to be")]),
        *(Finding(key, str(value)) for key, value in ours.items()),
    ]


def _in_files(gguf: GGUFFile) -> str:
    return f" in {len(gguf.parts)} files" if len(gguf.parts) > 1 else ""


def _describe_model(path: Path) -> list[Finding]:
    checkpoint = open_checkpoint(path)
    layers = layers_of_text(checkpoint)
    attending = sorted(layers_with_attention(checkpoint))
    dtypes = sorted({entry.dtype for entry in checkpoint.tensors.values()})
    findings = [
        Finding("kind", f"model directory, {checkpoint.model_type}"),
        Finding("layers", str(len(layers))),
        Finding(
            "attention",
            "in every layer, each wants a gate"
            if len(attending) == len(layers)
            else f"in layer(s) {', '.join(map(str, attending))}: only these want a gate",
        ),
        Finding(
            "tensors",
            f"{len(checkpoint.tensors)} in {len(checkpoint.files)} file(s), {', '.join(dtypes)}",
        ),
        Finding("size", f"{checkpoint.bytes / 1e6:.1f} MB"),
    ]
    provenance = read_provenance(path)
    if provenance is None:
        findings.append(Finding("baked", "no so8tqc.json: not baked by so8tqc"))
    else:
        findings.append(
            Finding(
                "baked",
                f"from {provenance.rotations}, {_how(provenance)}, "
                f"{len(provenance.tensors)} tensors",
            )
        )
    return findings


def _how(provenance: Provenance) -> str:
    """Gates by parametrization and convention, adapters by their methods."""
    gates = (provenance.parametrization, provenance.convention)
    words = [str(word) for word in gates if word is not None]
    return ", ".join([*words, *(adapter.kind for adapter in provenance.adapters)])


def _describe_rotations(path: Path) -> list[Finding]:
    """What a rotation source is, and what is missing to bake it: nothing is assumed here either."""
    raw = open_raw(path)
    layers, missing = layers_of(raw.theta), missing_facts(raw)
    shapes = sorted({str(list(theta.shape)) for theta in raw.theta.values()})
    facts = [f"{fact} {getattr(raw, fact)}" for fact in FACTS if fact not in missing]
    where = f"layers {layers[0]} to {layers[-1]}" if layers else "in front of the output head"
    findings = [Finding("kind", _kind(path, raw))]
    if facts:
        by = f", recognised by the names {raw.recognised}" if raw.recognised else ", as it states"
        findings.append(Finding("reading", ", ".join(facts) + by, True))
    findings.append(_missing(path, raw, missing))
    findings += [Finding("names", "\n".join(known))] if (known := known_names(raw)) else []
    findings.append(Finding("targets", f"{len(raw.theta)}, {where}, blocks {', '.join(shapes)}"))
    if raw.parametrization is not None:
        blocks = target_blocks(raw.theta, raw.parametrization, str(path))
        drift = max(float(orthogonality_error(b).max()) for b in blocks.values())
        findings.append(Finding("drift", f"largest ‖RᵀR − I‖ {drift:.1e}"))
    if raw.strength:
        strength = ", ".join(f"{value:.6g}" for value in raw.strength.values())
        findings.append(Finding("strength", f"{strength}: the gate computes x + s·R·x"))
    return [
        *findings,
        *(Finding(k, _shorten(v)) for k, v in sorted(raw.metadata.items()) if k != "recognised"),
        *(
            Finding("note", notice)
            for notice in raw.notices
            if not raw.recognised or not notice.startswith("Recognised")
        ),
    ]


def _kind(path: Path, raw: RawRotations) -> str:
    """What a rotation source is, in one line."""
    gates = f"{len(raw.theta)} gate{'s' if len(raw.theta) > 1 else ''}"
    if not raw.keys:
        return f"rotations, {raw.parametrization}, {raw.convention}, {raw.site}"
    stored = f" in {raw.dtype}" if raw.dtype else ""
    kind = "trained model directory" if path.is_dir() else "training checkpoint"
    if path.is_dir() and not (path / "config.json").is_file():
        kind = "PEFT adapter directory"
    lora = sum(".lora_A." in name for name in raw.weights)
    others = sum(not looks_like_a_gate(name) and ".lora_" not in name for name in raw.weights)
    beside = [f"{lora} LoRA branches"] if lora else []
    beside += [f"{others} weights"] if others else []
    return f"{kind}, {gates}{stored}" + (f" beside {' and '.join(beside)}" if beside else "")


def _missing(path: Path, raw: RawRotations, missing: tuple[str, ...]) -> Finding:
    """What must be known before it can be baked."""
    if any(".lora_A." in name for name in raw.weights) and "lora_alpha" not in raw.settings:
        missing = (*missing, "α of the LoRA branches (--lora-alpha)")
    if not missing:
        own = is_trained_directory(path)
        command = f"so8tqc bake {path} --out DIR" if own else f"so8tqc bake BASE {path} --out DIR"
        return Finding("missing", f"nothing: {command}", True)
    if not missing_facts(raw):
        return Finding("missing", ", ".join(missing), False)
    return Finding(
        "missing",
        f"{', '.join(missing)}: {len(readings(raw))} readings are possible, and none is assumed",
        False,
        f"so8tqc identify BASE {path}",
    )


def _shorten(text: str) -> str:
    """JSON metadata as ``key=value`` pairs; anything else as it is."""
    try:
        content = json.loads(text)
    except ValueError:
        return text
    if isinstance(content, dict):
        return ", ".join(f"{key}={value}" for key, value in content.items())
    return text
