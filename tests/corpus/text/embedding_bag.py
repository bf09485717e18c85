"""Classification by EmbeddingBag: a collate method joins all texts and their offsets; losses are gathered in a list."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

CLASSES = ["world", "sports", "business", "science"]


def make_news(n, seed):
    g = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(n):
        label = int(torch.randint(0, 4, (), generator=g))
        words = torch.randint(0, 60, (int(torch.randint(4, 15, (), generator=g)),), generator=g)
        words[::2] = words[::2] // 4 + 15 * label
        data.append((label, words.tolist()))
    return data


class Model(L.LightningModule):
    def __init__(self, vocab_size: int = 60, embed_dim: int = 16, num_class: int = 4):
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocab_size, embed_dim, sparse=False)
        self.fc = nn.Linear(embed_dim, num_class)
        self.training_step_outputs = []
        self.init_weights()

    def init_weights(self):
        initrange = 0.5
        self.embedding.weight.data.uniform_(-initrange, initrange)
        self.fc.weight.data.uniform_(-initrange, initrange)
        self.fc.bias.data.zero_()

    def forward(self, text, offsets):
        return self.fc(self.embedding(text, offsets))

    def training_step(self, batch, batch_idx):
        label, text, offsets = batch
        loss = nn.functional.cross_entropy(self(text, offsets), label)
        self.training_step_outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        outputs = self.training_step_outputs
        self.log("training_epoch_mean", torch.stack(outputs).mean())
        self.training_step_outputs.clear()

    def validation_step(self, batch, batch_idx):
        label, text, offsets = batch
        accuracy = (self(text, offsets).argmax(1) == label).float().mean()
        self.log("accu_val", accuracy, batch_size=label.size(0))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size
        self.train_list, self.val_list = make_news(140, 0), make_news(30, 1)

    def collate_batch(self, batch):
        label_list, text_list, offsets = [], [], [0]
        for _label, _text in batch:
            label_list.append(_label)
            processed_text = torch.tensor(_text, dtype=torch.int64)
            text_list.append(processed_text)
            offsets.append(processed_text.size(0))
        offsets = torch.tensor(offsets[:-1]).cumsum(dim=0)
        return torch.tensor(label_list, dtype=torch.int64), torch.cat(text_list), offsets

    def train_dataloader(self):
        return DataLoader(self.train_list, batch_size=self.batch_size, shuffle=True, collate_fn=self.collate_batch)

    def val_dataloader(self):
        return DataLoader(self.val_list, batch_size=self.batch_size, shuffle=False, collate_fn=self.collate_batch)
