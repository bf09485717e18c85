"""A bare loop in bf16 over pinned slices, which are copied while the GPU computes: `python bare.py NETWORK`."""

import sys

import torch
from networks import BATCH, DEVICE, MEAN, STD, Clock, loss_of, network, optimizer_of, rows

name = sys.argv[1]
torch.manual_seed(1)
inputs, targets = (torch.from_numpy(each) for each in rows(name))
model = network(name).to(DEVICE)
optimizer, clock = optimizer_of(model), Clock(BATCH[name])
while True:
    for chosen in torch.randperm(len(inputs)).split(BATCH[name]):
        batch, wanted = inputs[chosen], targets[chosen]
        if DEVICE.type == "cuda":
            batch, wanted = (each.pin_memory().to(DEVICE, non_blocking=True) for each in (batch, wanted))
        if batch.dtype == torch.uint8:
            batch = (batch.float() / 255 - MEAN) / STD
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = loss_of(model(batch), wanted)
        loss.backward()
        optimizer.step()
        clock.tick()
