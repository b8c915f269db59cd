import os
import shutil
import tempfile


os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    HF_DATASETS_CACHE=tempfile.mkdtemp(prefix="trl-dpg-datasets-"),  # apart from the user's, also in subprocesses
)

import torch


torch.set_num_threads(1)  # two busy OpenMP threads per test worker can be many times slower than one


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker is left alone with one in the end."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
