from .config import InnerLoopConfig
from .metagradient import MetagradientOutput, MetagradientOutputs, metagradient


__all__ = ["InnerLoopConfig", "MetagradientOutput", "MetagradientOutputs", "metagradient"]
