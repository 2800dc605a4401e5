"""Keys that are given to the converter reach it however it reads the configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import json, sys
from transformers import AutoConfig
with open(sys.argv[1] + "/config.json") as stream:
    read = json.load(stream)
known = AutoConfig.from_pretrained(sys.argv[1]).to_dict()
print(json.dumps([c.get("text_config", c)["extra"] for c in (read, known)]))
"""


@pytest.mark.parametrize(
    "config",
    [{"model_type": "llama"}, {"model_type": "llava", "text_config": {"model_type": "llama"}}],
)
def test_given_keys_are_in_the_text_configuration(
    config: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "so8tqc.llama.guarded_script", str(script), str(tmp_path)],
        env=os.environ | {"SO8TQC_CONFIG_KEYS": json.dumps({"extra": [1, 2]})},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[1, 2], [1, 2]]
    assert json.loads((tmp_path / "config.json").read_text()) == config
