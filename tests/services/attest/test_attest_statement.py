"""A statement is read back as it was sealed; an edit is named by its part, a gap by its link."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from so8tqc.errors import InputError
from so8tqc.services.attest.statement import (
    Digest,
    Link,
    Resource,
    read_statement,
    require_chain,
    seal,
    write_statement,
)


def file(name: str, letter: str) -> Resource:
    return Resource(name=name, digest=Digest(sha256=letter * 64))


BAKE = Link(
    name="bake",
    kind="bake",
    inputs=(file("base", "a"), file("rotations", "b")),
    outputs=(file("baked/model.safetensors", "c"),),
    parameters={"site": "input"},
    verdict="pass",
)
EXPORT = Link(
    name="export",
    kind="export",
    inputs=BAKE.outputs,
    outputs=(file("x-F16.gguf", "d"),),
    parameters={},
    verdict="pass",
)
QUANTIZE = Link(
    name="quantize Q8_0",
    kind="quantize",
    inputs=(*EXPORT.outputs, file("imatrix", "e")),
    outputs=(file("x-Q8_0.gguf", "f"),),
    parameters={},
    verdict="fail",
)
LINKS = (BAKE, EXPORT, QUANTIZE)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "attestation.json"
    write_statement(path, seal(LINKS, (file("bake/record.json", "1"),), {"so8tqc": "0.1"}))
    return path


def test_it_is_read_back_and_names_what_ships(written: Path) -> None:
    found = read_statement(written)
    assert found.predicate.links == LINKS
    assert [one.name for one in found.subject] == [
        "baked/model.safetensors",
        "x-F16.gguf",
        "x-Q8_0.gguf",
    ]
    assert [one.name for one in found.outputs] == [one.name for one in found.subject]
    content = json.loads(written.read_text())
    assert content["_type"] == "https://in-toto.io/Statement/v1"
    assert content["predicateType"].startswith("urn:so8tqc:")


def edited(content: dict[str, Any], part: str) -> None:
    predicate = content["predicate"]
    match part:
        case "the link 'export'":
            predicate["links"][1]["parameters"]["type"] = "f32"
        case "the list of subjects":
            content["subject"][0]["digest"]["sha256"] = "0" * 64
        case "the records":
            predicate["records"][0]["name"] = "other"
        case _:
            predicate["versions"]["so8tqc"] = "9"


@pytest.mark.parametrize(
    "part", ["the link 'export'", "the list of subjects", "the records", "the versions"]
)
def test_an_edit_is_named_by_its_part(part: str, written: Path) -> None:
    content = json.loads(written.read_text())
    edited(content, part)
    written.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    with pytest.raises(InputError) as caught:
        read_statement(written)
    assert f"edited after it was written: {part} or its digest" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text + " ", "line"),
        (lambda text: text.replace("\n", "\r\n"), "line 1"),
        (lambda text: text.replace('"verdict": "fail"', '"verdict":  "fail"'), "edited"),
        (lambda text: text.replace("pass", "perhaps"), "not a statement of so8tqc"),
        (lambda text: text[: len(text) // 2], "no JSON"),
        (lambda text: "[]", "not an in-toto statement"),
        (lambda text: "\udcff" + text, "not UTF-8"),
    ],
)
def test_another_text_is_refused(change: Callable[[str], str], says: str, written: Path) -> None:
    text = change(written.read_text())
    written.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=says):
        read_statement(written)


@pytest.mark.parametrize(
    ("links", "says"),
    [
        ((EXPORT, BAKE, QUANTIZE), "no link before 'export' makes its input"),
        ((BAKE, QUANTIZE), "no link before 'quantize Q8_0' makes its input x-F16.gguf"),
        ((BAKE, BAKE), "two links have one name"),
        ((BAKE, BAKE.model_copy(update={"name": "again"})), "two links make baked/model"),
        ((BAKE.model_copy(update={"inputs": (file("base", "a"),)}),), "does not say its rotations"),
        ((BAKE.model_copy(update={"outputs": ()}),), "has no input or no output"),
        ((BAKE, EXPORT.model_copy(update={"inputs": (file("baked/model.safetensors", "9"),)})),
         "was made from another baked/model.safetensors"),
    ],
)  # fmt: skip
def test_a_broken_chain_is_not_sealed(links: tuple[Link, ...], says: str) -> None:
    with pytest.raises(InputError, match="the chain is broken") as caught:
        seal(links, (), {})
    assert says in str(caught.value)


def test_an_importance_matrix_may_be_left_out_and_may_come_from_anywhere() -> None:
    seal((BAKE, EXPORT, QUANTIZE.model_copy(update={"inputs": EXPORT.outputs})), (), {})


def test_a_subject_that_no_link_makes_breaks_the_chain(written: Path) -> None:
    found = read_statement(written)
    for subject, says in (
        ((*found.subject, file("stranger", "0")), "no link makes the subject stranger"),
        (found.subject[:-1], "x-Q8_0.gguf is made but is no subject"),
        ((*found.subject, found.subject[0]), "a file is a subject twice"),
        ((file("baked/model.safetensors", "0"), *found.subject[1:]), "is not the file that"),
    ):
        with pytest.raises(InputError) as caught:
            require_chain(found.model_copy(update={"subject": subject}))
        assert says in str(caught.value)
