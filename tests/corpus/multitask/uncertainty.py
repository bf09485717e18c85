"""Two tasks on one trunk, weighted by learned uncertainties (Kendall et al.): batches are dicts, metrics in a MetricCollection."""

import lightning as L
import torch
import torchmetrics
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, random_split


class MultiTaskDigits(Dataset):
    """Which digit it is, and how much ink it has."""

    def __init__(self, n=200):
        digits = load_digits()
        self.images, self.labels = digits.images[:n], digits.target[:n]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, idx):
        image = torch.tensor(self.images[idx], dtype=torch.float32) / 16
        return {"image": image, "label": torch.tensor(self.labels[idx]), "ink": image.mean()}


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str):
        self.train, self.val = random_split(MultiTaskDigits(), [0.75, 0.25])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, lr: float = 5e-3):
        super().__init__()
        self.lr = lr
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({"label": nn.Linear(48, 10), "ink": nn.Linear(48, 1)})
        self.log_vars = nn.Parameter(torch.zeros(2))
        metrics = torchmetrics.MetricCollection(
            {
                "acc": torchmetrics.classification.MulticlassAccuracy(10, average="micro"),
                "f1": torchmetrics.classification.MulticlassF1Score(10),
            }
        )
        self.train_metrics, self.val_metrics = metrics.clone(prefix="train_"), metrics.clone(prefix="val_")
        self.val_mae = torchmetrics.MeanAbsoluteError()

    def forward(self, image):
        features = self.trunk(image)
        return self.heads["label"](features), self.heads["ink"](features).squeeze(-1)

    def training_step(self, batch, batch_idx):
        logits, ink = self(batch["image"])
        losses = torch.stack(
            [F.cross_entropy(logits, batch["label"], label_smoothing=0.1), F.mse_loss(ink, batch["ink"])]
        )
        loss = (torch.exp(-self.log_vars) * losses + self.log_vars).sum()
        self.log_dict({"loss": loss, "loss_label": losses[0], "loss_ink": losses[1]}, on_step=False, on_epoch=True)
        output = self.train_metrics(logits, batch["label"])
        self.log_dict(output)
        return loss

    def validation_step(self, batch, batch_idx):
        logits, ink = self(batch["image"])
        self.val_metrics.update(logits, batch["label"])
        self.val_mae(ink, batch["ink"])
        self.log("val_mae", self.val_mae)

    def on_validation_epoch_end(self):
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    def configure_optimizers(self):
        params = [
            {"params": [p for n, p in self.named_parameters() if n != "log_vars"]},
            {"params": [self.log_vars], "lr": 0.02},
        ]
        optimizer = torch.optim.Adam(params, lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 2], gamma=0.5)]
