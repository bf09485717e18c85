"""The first lines of a start, before the imports that take time: what Ctrl-C does until the training handles it."""

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 5 ms in which Ctrl-C prints a traceback
import sys


def main(config_path: str = "conf", config_name: str = "config") -> None:
    """Compose the configuration and run it. This is the only call that a `train.py` needs.

    Args:
        config_path: the folder of the experiment's configuration, relative to the calling file.
        config_name: its primary file, without `.yaml`.

    It ends the process with exit code 0 (trained, or already complete), 2 (wrong usage), or the training's exit code.
    """
    if _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:  # a shell's for what it starts in the background
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # ends the process without a traceback
    from labtrain.launch.compose import start

    start(sys._getframe(1).f_globals["__file__"], config_path, config_name)
