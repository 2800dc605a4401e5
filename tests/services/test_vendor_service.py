"""What the record of ``vendor`` says: fetched, or here already; and which file it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from so8tqc.disk.digests import sha256_file
from so8tqc.llama.vendor import Converter
from so8tqc.services import vendor as module
from so8tqc.services.vendor import vendor


@pytest.mark.parametrize("present", [True, False])
def test_it_fetches_only_what_is_not_here(
    present: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("print()")
    fetched: list[object] = []
    converter = Converter(script, None, "abc")

    def fetch(progress: object) -> Converter:
        fetched.append(progress)
        return converter

    monkeypatch.setattr(module, "is_vendored", lambda: present)
    monkeypatch.setattr(module, "find_converter", lambda: converter)
    monkeypatch.setattr(module, "fetch_converter", fetch)
    record = vendor()
    assert len(fetched) == (not present)
    assert ("was already here" if present else "was fetched") in record.notices[0]
    assert record.metrics["revision"] == "abc"
    assert record.outputs["converter"].sha256 == sha256_file(script)
