r"""How text from outside is shown: a name, a metric or an error of somebody else's can redraw nothing on a terminal.

A character that is not seen or that acts on its line is shown as Python writes it: ``\x1b``, ``\u202e``. Which these
are, Unicode's general category says: controls, formats (zero width, bidi overrides), line separators, halves of a pair,
private and unassigned characters; beside them what Default_Ignorable_Code_Point lists, and what is blank. Ordinary text
stays as it is: accents, CJK, emoji, and the joiner and the variation selector (U+FE0F) within an emoji.
Trojan Source, https://trojansource.codes; UAX #9; https://www.unicode.org/reports/tr44/, tr51/.
"""

import os
import re
import secrets
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

# The emoji of the Basic Multilingual Plane, and the blocks of pictographs, whose new ones this Python may not know.
_EMOJI = (
    "\xa9\xae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u23cf\u23e9-\u23fa\u24c2\u25aa\u25ab"
    "\u25b6\u25c0\u25fb-\u25fe\u2600-\u27bf\u2934\u2935\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299"
    "\U0001f000-\U0001faff"
)
# What is to be looked at: a part of an emoji, which is the group and stays, or a character that is none of ASCII's.
_NO_ASCII = re.compile(f"([{_EMOJI}]\ufe0f?(?:\u200d(?=[{_EMOJI}]))?|[0-9#*]\ufe0f\u20e3)|[^ -~]")
# Letters and marks that are not seen: fillers, variation selectors, blanks of Braille's, music's and hieroglyphs'.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U00013441\U00013442\U00016fe4\U0001d159"
    "\U000e0100-\U000e01ef]"
)
# What labtrain itself sends to a terminal is marked by a word that no file can know.
_OWN = secrets.token_hex(16)


def visible(text: object) -> str:
    """Return text with what cannot be seen escaped, but for line ends and tabs."""
    return _shown(str(text), but="\t\n")


def one_line(text: object) -> str:
    r"""Return text as a part of one line: a line end in it is shown as ``\n``."""
    return _shown(str(text), but="")


def _shown(text: str, *, but: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return _NO_ASCII.sub(lambda found: found[0] if found[1] or found[0] in but else _seen(found[0]), text)


def _seen(character: str) -> str:
    """Return a character, or its escape. What Python calls not printable are the categories C and Z: Zs are spaces."""
    printable = character.isprintable() or unicodedata.category(character) == "Zs"
    return character if printable and not _BLANK.match(character) else character.encode("unicode_escape").decode()


def message(text: object) -> str:
    """Return text of several lines, all but the first indented: none of them passes for a line of labtrain's own."""
    return re.sub(r"\n(?=\S)", "\n  ", visible(text))


def quoted(word: object) -> str:
    """Return a path or another word as it is typed in a shell: one word, whatever it holds, and no option."""
    text = str(word)
    if text.startswith("-"):
        text = f"./{text}"
    if one_line(text) == text:
        return shlex.quote(text)
    # bash, zsh, ksh and POSIX 2024; by bytes, so that what is no UTF-8 is typed as well
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
    """Write one line to standard output, or to standard error."""
    print(one_line(text), file=sys.stderr if err else sys.stdout, flush=True)


def warn(text: object) -> None:
    """Write a warning to standard error, in one line."""
    sys.stderr.write(f"warning: {one_line(text)}\n")


def own(control: str) -> str:
    """Return a control sequence of labtrain's own, which `guarded` lets through to a terminal and to nothing else.

    Args:
        control: what follows the escape character: "[2K" erases a line, "[G" goes to its beginning (ECMA-48).
    """
    return f"{_OWN}{control}{_OWN}"


def styled(text: str, style: str) -> str:
    """Return text in a style of labtrain's own: "1" for bold, "32" for green."""
    return text if os.environ.get("NO_COLOR") else f"{own(f'[{style}m')}{text}{own('[0m')}"


@contextmanager
def guarded() -> Iterator[None]:
    """Have standard output and error show everything that is written to them as `visible` does."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(object, _Guard(before[0])), cast(object, _Guard(before[1]))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Guard:
    """A text stream that writes to another one. Its bytes are not to be had: that would be a way around it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        pieces = text.split(_OWN)  # every second one is labtrain's own
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
    """Return a path as a person would type it here: relative where it lies below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
