"""What comes from outside is shown so that it cannot pass for something else, and typed so that it is one word."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner

from labtrain.base.console import guarded, message, one_line, own, quoted, styled, visible
from labtrain.base.errors import DamagedError
from labtrain.cli import main
from labtrain.record import receipt
from tests.conftest import ROOT, changed

FORGED = "no\x1b[2K\ryes          the same bits\u202e\u2066\x9b31m\x7f\u200b\u2028"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2K\r", r"\x1b[2K\r"),
        ("\x00\x07\x08\x0b\x7f\x9b", r"\x00\x07\x08\x0b\x7f\x9b"),
        ("\u202e\u2066\u200b\u2028\ufeff\xad\u061c", r"\u202e\u2066\u200b\u2028\ufeff\xad\u061c"),
        ("\U000e0041\udcff\ud800\u115f", r"\U000e0041\udcff\ud800\u115f"),
        ("a\u200db", r"a\u200db"),
        ("a\ufe0f\ufe00\ufe0e", r"a\ufe0f\ufe00\ufe0e"),
        ("\u2764\ufe0f\ufe0f", "\u2764\ufe0f" + r"\ufe0f"),
        ("\u180b\u180d\u180f\ufff0\ufff8", r"\u180b\u180d\u180f\ufff0\ufff8"),
        ("\U0001bca0\U0001bca3\U0001d173\U0001d17a", r"\U0001bca0\U0001bca3\U0001d173\U0001d17a"),
        ("a\u2800b\U0001d159", r"a\u2800b\U0001d159"),
        ("a\ufe0f\u200d\ufe0f", r"a\ufe0f\u200d\ufe0f"),
        ("\u2764\ufe0f\u200d\ufe0f\u200d", "\u2764\ufe0f" + r"\u200d\ufe0f\u200d"),
        ("\u2200\ufe0f\u251c\ufe0f1\ufe0f", "\u2200" + r"\ufe0f" + "\u251c" + r"\ufe0f1\ufe0f"),
        ("\U00013430\U00016fe4\U00013441\U000e0100", r"\U00013430\U00016fe4\U00013441\U000e0100"),
        ("\ufffe\U0001fffe\ufdd0\u2065\u0378", r"\ufffe\U0001fffe\ufdd0\u2065\u0378"),
        ("\ue000\U000f0000", r"\ue000\U000f0000"),
    ],
)
def test_what_is_not_seen_is_escaped(text: str, shown: str) -> None:
    assert visible(text) == one_line(text) == shown


@pytest.mark.parametrize("text", ["caf\u00e9, na\u00efve", "\u6f22\u5b57\u3000\ud55c\uad6d\uc5b4", "1\ufe0f\u20e3 \u2600\ufe0f \xa9\ufe0f \u2194\ufe0f \U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f469\U0001f3fd\u200d\U0001f680 \u2764\ufe0f\u200d\U0001f525 \U0001f426\u200d\u2b1b \U0001f6d8 \u23cf\ufe0f", "a\xa0b \u2003 \u20ac \u2211 e\u0301", "\u0639\u0631\u0628\u064a \u05e2\u05d1\u05e8\u05d9\u05ea"])  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    assert visible(text) == one_line(text) == text


def test_what_python_says_is_not_seen_is_escaped() -> None:
    """Each character of the categories C (other), Zl and Zp, but for line ends, tabs and the pictographs to come."""
    unseen = {
        chr(each)
        for each in range(sys.maxunicode + 1)
        if unicodedata.category(chr(each)) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
    }
    unseen -= {chr(each) for each in range(0x1F000, 0x1FB00)}
    assert {each for each in unseen if one_line(each) == each} == set()
    assert {each for each in unseen if visible(each) == each} == {"\t", "\n"}


def test_a_line_end_in_a_name_makes_no_line() -> None:
    assert one_line("a\nyes\t1") == r"a\nyes\t1"
    assert visible("a\nb\tc") == "a\nb\tc"
    assert message("a\nhint: rm -rf ~\n  b") == "a\n  hint: rm -rf ~\n  b"
    error = DamagedError("x\nhint: rm -rf ~", hint="ls a\nrm -rf ~\x1b[8m")
    assert str(error) == "x\n  hint: rm -rf ~\n\nhint: ls a\\nrm -rf ~\\x1b[8m"


@pytest.mark.parametrize("name", ["a b", "foo; touch pwned", "$(touch pwned)", "`touch pwned`", "'; touch pwned; '", "-rf",
                                  "a\nb", "\x1b[2Kx\\'\"1", "caf\udce9", "~", "&& touch pwned", "\u202ea"])  # fmt: skip
def test_a_name_in_a_hint_is_one_word(name: str, tmp_path: Path) -> None:
    """A shell that is given it has exactly that file, and does nothing else."""
    (tmp_path / name).write_bytes(b"x")
    typed = f"{sys.executable} -c 'import os, sys; print(sys.argv[1:] and [os.fsencode(x) for x in sys.argv[1:]])' "
    done = subprocess.run(
        ["bash", "-c", typed + quoted(name)],
        cwd=tmp_path, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.stdout.strip().removeprefix("[b'./").removeprefix("[") in (
        repr(os.fsencode(name)) + "]", repr(os.fsencode(name))[2:] + "]"
    )  # fmt: skip
    assert one_line(quoted(name)) == quoted(name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_labtrains_own_styles_reach_a_terminal_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Nothing that a file holds passes for one: the mark is drawn anew in each process."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with guarded():
        sys.stdout.write(f"{styled('ok', '32')}{own('[G')} \x1b[32mok\n")
    assert capsys.readouterr().out == "\x1b[32mok\x1b[0m\x1b[G \\x1b[32mok\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    with guarded():
        sys.stdout.write(f"{styled('ok', '32')}\n")
    assert capsys.readouterr().out == "ok\n"


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    """As a terminal of LC_ALL=C is told of: no traceback."""
    code = "import labtrain.base.console as c\nwith c.guarded(): print('caf\\u00e9')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.stdout == b"caf\\xe9\n"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, whose folders and metrics have hostile names."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b\nyes  verified\x1b[8m"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "receipt.json").write_bytes((ROOT / "tests" / "golden" / "receipt.json").read_bytes())
        changed(folder, "results/metrics", {f"test/{FORGED}": 1.0, "test/b\nyes": 2.0})
    return tmp_path / "runs"


def test_no_command_prints_what_redraws_a_terminal(runs: Path) -> None:
    """Tables, sentences, JSON, errors and warnings."""
    broken = runs / "c\x1b[2J\nyes"
    broken.mkdir()
    (broken / receipt.FILE).write_text('{"schema": "\\u001b[2J\\nyes"}')
    odd = sorted(str(path) for path in runs.iterdir())
    for command in (["ls"], ["ls", "--json"], ["diff", *odd[:2]], ["diff", *odd[:2], "--json"], ["diff", odd[0], odd[2]],
                    ["digest", odd[1]], ["report", odd[2]], ["verify", odd[2]], ["store", "ls", odd[2]], ["\x1b[2J"],
                    ["store", "check", "nothing\x1b[2J\nyes"], ["ls", "x\x1b[2J"]):  # fmt: skip
        done = CliRunner().invoke(main, command)
        assert done.exception is None or isinstance(done.exception, SystemExit), (command, done.exception)
        assert visible(done.output) == done.output
        assert not [line for line in done.output.splitlines() if line.startswith("yes")], (command, done.output)
    found = json.loads(CliRunner().invoke(main, ["ls", "--json"]).stdout)
    assert {row["metric"] for row in found if row["metric"]} <= {f"test/{FORGED}", "test/b\nyes"}


def test_a_broken_receipt_is_a_line_of_warning(runs: Path) -> None:
    """`ls` lists the others: one that is no JSON, one that is a pipe, one that is a folder, one of the wrong shapes."""
    for name in ("json", "pipe", "folder", "shapes", "deep"):
        (runs / name).mkdir()
    (runs / "json" / receipt.FILE).write_text("{")
    os.mkfifo(runs / "pipe" / receipt.FILE)
    (runs / "folder" / receipt.FILE).mkdir()
    (runs / "shapes" / receipt.FILE).write_bytes((runs / "a" / receipt.FILE).read_bytes())
    changed(runs / "shapes", "segments", [])
    (runs / "deep" / receipt.FILE).write_text("[" * 100_000)
    done = CliRunner().invoke(main, ["ls"])
    assert done.exit_code == 0
    assert sorted(line.split()[0] for line in done.stdout.splitlines() if "broken" in line) == [
        f"runs/{name}" for name in ("deep", "json", "pipe", "shapes")
    ]
    assert done.stderr.count("warning: ") == 4
    assert "runs/a " in done.stdout
