"""Pictures in the data: read within limits, rendered by the model's own processor, or refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from so8tqc.cli.main import run
from so8tqc.errors import DataError, MissingToolError, ModelError, So8tqcError, ToolError
from so8tqc.sources.embedding import with_embedded
from so8tqc.sources.gated import gated
from so8tqc.sources.hf import HFModel, HFSource
from so8tqc.sources.inputs import drawn, pictures
from so8tqc.sources.inputs.pictures import MARKER, MAX_PIXELS, open_picture, parts_of
from so8tqc.sources.inputs.prepared import prepare
from so8tqc.sources.inputs.texts import encode, input_paths, load_texts, load_tokenizer
from so8tqc.sources.inputs.windows import overlapping_windows
from so8tqc.sources.layerwise.model import StreamedModel
from so8tqc.sources.protocol import EncodedText
from so8tqc.sources.seen import beginning, images_of
from vision_models import SHOWN

Maker = Callable[[str], Path]


def rows(path: Path, *items: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A small PNG of noise."""
    values = np.random.default_rng(0).integers(0, 256, size=(40, 60, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def prepared(model: Path, data: Path, **options: Any) -> tuple[EncodedText, ...]:
    return prepare([str(data)], load_tokenizer(model), None, **options).texts


# the built-in set


def test_there_are_24_pictures_of_every_kind_and_their_passages_say_what_they_show() -> None:
    texts = load_texts(["builtin:images"])
    assert len(texts) == len({text.id for text in texts}) == 24
    assert {text.category for text in texts} == {"chart", "shapes", "text", "table", "plot"}
    assert {text.language for text in texts} == {"en", "ja"}
    assert all(len(text.images) == 1 and len(text.text) > 60 for text in texts)


def test_they_are_the_same_everywhere() -> None:
    for one in drawn.drawings():
        image = drawn.draw(one.name)
        assert image.size == (drawn.WIDTH, drawn.HEIGHT)
        assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == drawn.DIGESTS[one.name]


def test_one_that_comes_out_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "DIGESTS", {**drawn.DIGESTS, "plot-line": "0" * 16})
    with pytest.raises(ToolError, match="plot-line comes out otherwise"):
        drawn.draw("plot-line")
    with pytest.raises(DataError, match="no built-in picture"):
        drawn.draw("plot-lime")


# reading


def png_header(width: int, height: int) -> bytes:
    """A PNG of any stated size, without its pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk
        + struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IEND\xaeB`\x82"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"not a picture", "cannot be read"),
        (png_header(40, 40)[:20], "cannot be read"),
        (png_header(0, 40), "the picture"),
        (png_header(9000, 9000), "9000 × 9000 pixels"),
        (png_header(31623, 31623), "pixels"),
        (png_header(1 << 20, 1 << 20), "the picture"),
        (png_header(64, 64), "cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused_with_its_row(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=words) as raised:
        open_picture(str(tmp_path / "x.png"), "data.jsonl:7")
    assert raised.value.where == "data.jsonl:7"
    assert raised.value.exit_code == 3


def test_the_largest_picture_allowed_is_decoded(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5)
    Image.new("1", (side, side)).save(tmp_path / "large.png")
    assert open_picture(str(tmp_path / "large.png"), "").size == (side, side)
    Image.new("1", (side + 1, side + 1)).save(tmp_path / "larger.png")
    with pytest.raises(DataError, match="pixels"):
        open_picture(str(tmp_path / "larger.png"), "")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    name = "x.jpg" if mode == "CMYK" else "x.png"
    Image.new(mode, (9, 5)).save(tmp_path / name)
    assert open_picture(str(tmp_path / name), "").mode == "RGB"


@pytest.mark.parametrize(
    "name", ["https://example.org/x.png", "file:///etc/x.png", "data:image/png;base64,AAAA"]
)
def test_nothing_is_fetched(name: str, tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", {"image": name, "text": "x"})
    with pytest.raises(DataError, match="nothing is fetched"):
        open_picture(load_texts([str(data)])[0].images[0], "d.jsonl:1")


@pytest.mark.parametrize("name", ["nowhere.png", ".", "a\0b"])
def test_a_file_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        open_picture(str(tmp_path / name), "d.jsonl:1")


# rows


@pytest.mark.parametrize("image", [3, [3], [""], {"a": 1}, [["x.png"]]])
def test_a_row_whose_image_is_no_path_is_refused(image: Any, tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", {"text": "a"}, {"image": image, "text": "x"})
    with pytest.raises(DataError, match="path or a list of paths") as raised:
        load_texts([str(data)])
    assert str(raised.value.where).endswith("d.jsonl:2")


def test_paths_are_read_from_the_files_folder_and_are_inputs(picture: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", {"image": picture.name, "text": "x"})
    assert load_texts([str(data)])[0].images == (str(picture),)
    assert input_paths([str(data)]) == (data, picture)


@pytest.mark.parametrize(
    ("turns", "count", "parts"),
    [
        (["a"], 1, [[None, "a"]]),
        (["a", "b"], 2, [[None, None, "a"], ["b"]]),
        ([f"a{MARKER}b"], 1, [["a", None, "b"]]),
        ([f"{MARKER}{MARKER}"], 2, [[None, None]]),
        (["a", f"b{MARKER}c{MARKER}"], 2, [["a"], ["b", None, "c", None]]),
    ],
)
def test_pictures_stand_where_their_markers_are(
    turns: list[str], count: int, parts: list[list[str | None]]
) -> None:
    assert parts_of(turns, count, "") == parts


@pytest.mark.parametrize(("markers", "count"), [(1, 2), (2, 1), (3, 2)])
def test_markers_that_do_not_match_are_refused(markers: int, count: int) -> None:
    with pytest.raises(DataError, match=f"{markers} markers") as raised:
        parts_of([MARKER * markers], count, "d.jsonl:9")
    assert raised.value.where == "d.jsonl:9"


# rendering


@pytest.mark.parametrize("kind", SHOWN)
def test_rendering_is_the_processors_own(
    kind: str, make_vision_model: Maker, picture: Path, tmp_path: Path
) -> None:
    model = make_vision_model(kind)
    data = rows(
        tmp_path / "d.jsonl",
        {"image": [picture.name, picture.name], "text": f"One {MARKER} and two {MARKER} here."},
    )
    (text,) = prepared(model, data)
    processor = pictures._loaded(model)
    content = [
        {"type": "text", "text": "One "}, {"type": "image"},
        {"type": "text", "text": " and two "}, {"type": "image"},
        {"type": "text", "text": " here."},
    ]  # fmt: skip
    written = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    image = Image.open(picture).convert("RGB")
    bos = processor.tokenizer.bos_token
    expected = processor(
        text=[written], images=[image, image], return_tensors="pt",
        add_special_tokens=not written.startswith(bos),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(text.tokens), expected["input_ids"][0].numpy())
    images = images_of(text.tokens)
    assert images is not None
    assert images.count == 2
    torch.testing.assert_close(images.inputs["pixel_values"], expected["pixel_values"])
    assert images.mask.sum() > 4
    before = text.tokens[: images.spans()[0][0]]
    assert "One" in processor.tokenizer.decode(before)


def test_a_prompt_is_the_users_turn(
    make_vision_model: Maker, picture: Path, tmp_path: Path
) -> None:
    model = make_vision_model("qwen2_vl")
    data = rows(tmp_path / "d.jsonl", {"image": picture.name, "prompt": "What?", "text": "Noise."})
    (text,) = prepared(model, data)
    written = load_tokenizer(model).decode(np.asarray(text.tokens))
    user, assistant = written.split("<|im_start|>assistant")
    assert "What?" in user
    assert user.index("<|image_pad|>") < user.index("What?")
    assert "Noise." in assistant


def test_without_a_template_the_parts_follow_one_another(
    make_vision_model: Maker, picture: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_vision_model("llava"), model)
    (model / "chat_template.jinja").unlink()
    data = rows(tmp_path / "d.jsonl", {"image": picture.name, "text": f"Look {MARKER} there"})
    (text,) = prepared(model, data)
    assert "INST" not in load_tokenizer(model).decode(np.asarray(text.tokens))
    assert images_of(text.tokens) is not None


def test_a_limit_counts_text_and_cuts_no_picture(
    make_vision_model: Maker, picture: Path, tmp_path: Path
) -> None:
    model = make_vision_model("qwen2_vl")
    long = "word " * 22
    data = rows(tmp_path / "d.jsonl", {"image": picture.name, "text": long + MARKER + long})
    (whole,) = prepared(model, data)
    (cut,) = prepare([str(data)], load_tokenizer(model), 100).texts
    images = images_of(cut.tokens)
    assert images is not None
    assert (~images.mask).sum() == 100
    assert cut.tokens.size == images.mask.size == images.inputs["mm_token_type_ids"].shape[1]
    (shorter,) = prepare([str(data)], load_tokenizer(model), 10).texts
    kept = images_of(shorter.tokens)
    assert kept is not None
    assert kept.mask.sum() == images.mask.sum()
    assert shorter.tokens.size < whole.tokens.size
    assert images_of(whole.tokens[:20]) is None  # a part of the ids is plain ids
    assert beginning(whole.tokens, 3).size == whole.tokens.size


def test_so_many_pictures_are_used(make_vision_model: Maker) -> None:
    tokenizer = load_tokenizer(make_vision_model("qwen2_vl"))
    data = ["builtin:images", "builtin:validation-quick"]
    texts, notices = prepare(data, tokenizer, 32, images=3)
    assert sum(images_of(text.tokens) is not None for text in texts) == 3
    assert len(texts) == 13
    assert any("21 texts with pictures are left out" in notice for notice in notices)
    assert len(prepare(data, tokenizer, 32, images=0).texts) == 10
    with pytest.raises(DataError, match="none of these is wanted"):
        prepare(["builtin:images"], tokenizer, 32, images=0)


def test_a_window_cuts_no_picture(make_vision_model: Maker) -> None:
    tokenizer = load_tokenizer(make_vision_model("qwen2_vl"))
    texts = prepare(["builtin:images"], tokenizer, None, images=1).texts
    assert overlapping_windows(texts, 512, 256, None) == texts
    with pytest.raises(DataError, match="a picture is not cut"):
        overlapping_windows(texts, 64, 32, None)


def test_commands_without_pictures_refuse_them(make_model: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="pictures, which are not taken here"):
        encode(load_texts(["builtin:images"]), load_tokenizer(make_model("llama")), None)


@pytest.mark.parametrize("names", [("preprocessor_config.json", "processor_config.json")])
def test_a_missing_processor_is_named_with_its_row(
    names: tuple[str, ...], make_vision_model: Maker, picture: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_vision_model("qwen2_vl"), model)
    for name in names:
        (model / name).unlink()
    data = rows(tmp_path / "d.jsonl", {"image": picture.name, "text": "x"})
    with pytest.raises(ModelError, match="there is no processor") as raised:
        prepared(model, data)
    assert "d.jsonl:1" in raised.value.what
    assert raised.value.exit_code == 3


def test_a_text_model_has_no_processor(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_model("llama"), model)
    (model / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no usable processor"):
        prepare(["builtin:images"], load_tokenizer(model), None)


def test_a_processor_whose_library_is_missing_says_which(make_vision_model: Maker) -> None:
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    with pytest.raises(MissingToolError, match="torchvision"):
        prepare(["builtin:images"], load_tokenizer(make_vision_model("mistral3")), None)


def test_a_torchvision_that_does_not_load_is_named(
    make_vision_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build for another torch: the processor's own error says nothing that helps."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)

    def fails(_: Path) -> Any:
        raise RuntimeError("Could not import module 'X'")

    monkeypatch.setattr("so8tqc.sources.inputs.pictures._loaded", fails)
    with pytest.raises(MissingToolError, match="operator nms does not exist") as raised:
        prepare(["builtin:images"], load_tokenizer(make_vision_model("qwen2_vl")), None)
    assert "torchvision" in str(raised.value.remedy)


def test_pictures_are_not_streamed(make_vision_model: Maker, tmp_path: Path) -> None:
    """--stream is refused with the way out, before a layer is read."""
    model = make_vision_model("qwen2_vl")
    (text,) = prepare(["builtin:images"], load_tokenizer(model), None, images=1).texts
    streamed = StreamedModel.open(model, tmp_path / "layers")
    with pytest.raises(DataError, match="not run a layer at a time") as raised:
        streamed.run([text])
    assert streamed.bytes_read == 0
    assert "--no-stream" in str(raised.value.remedy)


def test_the_models_own_sign_in_a_text_is_refused(
    make_vision_model: Maker, picture: Path, tmp_path: Path
) -> None:
    data = rows(tmp_path / "d.jsonl", {"image": picture.name, "text": "a <|image_pad|> b"})
    with pytest.raises(DataError, match="own sign for a picture"):
        prepared(make_vision_model("qwen2_vl"), data)


# logits


@pytest.mark.parametrize("kind", SHOWN)
def test_hidden_states_give_the_logits_of_the_models_own_forward(
    kind: str, make_vision_model: Maker
) -> None:
    model = HFModel.load(make_vision_model(kind), dtype="float32")
    (text,) = prepare(["builtin:images"], load_tokenizer(model.path), None, images=1).texts
    found = torch.cat(list(HFSource(model, "x").logits(text.tokens, 64)))
    images = images_of(text.tokens)
    assert images is not None
    inputs = {k: v for k, v in images.inputs.items() if k != "attention_mask"}
    ids = torch.from_numpy(np.asarray(text.tokens))[None]
    with torch.inference_mode():
        expected = model.module(input_ids=ids, **inputs).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    blind = torch.cat(list(HFSource(model, "x").logits(np.asarray(text.tokens)[:3], 64)))
    torch.testing.assert_close(found[:3], blind, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SHOWN)
def test_what_the_text_model_is_given_is_what_it_computes_with(
    kind: str, make_vision_model: Maker
) -> None:
    """The embeddings in the place of ids give the logits that the pixels give."""
    model = HFModel.load(make_vision_model(kind), dtype="float32")
    texts = prepare(["builtin:images"], load_tokenizer(model.path), None, images=1).texts
    (text,) = with_embedded(texts, [HFSource(model, "x")], lambda: model, files_follow=True)
    images = images_of(text.tokens)
    assert images is not None
    assert images.embedded is not None
    width = model.config.hidden_size
    assert images.embedded.rows.shape[0] == images.mask.sum()
    assert images.embedded.rows.shape[1] % width == 0
    assert images.embedded.both_ways == (kind == "gemma3")
    assert (images.embedded.positions is not None) == kind.startswith("qwen")
    table = model.module.get_input_embeddings().weight
    sign = torch.from_numpy(np.asarray(text.tokens))[torch.from_numpy(images.mask)][0]
    assert not np.allclose(images.embedded.rows[0, :width], table[sign].detach().numpy())


def test_ids_of_pictures_without_pictures_are_refused(make_vision_model: Maker) -> None:
    model = HFModel.load(make_vision_model("qwen2_vl"))
    (text,) = prepare(["builtin:images"], load_tokenizer(model.path), None, images=1).texts
    with pytest.raises(DataError, match="no picture is there"):
        model.hidden(np.asarray(text.tokens).copy())


@pytest.mark.parametrize("count", [3, 5])
def test_a_position_too_few_or_too_many_is_found_and_named(
    make_vision_model: Maker, tmp_path: Path, count: int
) -> None:
    """The processor's merge size is another than the model's: another count of positions."""
    model = tmp_path / "model"
    shutil.copytree(make_vision_model("gemma3"), model)
    for name in ("processor_config.json", "preprocessor_config.json"):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**content, "image_seq_length": count}))
    texts = prepare(["builtin:images"], load_tokenizer(model), None, images=1).texts
    with pytest.raises(DataError, match=rf"1 picture\(s\) at {count} positions") as raised:
        HFModel.load(model).hidden(texts[0].tokens)
    assert "how many positions a picture takes" in str(raised.value.remedy)


def test_scored_positions_are_neither_pictures_nor_before_them(make_vision_model: Maker) -> None:
    tokenizer = load_tokenizer(make_vision_model("qwen2_vl"))
    (text,) = prepare(["builtin:images"], tokenizer, None, images=1).texts
    images = images_of(text.tokens)
    assert images is not None
    ((start, stop),) = images.spans()
    scored = text.scored.tolist()
    assert scored == [*range(start - 1), *range(stop, text.tokens.size - 1)]


def test_gates_act_on_pictures(make_vision_model: Maker, make_gates: Callable[..., Path]) -> None:
    """The projection's input at pictures' positions is turned as at all others."""
    from so8tqc.rotations.read import read_rotations

    base = make_vision_model("qwen2_vl")
    model, rotations = HFModel.load(base, dtype="float32"), read_rotations(make_gates(base))
    (text,) = prepare(["builtin:images"], load_tokenizer(base), None, images=1).texts
    images = images_of(text.tokens)
    assert images is not None
    with gated(model, rotations):
        turned = model.hidden(text.tokens)
    plain = model.hidden(text.tokens)
    assert bool((turned - plain).abs().amax(dim=1)[torch.from_numpy(images.mask)].min() > 1e-3)


# the command line


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"image": "nowhere.png", "text": "x"}, "nowhere.png"),
        ({"image": "bad.png", "text": "x"}, "cannot be read"),
        ({"image": "noise.png", "text": f"{MARKER} and {MARKER}"}, "2 markers"),
        ({"image": "https://example.org/a.png", "text": "x"}, "nothing is fetched"),
    ],
)
def test_bad_input_ends_with_3_and_names_the_row(
    item: dict[str, Any],
    words: str,
    make_vision_model: Maker,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    data = rows(tmp_path / "d.jsonl", {"text": "fine, and long enough"}, item)
    model = str(make_vision_model("qwen2_vl"))
    out = str(tmp_path / "x.safetensors")
    assert run(["capture", model, "--data", str(data), "--out", out, "--quiet"]) == 3
    said = capsys.readouterr().err
    assert words in " ".join(said.split())
    assert "d.jsonl:2" in said
    assert "Traceback" not in said


def test_so8tqc_errors_are_what_is_raised(tmp_path: Path) -> None:
    with pytest.raises(So8tqcError):
        open_picture(str(tmp_path), "d.jsonl:1")
