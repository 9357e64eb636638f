"""A stand-in for Huawei's torch_npu, for tests on machines without an Ascend NPU. Not the real package: see ../README.md."""

import os
import sys

# As the real package does: `import torch_npu` alone must not make torch load it a second time.
_autoload_was = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch  # noqa: E402

__version__ = "2.13.0"
SIMULATED = True

from torch_npu import _device, npu  # noqa: E402

sys.modules["torch.npu"] = npu
_device.install(npu)
from torch_npu import hccl, ops  # noqa: E402, F401
from torch_npu.ops import npu_fusion_attention, npu_geglu, npu_rms_norm, npu_rotary_mul, npu_swiglu  # noqa: E402, F401

if torch.distributed.is_available():
    hccl.register()


def _autoload():
    """Entry point of torch.backends: the import was enough."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload_was


_autoload()
