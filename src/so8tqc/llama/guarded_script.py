"""Runs a llama.cpp script with transformers' remote code switched off, whatever the script asks.

``python -P -m so8tqc.llama.guarded_script SCRIPT ARGUMENT…``

Some of the converter's tokenizer paths pass ``trust_remote_code=True``; transformers would then
run Python files of the model directory.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import NoReturn


def _refuse(*_arguments: object, **_options: object) -> NoReturn:
    raise PermissionError(
        "the model brings Python code of its own (auto_map in its configuration), "
        "which is never run; save it with a tokenizer that transformers knows"
    )


def main(script: Path, arguments: list[str]) -> None:
    """Run ``script`` as ``python SCRIPT ARGUMENT…`` would."""
    # before the auto classes are imported: they take the function by its name
    from transformers import dynamic_module_utils

    dynamic_module_utils.get_class_from_dynamic_module = _refuse
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
