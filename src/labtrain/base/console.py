r"""Print untrusted text safely: an untrusted name, metric or error cannot control the terminal.

Invisible characters and those that act on the line are printed as Python escapes: ``\x1b``, ``\u202e``. They are, by
Unicode's general category, controls, formats (zero width, bidi overrides), line separators, lone surrogates, private
and unassigned characters; also Default_Ignorable_Code_Point and blank characters. Ordinary text is unchanged: accents,
CJK, emoji, and the joiner and the variation selector (U+FE0F) within an emoji.
Trojan Source, https://trojansource.codes; UAX #9; https://www.unicode.org/reports/tr44/, tr51/.
"""

import os
import re
import secrets
import shlex
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

# The emoji of the Basic Multilingual Plane, and the pictograph blocks, of which this Python may not know new ones.
_EMOJI = (
    "\xa9\xae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u23cf\u23e9-\u23fa\u24c2\u25aa\u25ab"
    "\u25b6\u25c0\u25fb-\u25fe\u2600-\u27bf\u2934\u2935\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299"
    "\U0001f000-\U0001faff"
)
# What to check: a part of an emoji (the group, unchanged), or a character outside ASCII.
_NO_ASCII = re.compile(f"([{_EMOJI}]\ufe0f?(?:\u200d(?=[{_EMOJI}]))?|[0-9#*]\ufe0f\u20e3)|[^ -~]")
# Invisible letters and marks: fillers, variation selectors, blanks in Braille, music and hieroglyphs.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U00013441\U00013442\U00016fe4\U0001d159"
    "\U000e0100-\U000e01ef]"
)
# Marks labtrain's own control sequences with a random word that no file can contain.
_OWN = secrets.token_hex(16)


def visible(text: object) -> str:
    """Escape invisible characters, except line ends and tabs."""
    return _shown(str(text), but="\t\n")


def one_line(text: object) -> str:
    r"""Return text as part of one line: a line end becomes ``\n``."""
    return _shown(str(text), but="")


def _shown(text: str, *, but: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return _NO_ASCII.sub(lambda found: found[0] if found[1] or found[0] in but else _seen(found[0]), text)


def _seen(character: str) -> str:
    """Return a character, or its escape. Python's isprintable() excludes categories C and Z; Zs are spaces."""
    printable = character.isprintable() or unicodedata.category(character) == "Zs"
    return character if printable and not _BLANK.match(character) else character.encode("unicode_escape").decode()


def message(text: object) -> str:
    """Indent all lines except the first, so that none of them looks like labtrain's own line."""
    return re.sub(r"\n(?=\S)", "\n  ", visible(text))


def quoted(word: object) -> str:
    """Quote a path or another word for a shell: always one word, and never an option."""
    text = str(word)
    if text.startswith("-"):
        text = f"./{text}"
    if one_line(text) == text:
        return shlex.quote(text)
    # bash, zsh, ksh and POSIX 2024; by bytes, to support names that are not UTF-8
    parts = (
        "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))
        if one_line(letter) != letter
        else f"\\{letter}"
        if letter in "\\'"
        else letter
        for letter in text
    )
    return f"$'{''.join(parts)}'"


def say(text: object, *, err: bool = False) -> None:
    """Print one line to standard output, or to standard error."""
    print(one_line(text), file=sys.stderr if err else sys.stdout, flush=True)


def warn(text: object) -> None:
    """Print a warning to standard error, in one line."""
    sys.stderr.write(f"warning: {one_line(text)}\n")


def own(control: str) -> str:
    """Return one of labtrain's control sequences, which `guarded` passes to a terminal only.

    Args:
        control: what follows the escape character: "[2K" erases a line, "[G" moves to its beginning (ECMA-48).
    """
    return f"{_OWN}{control}{_OWN}"


def styled(text: str, style: str) -> str:
    """Style text: "1" for bold, "32" for green."""
    return text if os.environ.get("NO_COLOR") else f"{own(f'[{style}m')}{text}{own('[0m')}"


@contextmanager
def guarded() -> Iterator[None]:
    """Apply `visible` to everything written to standard output and error."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(object, _Guard(before[0])), cast(object, _Guard(before[1]))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Guard:
    """A text stream around another one. It has no `buffer`, which would bypass it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str | bytes) -> int:
        text = text.decode() if isinstance(text, bytes) else text  # click writes what completes a word as bytes
        pieces = text.split(_OWN)  # every second piece is labtrain's own
        terminal = self._stream.isatty()
        shown = "".join(
            visible(piece) if number % 2 == 0 else f"\x1b{piece}" if terminal else ""
            for number, piece in enumerate(pieces)
        )
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)


def shown(path: str | Path) -> str:
    """Return a path as the user would type it: relative if it is below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def few(names: list[str], most: int = 8) -> str:
    """Join names in a line; if there are many, the first ones and the number of the rest."""
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")


def full_name(kind: type | Callable[..., object]) -> str:
    """Return the name of a type or a function, with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"
