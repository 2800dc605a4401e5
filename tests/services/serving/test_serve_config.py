"""A GGUF's own facts in each runtime's own form, read by the runtime where it can be run here."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from modelfile import read
from typer.testing import CliRunner

from so8tqc.cli.app import app
from so8tqc.config import ExportConfig, ServeConfig
from so8tqc.disk.digests import sha256_file
from so8tqc.errors import DataError, InputError, ModelError
from so8tqc.gguf.rewrite import changed_copy
from so8tqc.gguf.vocabulary import token_texts
from so8tqc.llama.vendor import is_vendored
from so8tqc.record_files import record_beside, write_record
from so8tqc.services.export.service import export
from so8tqc.services.serving.service import Served, serve_config

pytestmark = pytest.mark.skipif(not is_vendored(), reason="needs the vendored converter")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EXTRA_END = 40


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(make_model("llama", "float16"), directory)
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(directory))
    generation = {"eos_token_id": [2, EXTRA_END], "temperature": 0.6, "top_k": 30, "top_p": 0.9}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture(scope="module")
def served(model: Path) -> Path:
    """A GGUF with the record of its export beside it."""
    out = model.parent / "export" / "tiny.gguf"
    out.parent.mkdir()
    write_record(record_beside(out), export(ExportConfig(model=model, out=out)))
    return out


def told(gguf: Path, runtime: str, **more: object) -> Served:
    return serve_config(ServeConfig.model_validate({"gguf": gguf, "runtime": runtime, **more}))


def temperature_file(path: Path, gguf: Path, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    model = {"file": gguf.name, "sha256": sha256_file(gguf)}
    content = {"temperature": 1.25, "significant": True, "model": model, **more}
    path.write_text(json.dumps(content))
    return path


def test_ollama(served: Path, tmp_path: Path) -> None:
    file = temperature_file(tmp_path / "t.json", served)
    found = told(served, "ollama", temperature=file)
    lines = read(found.text)
    assert lines[0] == ("FROM", str(served))
    parameters = [value for key, value in lines if key == "PARAMETER"]
    extra = token_texts(served, {EXTRA_END})[EXTRA_END]
    assert parameters == [
        "temperature=1.25", "top_k=30", "top_p=0.9", "stop=</s>", f"stop={extra}"
    ]  # fmt: skip
    assert found.text.startswith(f"# T = 1.25, fitted by so8tqc calibrate ({file}).\n")
    assert [key for key, _ in lines].count("TEMPLATE") == 1


def test_llama_server(served: Path, tmp_path: Path) -> None:
    file = temperature_file(tmp_path / "t.json", served)
    comment, line = told(served, "llama-server", temperature=file).text.splitlines()
    assert comment.startswith("# T = 1.25")
    assert shlex.split(line) == [
        "llama-server", "--model", str(served), "--jinja", "--temp", "1.25", "--top-k", "30",
        "--top-p", "0.9", "--override-kv", f"tokenizer.ggml.eot_token_id=int:{EXTRA_END}",
    ]  # fmt: skip


def test_transformers_reads_its_generation_config(served: Path, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    file = temperature_file(tmp_path / "t.json", served)
    told(served, "transformers", temperature=file, out=tmp_path / "generation_config.json")
    config = GenerationConfig.from_pretrained(str(tmp_path))
    config.validate(strict=True)
    assert (config.temperature, config.do_sample) == (1.25, True)
    assert config.eos_token_id == [2, EXTRA_END]
    assert (config.top_k, config.top_p, config.bos_token_id) == (30, 0.9, 1)


def test_llama_cpp_python_loads_renders_and_answers(served: Path, tmp_path: Path) -> None:
    """The script is run as it is; the prompt is what the chat template renders."""
    file = temperature_file(tmp_path / "t.json", served)
    script = tmp_path / "serve.py"
    found = told(served, "llama-cpp-python", temperature=file, out=script)
    assert "temperature=1.25" in found.text
    prologue = (
        "import llama_cpp.llama as module\n"
        "def create(self, prompt, **options):\n"
        "    print('PROMPT', self.detokenize(prompt, special=True).decode())\n"
        "    print('AT', options['temperature'], options['top_k'], options['stop'])\n"
        "    options['max_tokens'] = 4\n"
        "    return real(self, prompt, **options)\n"
        "real, module.Llama.create_completion = module.Llama.create_completion, create\n"
    )
    script.write_text(prologue + found.text)
    done = subprocess.run(
        [sys.executable, str(script), "Hello"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "<user>Hello</s><assistant>" in done.stdout.replace(" ", "")
    extra = token_texts(served, {EXTRA_END})[EXTRA_END]
    assert f"AT 1.25 30 ['</s>', {extra!r}" in done.stdout


def test_lm_studio(served: Path, tmp_path: Path) -> None:
    file = temperature_file(tmp_path / "t.json", served)
    preset = json.loads(told(served, "lm-studio", temperature=file).text)
    assert preset.keys() == {"identifier", "name", "changed", "operation", "load"}
    fields = {field["key"]: field["value"] for field in preset["operation"]["fields"]}
    assert fields["llm.prediction.temperature"] == 1.25
    assert fields["llm.prediction.stopStrings"][0] == "</s>"
    jinja = fields["llm.prediction.promptTemplate"]["jinjaPromptTemplate"]
    assert jinja == {"template": TEMPLATE, "bosToken": "<s>", "eosToken": "</s>"}
    assert "fitted by so8tqc calibrate" in preset["name"]


def test_where_the_temperature_comes_from(served: Path, tmp_path: Path) -> None:
    found = told(served, "ollama")
    assert (found.temperature, "none was fitted" in found.origin) == (0.6, True)
    calibrate = tmp_path / "run" / "calibrate" / "temperature_config.json"
    copy = tmp_path / "run" / "quantize" / "tiny.gguf"
    copy.parent.mkdir(parents=True)
    shutil.copy(served, copy)
    temperature_file(calibrate, copy)
    found = told(copy, "ollama")
    assert (found.temperature, str(calibrate) in found.origin) == (1.25, True)
    temperature_file(calibrate, copy, temperature=1.0, significant=False)
    found = told(copy, "ollama")
    assert (found.temperature, "could be told from chance" in found.origin) == (1.0, True)
    calibrate.write_text("rubbish")  # nobody named it
    assert told(copy, "ollama").temperature == 0.6


def test_what_the_file_declares_goes_first(served: Path, tmp_path: Path) -> None:
    declared, folded = tmp_path / "declared.gguf", tmp_path / "folded.gguf"
    changed_copy(served, declared, {"so8t.calibration.temperature": 1.087})
    found = told(declared, "ollama")
    assert (found.temperature, "as the file declares" in found.origin) == (1.087, True)
    changed_copy(served, folded, {"so8t.calibration.norm_temperature": 1.087})
    found = told(folded, "ollama")
    assert (found.temperature, "in the weights already" in found.origin) == (1.0, True)


def test_no_temperature_is_said_and_never_guessed(
    served: Path, model: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.gguf"
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    (plain / "generation_config.json").write_text('{"eos_token_id": 2}')
    export(ExportConfig(model=plain, out=bare))
    for runtime in ("ollama", "llama-server", "llama-cpp-python", "transformers", "lm-studio"):
        found = told(bare, runtime)
        assert found.temperature is None
        assert "No temperature" in found.origin
        body = "\n".join(line for line in found.text.splitlines() if "No temperature" not in line)
        for word in ("PARAMETER temp", "--temp", "temperature", "do_sample"):
            assert word not in body.replace(str(tmp_path), "")
        assert any("--model DIR" in notice for notice in found.notices)


def test_another_models_temperature_is_refused(served: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other")
    file = temperature_file(tmp_path / "t.json", other)
    with pytest.raises(DataError, match=r"was fitted on other\.gguf"):
        told(served, "ollama", temperature=file)
    for bad in ("warm", 0, -1.0, True, None):
        file = temperature_file(tmp_path / "t.json", served, temperature=bad)
        with pytest.raises(DataError, match="its temperature is"):
            told(served, "ollama", temperature=file)


def test_models_that_give_no_ends(served: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        told(served, "ollama", model=tmp_path / "absent")
    odd = tmp_path / "odd"
    odd.mkdir()
    for content in ('{"eos_token_id": "</s>"}', "{", '{"eos_token_id": [9999]}'):
        (odd / "generation_config.json").write_text(content)
        with pytest.raises(ModelError):
            told(served, "ollama", model=odd)


def test_the_command(served: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve-config", str(served), "--for", "llama-server"])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].startswith("llama-server --model")
    assert "none was fitted" in result.stderr
    out = tmp_path / "Modelfile"
    arguments = ["serve-config", str(served), "--for", "ollama", "--out", str(out), "--quiet"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (0, "")
    assert read(out.read_text())[0][0] == "FROM"
    result = CliRunner().invoke(app, [*arguments[:4], "--json"])
    assert json.loads(result.stdout)["temperature"] == 0.6
