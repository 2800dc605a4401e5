"""The llama.cpp this version works with: one source package, for library and converter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pin:
    """A source package on the Python package index, pinned by content."""

    name: str
    version: str
    sha256: str


PIN = Pin(
    name="llama-cpp-python",
    version="0.3.36",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)
"""``vendor/llama.cpp/pin.json`` repeats this for people; a test keeps the two equal."""

INSTALL_COMMAND = "pip install -c constraints.txt 'so8tqc[llama]'"

UNFUSED = "-ffp-contract=off"
"""What keeps gcc and clang from fusing products and sums (see ``fused``)."""

INSTALL_UNFUSED = (
    f"CMAKE_ARGS='-DCMAKE_C_FLAGS={UNFUSED} -DCMAKE_CXX_FLAGS={UNFUSED}' pip install "
    "-c constraints.txt --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python "
    "llama-cpp-python"
)
