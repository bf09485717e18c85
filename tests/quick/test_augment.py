import functools
import hashlib
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch

import labtrain
from labtrain.augment import Crop, Flip, Mixup, Noise, Scale, Shift, apply
from labtrain.base.errors import ConfigError
from labtrain.data import draws as draws_module
from labtrain.data.draws import QUANTILES, Draws
from labtrain.data.transforms import described, with_partners
from labtrain.exact.determinism import derive_seed
from labtrain.record.digests import digest_tree

# https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64: the first outputs of two seeds.
PUBLISHED = {
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821],
    0: [16294208416658607535, 7960286522194355700, 487617019471545679, 17909611376780542444, 1961750202426094747],
}


def splitmix(seed: int, number: int) -> int:
    """Return SplitMix64's output of a number, counted from 0, in Python's integers."""
    mask = (1 << 64) - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def unsigned(values: torch.Tensor) -> list[int]:
    return [value % (1 << 64) for value in values.flatten().tolist()]


def draws(size: int = 64, seed: int = 7, epoch: int = 3) -> Draws:
    return Draws(seed, epoch, torch.arange(1000, 1000 + size))


@pytest.mark.parametrize("seed", PUBLISHED)
def test_the_generator_gives_the_published_numbers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws_module, "derive_seed", lambda *_: seed)
    assert unsigned(Draws(0, 0, torch.arange(5)).bits("any")) == PUBLISHED[seed]
    assert [splitmix(seed, number) for number in range(5)] == PUBLISHED[seed]


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_each_number_is_that_of_python(shape: tuple[int, ...]) -> None:
    """Of indices up to 2^60, in any order."""
    indices, lanes = [5, 0, 2**60 - 1, 123456789, 10**9], math.prod(shape)
    key = derive_seed(7, "augment", 3, 0, "name")
    found = Draws(7, 3, torch.tensor(indices), place=(0,))
    bits = [splitmix(key, (index * lanes + lane)) for index in indices for lane in range(lanes)]
    assert found.bits("name", *shape).shape == (5, *shape)
    assert unsigned(found.bits("name", *shape)) == bits
    assert found.integers("name", -3, 10**9, *shape).flatten().tolist() == [
        -3 + (number & (2**63 - 1)) % (10**9 + 3) for number in bits
    ]
    assert found.uniform("name", *shape).flatten().tolist() == [(number >> 40) / 2**24 for number in bits]


def test_names_places_epochs_and_seeds_draw_apart() -> None:
    made = [draws(), draws().within(0), draws().within(1), draws(epoch=4), draws(seed=8)]
    found = [digest_tree(each.bits(name)) for each in made for name in ("a", "b")]
    assert len(set(found)) == len(found)
    assert digest_tree(draws().bits("a")) == found[0]


def test_integers_are_uniform_and_neighbours_independent() -> None:
    """Chi-square of 200,000 draws, and of pairs of neighbouring samples, lanes and epochs, within 4 deviations."""
    indices = torch.arange(50_000)
    here, next_epoch = (Draws(1, epoch, indices).integers("x", 0, 16, 4) for epoch in (0, 1))
    counts = {
        "single": torch.bincount(here.flatten(), minlength=16),
        "samples": torch.bincount((here[1:] * 16 + here[:-1]).flatten(), minlength=256),
        "lanes": torch.bincount((here[:, 1:] * 16 + here[:, :-1]).flatten(), minlength=256),
        "epochs": torch.bincount((here * 16 + next_epoch).flatten(), minlength=256),
    }
    for name, count in counts.items():
        expected, freedom = count.sum() / len(count), len(count) - 1
        square = float(((count - expected) ** 2 / expected).sum())
        assert abs(square - freedom) < 4 * math.sqrt(2 * freedom), name


def test_normal_numbers_are_quantiles_and_their_moments_hold() -> None:
    table = draws_module._normal(torch.device("cpu"))
    assert table[-1].item() == np.float32(statistics.NormalDist().inv_cdf(1 - 0.5 / QUANTILES))
    assert digest_tree(table.flip(0)) == digest_tree(-table)
    found = Draws(1, 0, torch.arange(20_000)).normal("x", 5)
    words = [splitmix(derive_seed(1, "augment", 0, "x"), word) for word in range(4)]  # two of each sample
    places = [
        [(word >> 16 * part) % (1 << 16) for word in pair for part in range(4)][:5] for pair in (words[:2], words[2:])
    ]
    signed = [[(place + QUANTILES // 2) % QUANTILES for place in row] for row in places]
    assert found[:2].tolist() == [[table[place].item() for place in row] for row in signed]
    assert abs(found.mean()) < 4 / math.sqrt(100_000)
    assert abs(found.var() - 1) < 4 * math.sqrt(2 / 100_000)
    assert abs((found[:, 1:] * found[:, :-1]).mean()) < 4 / math.sqrt(80_000)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0, 200.0])
def test_beta_numbers_are_quantiles(alpha: float) -> None:
    """Those of scipy, to the 2^-20 that they are rounded to."""
    from scipy.stats import beta

    table = draws_module._beta(alpha, torch.device("cpu")).double().numpy()
    wanted = beta.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES, alpha, alpha)
    assert np.abs(table - wanted).max() < 2**-20


def test_the_tables_are_the_same_on_every_machine() -> None:
    """They are made with logarithms and powers, whose last bits differ, and rounded."""
    cpu = torch.device("cpu")
    tables = [draws_module._normal(cpu), draws_module._beta(0.4, cpu), draws_module._beta(2.0, cpu)]
    sums = [hashlib.sha256(table.numpy().tobytes()).hexdigest()[:12] for table in tables]
    assert sums == ["1cfbba1e07e3", "2eb6c701453a", "3712e4bd17ab"]


# ---------------------------------------------------------------------------------------------------------- transforms


def batch(size: int = 12, shape: tuple[int, ...] = (3, 10, 8)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, generator=generator)
    return [images, torch.randint(0, 5, (size,), generator=generator)]


def noisy(inputs: Any, draws: Draws) -> Any:
    return [inputs[0] * draws.uniform("gain").view(-1, 1, 1, 1), *inputs[1:]]


LISTS: dict[str, list[Any]] = {
    "shift": [Shift(2)],
    "flip": [Flip(0.4)],
    "crop": [Crop(7, padding=2)],
    "scale": [Scale()],
    "normalised": [Scale((0.1, 0.5, 0.9), (0.2, 0.3, 0.4))],
    "noise": [Scale(), Noise(0.3)],
    "all": [Crop(8, 1), Shift(1), Flip(), Flip(0.1), Scale(0.5, 0.25), Noise(0.1), noisy],
}


@pytest.mark.parametrize("name", [*LISTS, "mixup", "mixup twice"])
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    """In another order and by itself; and no global generator is touched."""
    transforms = LISTS.get(name) or [
        Shift(1),
        Scale(),
        Mixup(5, 0.4),
        *[Mixup(5)] * (name == "mixup twice"),
        Noise(0.1),
    ]
    if name == "mixup twice":
        transforms[3] = with_soft_labels
    images, labels = batch(40)

    def made(indices: list[int]) -> list[torch.Tensor]:
        rows = with_partners(transforms, Draws(7, 2, torch.tensor(indices)), 40)
        return list(apply(transforms, [images[rows], labels[rows]], Draws(7, 2, rows)))

    state = torch.get_rng_state()
    together = made(list(range(40)))
    alone = [made([index]) for index in range(40)]
    backwards = made(list(range(39, -1, -1)))
    joined = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    assert digest_tree(joined) == digest_tree(together) == digest_tree([part.flip(0) for part in backwards])
    assert torch.equal(state, torch.get_rng_state())


def with_soft_labels(pair: Any, draws: Draws) -> Any:
    """Mix the halves of a batch whose labels are soft already: a transform of a person's own that asks for partners."""
    return [(part[: len(draws) // 2] + part[len(draws) // 2 :]) * 0.5 for part in pair]


with_soft_labels.partners = lambda draws, size: draws.integers("other", 0, size)  # type: ignore[attr-defined]


def test_a_shift_moves_by_what_was_drawn() -> None:
    images = batch()[0]
    made = Shift(2)(images, draws(12))
    down = draws(12).integers("top", 0, 5) - 2
    right = draws(12).integers("left", 0, 5) - 2
    assert {*down.tolist(), *right.tolist()} == {-2, -1, 0, 1, 2}
    for before, after, top, left in zip(images, made, down.tolist(), right.tolist(), strict=True):
        wanted = torch.zeros_like(before)
        for row in range(10):
            for column in range(8):
                if 0 <= row + top < 10 and 0 <= column + left < 8:
                    wanted[:, row, column] = before[:, row + top, column + left]
        assert torch.equal(after, wanted)


@pytest.mark.parametrize("shape", [(10, 8), (3, 10, 8), (2, 3, 10, 8)])
def test_images_of_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    """As bytes or floats: a window holds the same pixels in each channel; p=1 mirrors all."""
    images = batch(6, shape)[0]
    made = Crop(5, 1)(images, draws(6))
    assert made.shape == (6, *shape[:-2], 5, 5)
    assert torch.equal(made.float(), Crop(5, 1)(images.float(), draws(6)))
    assert torch.equal(Flip(1)(images, draws(6)), images.flip(-1))
    assert torch.equal(Flip(0)(images, draws(6)), images)
    assert torch.equal(Crop(8)(images[..., 1:9, :], draws(6)), images[..., 1:9, :])


def test_scale_divides_by_255_then_normalises() -> None:
    """Correctly rounded in each operation, as numpy's float32 is."""
    images = batch()[0]
    wanted = images.numpy().astype(np.float32) / np.float32(255)
    assert torch.equal(Scale()(images, draws(12)), torch.from_numpy(wanted))
    mean, std = np.float32([0.1, 0.5, 0.9]).reshape(3, 1, 1), np.float32([0.2, 0.3, 0.4]).reshape(3, 1, 1)
    made = Scale([0.1, 0.5, 0.9], [0.2, 0.3, 0.4])(images, draws(12))  # type: ignore[arg-type]
    assert torch.equal(made, torch.from_numpy((wanted - mean) / std))


def test_mixup_mixes_with_the_partner_in_a_sample_s_own_parts() -> None:
    images, labels = batch(40)
    mixup = Mixup(5, alpha=0.4)
    mine = Draws(7, 2, torch.tensor([3, 30, 17]))
    rows = with_partners([mixup], mine, 40)
    partners = mixup.partners(mine.within(0), 40)
    assert rows.tolist() == [3, 30, 17, *partners.tolist()]
    inputs = images.float() / 255
    mixed, soft = apply([mixup], (inputs[rows], labels[rows]), Draws(7, 2, rows))
    part = mine.within(0).beta("part", 0.4)
    assert len(set(part.tolist())) == 3
    for number, (index, partner) in enumerate(zip([3, 30, 17], partners.tolist(), strict=True)):
        own = part[number]
        assert torch.equal(mixed[number], inputs[index] * own + inputs[partner] * (1 - own))
        wanted = torch.zeros(5)
        wanted[labels[index]] += own
        wanted[labels[partner]] += 1 - own
        assert torch.equal(soft[number], wanted)


def test_targets_and_what_follows_them_are_left_alone() -> None:
    images, labels = batch()
    made = apply([Shift(1), Scale()], (images, labels, "names"), draws(12))
    assert made[1] is labels
    assert made[2] == "names"
    assert isinstance(apply([Scale()], images, draws(12)), torch.Tensor)


def test_on_another_device_what_is_drawn_stays_there() -> None:
    """Of the meta device, which computes shapes alone: nothing comes back to the CPU in between."""
    images = batch()[0].to("meta")
    made = apply(LISTS["all"], [images], Draws(1, 0, torch.arange(12, device="meta")))
    assert made[0].device.type == "meta"
    assert made[0].shape == (12, 3, 8, 8)


BYTES, LABELS = batch()
FLOATS = BYTES.float()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Shift(-1), r"Shift\(pixels=-1\): expected pixels of 0 or more"),
        (lambda: Crop(0), "expected a size of 1 or more"),
        (lambda: Crop(4, -1), "expected a size of 1 or more and padding of 0 or more"),
        (lambda: Flip(1.5), r"Flip\(p=1.5\): expected a probability"),
        (lambda: Noise(-0.1), "expected a std of 0 or more"),
        (lambda: Scale(std=0.0), "expected a std above 0"),
        (lambda: Mixup(1), "expected 2 or more classes"),
        (lambda: Mixup(3, 0), "alpha to 1000"),
        (lambda: Crop(9, 0)(BYTES, draws(12)), r"Crop\(size=9, padding=0\) of images of 10 x 8: the window is larger"),
        (lambda: Shift(1)(FLOATS[:, 0, 0], draws(12)), r"inputs \(12, 8\): expected images"),
        (lambda: Flip()(FLOATS[:, 0, 0], draws(12)), "expected images"),
        (lambda: Crop(3)(FLOATS[:, 0, 0], draws(12)), "expected images"),
        (lambda: Scale()(FLOATS, draws(12)), "Scale of torch.float32: expected torch.uint8"),
        (lambda: Scale((0.1, 0.2))(BYTES, draws(12)), r"has 2 channels, inputs have shape \(12, 3, 10, 8\)"),
        (lambda: Noise(0.1)(BYTES, draws(12)), r"Noise\(std=0.1\) of torch.uint8: expected floats"),
        (lambda: Mixup(5)([BYTES, LABELS], draws(12)), "Mixup.* of torch.uint8: expected floats"),
        (lambda: Mixup(5)(FLOATS, draws(12)), "of a batch without labels"),
        (lambda: Mixup(5)([FLOATS, FLOATS[:, 0, 0, 0]], draws(12)), "of a batch without labels"),
        (lambda: Mixup(4)([FLOATS, LABELS], draws(12)), r"labels of 0 to 4: expected 0 to 3"),
        (lambda: Scale()({"image": BYTES}, draws(12)), "Scale.* of a batch of dict: expected a tensor"),
        (lambda: Scale()([], draws(12)), "of a batch of list"),
        (lambda: draws().integers("x", 3, 3), "integers 'x' from 3 to 3: the range is empty"),
    ],
)
def test_what_cannot_be_transformed_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        make()
    assert error.value.hint


def test_a_transform_is_named_in_the_receipt() -> None:
    assert described(Crop(32, padding=4)) == "Crop(size=32, padding=4)"
    assert described(noisy) == "tests.quick.test_augment.noisy"
    assert described(functools.partial(noisy)) == "functools.partial"


def test_it_is_a_public_module() -> None:
    assert labtrain.augment.Shift is Shift
    assert "augment" in dir(labtrain)
    assert all(hasattr(labtrain.augment, name) for name in labtrain.augment.__all__)
