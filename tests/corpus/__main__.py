"""Train programs of the corpus: see tests/support/corpus.py for the commands."""

from tests.support.corpus import main

main()
