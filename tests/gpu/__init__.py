"""The checks of `make test-gpu`: what has to be seen on a GPU, in under eight minutes. `python -m tests.gpu --list`."""
