"""The workflow that is there to be copied: YAML, known keys, commands that the app accepts."""

from __future__ import annotations

import re
import subprocess

import yaml
from blocks import ROOT, Block, commands_of, lines_of
from parsing import parse

from so8tqc.config.batch import check_file

WORKFLOW = ROOT / "examples" / "github-actions.yml"
_STEP_KEYS = {"name", "uses", "with", "run", "if", "env", "id"}


def test_jobs_and_steps_are_well_formed() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow.keys() == {"name", True, "permissions", "env", "jobs"}  # YAML 1.1: on is true
    for job in workflow["jobs"].values():
        assert set(job) <= {"runs-on", "needs", "steps"}
        assert job.get("needs", "files") in workflow["jobs"]
        for step in job["steps"]:
            assert set(step) <= _STEP_KEYS
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))


def test_every_command_is_accepted(tmp_path) -> None:
    names = []
    for script in _scripts():
        done = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
        assert done.returncode == 0, script
        for arguments in commands_of(Block("workflow", 0, "bash", script, "")):
            parse(arguments)
            names.append(arguments[0])
    assert names == ["bake", "qc", "vendor", "config", "run"]


def test_the_run_file_is_valid(tmp_path) -> None:
    line = next(
        line
        for script in _scripts()
        for line in lines_of(Block("workflow", 0, "bash", script, ""))
        if "<<YAML" in line
    )
    environment = {
        "MODEL": "models/base",
        "ROTATIONS": "gates.safetensors",
        "PATH": "/bin:/usr/bin",
    }
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, check=True)
    check_file(tmp_path / "run.yaml")


def _scripts() -> list[str]:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    return [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
