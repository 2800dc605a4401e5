"""Prose comes out of the formats; code, tables and navigation do not."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from so8tqc.corpus.manifest import Part
from so8tqc.corpus.readers import documents
from so8tqc.errors import DataError


def read(reader: str, content: str | bytes, *keys: str) -> list[tuple[Any, ...]]:
    part = Part(reader=reader, files=("*",), language="en", domain="language", keys=keys)
    data = content.encode() if isinstance(content, str) else content
    return [(d.name, d.tags, d.sections) for d in documents(part, data, "file")]


def test_html() -> None:
    page = """<html><head><title>No</title><style>p{}</style></head><body>
    <nav><p>no</p></nav><span class="path"><a>Manual</a> > Algebra</span>
    <h1>Title</h1><p>First &amp; <b>bold</b>
    words.</p><pre>no()</pre><ul><li>An item.<li>Another.</ul>
    <h3>Small</h3><p>Goes on.<br>Line.</p><table><tr><td>no<table></table></td></tr></table>
    <h2>Next</h2><div>日本語
    の文。</div></body></html>"""
    assert read("html", page) == [
        (
            "",
            ("Manual > Algebra",),
            (
                ("First & bold words.", "An item.", "Another.", "Goes on.", "Line."),
                ("日本語の文。",),
            ),
        )
    ]


def test_markdown() -> None:
    text = """---
title: no
---
# Heading

A [link](address) and **bold**
words with {蜘蛛|くも}.

```python
no = 1

no = 2
```

| no | no |

- An item

<!-- no

no -->
## Next
Text[＊註<b>1</b>](note){.n} goes on.

[＊註<b>1</b>](back)　no
"""
    ((_, _, sections),) = read("markdown", text)
    assert sections == (
        ("A link and bold words with 蜘蛛.", "An item"),
        ("Text goes on.",),
    )


def test_lyx_leaves_out_paragraphs_with_holes() -> None:
    text = r"""\begin_layout Section
No
\end_layout

\begin_layout Standard
One line
 goes on, and \SpecialChar LyX
\emph on
 is
\emph default
 named.
\end_layout

\begin_layout Standard
A hole
\begin_inset Formula $x$
\end_inset
 here.
\end_layout

\begin_layout Standard
\begin_inset Index idx
status collapsed
\begin_layout Plain Layout
no
\end_layout
\end_inset
Indexed.
\end_layout

\begin_layout LyX-Code
no
\end_layout
"""
    ((_, _, sections),) = read("lyx", text)
    assert sections == (("One line goes on, and LyX is named.", "Indexed."),)


def test_records() -> None:
    text = "%%%%\nthe god\n\n一行目の\n二行目。\n\n次の段落。\n%%%%\nluascript\n\n{{ no }}\n%%%%\n"
    assert read("records", text) == [("the god", (), (("一行目の二行目。", "次の段落。"),))]


def catalogue(messages: dict[str, str]) -> bytes:
    """A gettext file, written from its specification."""
    pairs = sorted((k.encode(), v.encode()) for k, v in messages.items())
    head = 28
    start = head + 16 * len(pairs)
    table, texts = [b"", b""], b""
    for column in (0, 1):
        for pair in pairs:
            table[column] += struct.pack("<II", len(pair[column]), start + len(texts))
            texts += pair[column] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), head, head + 8 * len(pairs), 0, start)
    return header + table[0] + table[1] + texts


def test_catalog() -> None:
    content = catalogue(
        {"": "Content-Type: text/plain; charset=UTF-8\n", "b": "二\n\n三", "a": "一", "c": "%d 個"}
    )
    assert read("catalog", content) == [("1", ("a",), (("一",),)), ("2", ("b",), (("二", "三"),))]


def test_json() -> None:
    value = {"y": {"t": "B.", "k": "tag"}, "x": {"t": "A. ++ C.", "k": "tag"}, "z": 3}
    assert read("json-text", json.dumps(value), "*", "t:k") == [
        ("x", ("tag",), (("A.", "C."),)),
        ("y", ("tag",), (("B.",),)),
    ]
    assert read("json-text", json.dumps({"p": value}), "p", "x", "t")[0][2] == (("A.", "C."),)
    assert read("json-html", '{"a": {"h": "<p>A.</p>"}}', "*", "h") == [("a", (), (("A.",),))]
    assert read("json-text", json.dumps(value), "absent", "t") == []


def test_jsonl_takes_the_lines_whose_name_matches() -> None:
    lines = '{"id": "law-1", "t": "一。\\n二。"}\n{"id": "note-1", "t": "三。"}\n'
    assert read("jsonl", lines, "id", "t", "^law-") == [("law-1", (), (("一。", "二。"),))]


@pytest.mark.parametrize(
    ("reader", "content", "keys"),
    [
        ("json-text", b"{", ("*", "t")),
        ("html", b"\xff\xff", ()),
        ("catalog", b"nonsense", ()),
        ("jsonl", b'{"a": 1}', ("id", "t", "")),
    ],
)
def test_another_format_is_a_data_error(reader: str, content: bytes, keys: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="cannot read it"):
        read(reader, content, *keys)
