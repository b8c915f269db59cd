from .config import InnerLoopConfig
from .metagradient import MetagradientOutput, metagradient


__all__ = ["InnerLoopConfig", "MetagradientOutput", "metagradient"]
