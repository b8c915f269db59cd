import os


os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false"
)

import torch


torch.set_num_threads(1)  # two busy OpenMP threads per test worker can be many times slower than one
