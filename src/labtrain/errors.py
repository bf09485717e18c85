"""The errors a person is meant to read.

::

    LabtrainError            what is wrong, what was found, what is wanted; `hint` is what to type next
    ├── ConfigError          a key, a value or an override
    ├── DeviceError          devices, precision or memory that this machine does not have
    ├── DamagedError         a receipt, checkpoint or lock that is not what it should be
    ├── StoreError           a place for checkpoints that cannot be reached, is full, or refuses
    ├── LostError             the other processes of a training are gone
    └── NotThereYetError     part of the design that this version does not have

Each ends a command with exit code 2. Anything else that is raised is a defect, or a person's own exception, and keeps
its traceback.
"""

EXIT_USAGE = 2
EXIT_STOPPED = 75  # a signal came, and the training was saved: EX_TEMPFAIL of sysexits.h


class LabtrainError(Exception):
    """An error that names its cause and, in `hint`, the command that helps."""

    exit_code = EXIT_USAGE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.args[0]}\n\nhint: {self.hint}" if self.hint else str(self.args[0])


class ConfigError(LabtrainError):
    """A configuration key, group, value or override that cannot be used."""


class DeviceError(LabtrainError):
    """More devices, memory or precision than the machine has."""


class DamagedError(LabtrainError):
    """A file of labtrain's that is broken, incomplete, or of an unknown version."""


class StoreError(LabtrainError):
    """A place for checkpoints that cannot be reached, is full, or refuses."""


class LostError(LabtrainError):
    """The other processes of a training are gone, and this one does not know why."""


class NotThereYetError(LabtrainError):
    """Something the design names and this version does not do."""

    def __init__(self, what: str, *, hint: str = "see CHANGELOG.md for what this version has") -> None:
        super().__init__(f"{what}: not there yet", hint=hint)


class JobFailedError(LabtrainError):
    """A job of a sweep ended badly; it has printed why itself."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.args = (message, exit_code)  # pickled so: it may come from another machine
        self.exit_code = exit_code
