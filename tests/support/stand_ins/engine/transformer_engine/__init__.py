"""Stand-in for Transformer Engine 2.6 on a CPU: what megatron.core imports of it, without parallelism.

Names, signatures and attributes are the package's. What its kernels do is done by torch.
"""

from transformer_engine import common, pytorch

__version__ = "2.6.0"
__all__ = ["common", "pytorch"]
