"""What `make test-gpu` checks, in order of importance. The functions import torch, this table does not."""

from tests.gpu.harness import Check

SAME = "the same digest on 1 process, on 2 that share the device, and killed and moved from 2 to 1 to 2"

CHECKS = [
    Check(
        name="exact-gpt-32-true",
        shows=f"a GPT with SDPA in fp32: {SAME}",
        run="tests.gpu.exact:gpt_in_fp32",
    ),
    Check(
        name="exact-resnet-bf16-mixed",
        shows=f"a ResNet with BatchNorm in bf16-mixed: {SAME}",
        run="tests.gpu.exact:resnet_in_bf16",
    ),
    Check(
        name="exact-gpt-16-mixed",
        shows=f"a GPT in 16-mixed, with steps that the scaler skips: {SAME}",
        run="tests.gpu.exact:gpt_in_fp16",
    ),
    Check(
        name="doctor",
        shows="labtrain doctor: each kernel gives its known result; NCCL does where there are two GPUs",
        run="tests.gpu.device:doctor",
    ),
    Check(
        name="no-wait",
        shows="one process in fp32 and bf16-mixed does not wait for the GPU between two steps that print nothing",
        run="tests.gpu.device:no_wait",
        alone=True,
    ),
    Check(
        name="checksum",
        shows="the trail's checksum on the device is that of the same bytes on the CPU, for each dtype and for a run",
        run="tests.gpu.device:checksum",
    ),
    Check(
        name="template",
        shows="an experiment of the template: the same digest whole, and killed and resumed",
        run="tests.gpu.exact:template",
    ),
    Check(
        name="copies",
        shows="batches are copied from page-locked memory while the GPU computes, and arrive whole",
        run="tests.gpu.device:copies",
        gpus=1,
        alone=True,
    ),
    Check(
        name="strict-off",
        shows="strict: two runs with atomic additions have one digest; off: reported",
        run="tests.gpu.exact:strict_and_off",
    ),
    Check(
        name="out-of-memory",
        shows="full memory ends a training with exit code 2, the numbers and three remedies",
        run="tests.gpu.device:out_of_memory",
        alone=True,
    ),
    Check(
        name="batch-size",
        shows="labtrain batch-size finds the largest size that fits",
        run="tests.gpu.device:batch_size",
        alone=True,
    ),
    Check(
        name="gpu-stats",
        shows="gpu_stats logs the memory and temperature that nvidia-smi reports",
        run="tests.gpu.device:gpu_stats",
        gpus=1,
        alone=True,
    ),
    Check(
        name="fsdp",
        shows="FSDP: killed and resumed with the same bits; resumed on another number of devices with the same weights",
        run="tests.gpu.exact:fsdp",
    ),
    Check(
        name="group-of-one",
        shows="NCCL (on a CPU gloo) in a group of one: labtrain's exchanges of each dtype, and a training",
        run="tests.gpu.device:group_of_one",
    ),
    Check(
        name="exact-gpt-bf16-mixed",
        shows=f"a GPT in bf16-mixed: {SAME}",
        run="tests.gpu.exact:gpt_in_bf16",
    ),
    Check(
        name="exact-resnet-32-true",
        shows=f"a ResNet in fp32: {SAME}",
        run="tests.gpu.exact:resnet_in_fp32",
    ),
    Check(
        name="exact-resnet-16-mixed",
        shows=f"a ResNet in 16-mixed, with steps that the scaler skips: {SAME}",
        run="tests.gpu.exact:resnet_in_fp16",
    ),
    Check(
        name="two-devices",
        shows="the same digest on 1 and 2 devices, over NCCL (on a CPU: 2 processes over gloo), killed and moved",
        run="tests.gpu.exact:two_devices",
    ),
    Check(
        name="channels-last",
        shows=f"speed.channels_last: weights and images have their channels last; {SAME}",
        run="tests.gpu.exact:channels_last",
    ),
    Check(
        name="checkpoint-activations",
        shows=f"speed.checkpoint_activations: each layer is computed again; the digest without it; {SAME}",
        run="tests.gpu.exact:checkpoint_activations",
    ),
    Check(
        name="compile",
        shows="speed.compile: the same digest on 1 process, on 2, and killed and resumed",
        run="tests.gpu.exact:compiled",
        limit_s=180,
    ),
    Check(
        name="checkpoint-stall",
        shows="saves change no bit; the loop begins its next step before a save is written; how long it waits for one",
        run="tests.gpu.device:checkpoint_stall",
        alone=True,
    ),
]
