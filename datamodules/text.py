"""Read text, JSON and XML files in the encodings that tools write, or raise one line that names the file.

Windows' editors begin a UTF-8 or UTF-16 file with a byte order mark, which selects the encoding here and is removed.
XML files may declare any encoding that Python knows.
"""

from __future__ import annotations

import codecs
import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

from errors import DatasetError

# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_DECLARATION = re.compile(rb"""\s*<\?xml\s[^>]*?encoding\s*=\s*["']([^"']*)["']""")


def read_text(path: str, file_names: bool = False) -> str:
    """Read a text file: UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Args:
        path: the file.
        file_names: the text contains file names, which may have bytes that are not UTF-8. They are read as
            ``os.listdir`` returns them, with surrogates.

    Raises:
        DatasetError: the file cannot be read, or has another encoding; the message names the line.
    """
    return _decode(path, _read_bytes(path, "a text file"), "surrogateescape" if file_names else "strict")


def read_lines(path: str, file_names: bool = False) -> list[str]:
    """Read the lines of a text file, without line breaks; see `read_text`.

    Only ``\\n``, ``\\r\\n`` and ``\\r`` are line breaks: ``str.splitlines`` would also split at other characters, which
    file names may contain.
    """
    return read_text(path, file_names).replace("\r\n", "\n").replace("\r", "\n").split("\n")


def load_json(path: str, expected: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        expected: description of its content, for the error message.

    Raises:
        DatasetError: see `read_text`; also for invalid JSON.
    """
    text = _decode(path, _read_bytes(path, expected))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: expected {expected}, found invalid JSON ({error})") from None


def read_xml(path: str, root_tag: str, expected: str) -> ElementTree.Element:
    """Read an XML file in the encoding that it declares.

    The bytes are decoded here, because the parser does not know GBK, Shift-JIS and other multi-byte encodings.

    Args:
        path: the file.
        root_tag: expected tag of the root element, without a namespace.
        expected: description of the file, for the error message.

    Returns:
        The root element.

    Raises:
        DatasetError: the file cannot be read, its encoding is unknown or another one than declared, it is not XML, or
            its root element is another one.
    """
    data = _read_bytes(path, expected)
    declared = _DECLARATION.match(data.removeprefix(codecs.BOM_UTF8))
    text = _decode(path, data, declared=declared[1].decode("ascii", "replace") if declared else "")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DatasetError(f"{path}: expected {expected}, found invalid XML ({error})") from None
    if root.tag != root_tag:
        raise DatasetError(f"{path}: expected {expected} with the root <{root_tag}>, found the root <{root.tag}>")
    return root


def marked_encoding(data: bytes) -> str:
    """Return UTF-16 or UTF-32 if a file begins with its byte order mark, else an empty string."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), "")


def _read_bytes(path: str, expected: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DatasetError(f"{path}: expected {expected}, found {error.strerror or error}") from None


def _decode(path: str, data: bytes, errors: str = "strict", declared: str = "") -> str:
    """Decode a file. A byte order mark comes before the declared encoding, and this before UTF-8."""
    encoding = marked_encoding(data)
    if not encoding and data[:4] in (b"<\0?\0", b"\0<\0?"):  # XML in UTF-16 without a mark
        encoding = "UTF-16-LE" if data[0] else "UTF-16-BE"
    # A declaration that can be read byte by byte is not in UTF-16 or UTF-32, whatever it says.
    if not encoding and not data.startswith(codecs.BOM_UTF8) and not re.match("utf-?(16|32)", declared, re.IGNORECASE):
        encoding = declared
    known = encoding or "UTF-8"
    try:
        text = data.decode(encoding, "strict") if encoding else data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} in line {line}"
        raise DatasetError(f"{path}: expected {known} text, found {found}; save it as UTF-8") from None
    except (LookupError, ValueError):  # no such encoding, or one of Python's codecs that are not for text
        raise DatasetError(f"{path}: expected an encoding that Python knows, found {known}; save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DatasetError(f"{path}: expected {known} text, found a zero byte in line {line}; save it as UTF-8")
    return text
