"""scikit-learn's digits: 1,797 real images of handwritten digits, split 1,257 / 270 / 270.

E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits. UCI Machine Learning Repository, 1998.
"""

import labtrain
import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset


class Digits(Dataset):
    """Images (1, 8, 8) in 0..1 and their labels; each image is moved by up to `max_shift` pixels, at random."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, max_shift: int = 0) -> None:
        self.images = images  # (N, 1, 8, 8)
        self.labels = labels  # (N,)
        self.max_shift = max_shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, m = self.images[index], self.max_shift
        if m:
            # torch's global generator: labtrain.DataLoader seeds it by (seed, epoch, index).
            y, x = torch.randint(0, 2 * m + 1, (2,)).tolist()
            image = torch.nn.functional.pad(image, (m, m, m, m))[:, y : y + 8, x : x + 8]
        return image, self.labels[index]


class DigitsData(pl.LightningDataModule):
    """The three parts of the digits, as loaders."""

    def __init__(self, batch_size: int, num_workers: int = 0, max_shift: int = 1) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.max_shift = batch_size, num_workers, max_shift

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # (N, 1, 8, 8)
        labels = torch.from_numpy(digits.target).long()  # (N,)
        # One split for every seed, so that runs can be compared.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, val, test = order.split([1257, 270, 270])
        self.train = Digits(images[train], labels[train], self.max_shift)
        self.val = Digits(images[val], labels[val])
        self.test = Digits(images[test], labels[test])

    def train_dataloader(self) -> labtrain.DataLoader:
        return labtrain.DataLoader(self.train, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> labtrain.DataLoader:
        return labtrain.DataLoader(self.val, self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> labtrain.DataLoader:
        return labtrain.DataLoader(self.test, self.batch_size, num_workers=self.num_workers)
