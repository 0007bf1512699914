"""Text, JSON and XML in the encodings that tools write: round trips, and one line for everything else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from datamodules.text import load_json, read_lines, read_text, read_xml
from errors import DatasetError

WORDS = ["nut", "Schlüssel", "größe 7", "café", "名前", "a'b\"c", "[x]", "p000 (1)", "img.v2", "x\u2028y", "𝄞"]


def test_random_texts_in_random_encodings() -> None:
    """Seeded: what is written with a mark, or as UTF-8, is read back, whatever the line breaks are."""
    rng = random.Random(17)
    path = Path("list.txt")
    for _ in range(200):
        lines = [rng.choice(WORDS) for _ in range(rng.randrange(5))]
        text = rng.choice(["\n", "\r\n", "\r"]).join(lines)
        path.write_bytes(text.encode(rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-32"])))
        assert read_lines(str(path)) == (lines or [""])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_another_encoding_is_named_with_the_line() -> None:
    Path("a.txt").write_bytes("nut\nbolt\nschlüssel\n".encode("latin-1"))
    with pytest.raises(DatasetError) as error:
        read_text("a.txt")
    assert str(error.value) == "a.txt: expected UTF-8 text, found byte 0xfc in line 3; save it as UTF-8"
    assert read_lines("a.txt", file_names=True)[2] == "schl\udcfcssel"
    Path("a.txt").write_bytes("nut\nbolt".encode("utf-16-le"))  # without a mark
    with pytest.raises(DatasetError, match="^a.txt: expected UTF-8 text, found a zero byte in line 1; save it"):
        read_text("a.txt")
    Path("a.txt").write_bytes("nut".encode("utf-16")[:-1])
    with pytest.raises(DatasetError, match="^a.txt: expected UTF-16 text, found byte 0x74 in line 1"):
        read_text("a.txt")
    with pytest.raises(DatasetError, match="^none.txt: expected a text file, found No such file or directory$"):
        read_text("none.txt")


def test_json() -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        Path("a.json").write_bytes('{"é": [1]}'.encode(encoding))
        assert load_json("a.json", "numbers") == {"é": [1]}
    for content in (b"", b"{", b"[" * 100_000):
        Path("a.json").write_bytes(content)
        with pytest.raises(DatasetError, match="^a.json: expected numbers, found invalid JSON [^\n]*$"):
            load_json("a.json", "numbers")


@pytest.mark.parametrize(
    ("declared", "encoding", "name"),
    [
        ("GBK", "gbk", "螺母"),
        ("GB2312", "gb2312", "螺母"),
        ("Shift_JIS", "shift_jis", "ナット"),
        ("ISO-8859-1", "latin-1", "Schlüssel"),
        ("windows-1251", "cp1251", "гайка"),
        ("EUC-KR", "euc_kr", "너트"),
        ("UTF-8", "utf-8", "螺母"),
        ("utf-8", "utf-8-sig", "螺母"),
        ("utf-16", "utf-16", "螺母"),
        ("UTF-16", "utf-16-le", "螺母"),
        ("UTF-16", "utf-16-be", "螺母"),
        ("utf-16", "utf-8", "螺母"),  # .NET writes strings so: the declaration is wrong
        ("", "utf-8", "螺母"),
    ],
)
def test_xml_in_the_declared_encoding(declared: str, encoding: str, name: str) -> None:
    head = f'<?xml version="1.0" encoding="{declared}"?>\r\n' if declared else ""
    Path("a.xml").write_bytes(f"{head}<annotation><name>{name}</name></annotation>".encode(encoding))
    assert read_xml("a.xml", "annotation", "XML").findtext("name") == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'<?xml version="1.0" encoding="ANSI"?><annotation/>',
            "an encoding that Python knows, found ANSI; save",
        ),
        (b"<?xml version='1.0' encoding='hex'?><annotation/>", "an encoding that Python knows, found hex"),
        (b"<?xml version='1.0' encoding='\0'?><annotation/>", "an encoding that Python knows, found"),
        (b"<annotation>\n\xc2\xdd\xc4\xb8</annotation>", "UTF-8 text, found byte 0xc2 in line 2; save it as"),
        (b'<?xml version="1.0" encoding="ascii"?><annotation>\xe9', "ascii text, found byte 0xe9 in line 1"),
        (b"<annotations><image/></annotations>", "VOC with the root <annotation>, found the root <annotations>"),
        (
            b'<annotation xmlns="http://a.b"/>',
            r"VOC with the root <annotation>, found the root <\{http://a.b\}annotation>",
        ),
        (b"<annotation>", r"VOC, found invalid XML \((no element found|unclosed)"),
        (b"", r"VOC, found invalid XML \((no element found|unclosed)"),
    ],
)
def test_another_xml_is_refused_in_one_line(content: bytes, message: str) -> None:
    Path("a.xml").write_bytes(content)
    with pytest.raises(DatasetError, match=f"^a.xml: expected ({message})[^\n]*$"):
        read_xml("a.xml", "annotation", "VOC")
