from labtrain.base.errors import ConfigError, DamagedError, DeviceError, LabtrainError, NotThereYetError


def test_an_error_shows_what_and_then_a_hint() -> None:
    assert (
        str(LabtrainError("seed=x: a number is wanted", hint="seed=1")) == "seed=x: a number is wanted\n\nhint: seed=1"
    )


def test_each_error_for_people_ends_with_exit_code_two() -> None:
    assert {
        kind("x").exit_code for kind in (LabtrainError, ConfigError, DeviceError, DamagedError, NotThereYetError)
    } == {2}
