"""What people rely on stays as it was recorded."""

import json

from tests.support.public import FILE, lines, surface


def test_names_commands_keys_and_receipt_are_as_recorded() -> None:
    """A public name, a command's option, a configuration key or a receipt's field changes on purpose only."""
    recorded, now = lines(json.loads(FILE.read_text())), lines(surface())
    lost, added = sorted(recorded - now), sorted(now - recorded)
    assert (lost, added) == ([], []), (
        "the public interface changed.\nlost:\n  {}\nadded:\n  {}\n"
        "hint: if that is on purpose, say so in CHANGELOG.md, then: make public".format(
            "\n  ".join(lost), "\n  ".join(added)
        )
    )
