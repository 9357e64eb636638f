"""torch.npu of the simulated device: the calls a trainer makes, with the real names and arguments."""

import os
import time

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_library = None  # set by _device.install
_COUNT = int(os.environ.get("NPU_SIM_DEVICES", "1"))
default_generators = []    # set by _device.install, too
_peak = {}


def device_count():
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return _COUNT if visible is None else min(_COUNT, len([v for v in visible.split(",") if v]))


def is_available():
    return device_count() > 0


def is_initialized():
    return True


def init():
    pass


_lazy_init = init


def _is_in_bad_fork():
    return False


def _index(device):
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    return current_device() if device.index is None else device.index


def current_device():
    return _library.npu_current()


def set_device(device):
    i = _index(device)
    if not 0 <= i < device_count():
        raise RuntimeError(f"Invalid NPU device {i}: {device_count()} visible")
    _library.npu_set(i)


class device:
    def __init__(self, device):
        self.idx = _index(device)

    def __enter__(self):
        self.prev = current_device()
        set_device(self.idx)

    def __exit__(self, *exc):
        set_device(self.prev)


def synchronize(device=None):
    pass


def get_device_name(device_name=None):
    return "Ascend (simulated)"


def get_device_capability(device=None):
    return None


class _Properties:
    name, total_memory, multi_processor_count = "Ascend (simulated)", 32 << 30, 1


def get_device_properties(device_name=None):
    return _Properties()


# ------------------------------------------------------------ memory
def memory_allocated(device=None):
    """Bytes of the npu tensors alive in Python (found by a walk: for tests, not for a hot loop)."""
    import gc
    i, seen = _index(device), {}
    for o in gc.get_objects():
        if issubclass(type(o), torch.Tensor):
            for t in (o, o.grad if o.is_leaf else None):
                if is_traceable_wrapper_subclass(t):    # a DTensor: the share within it is found by itself
                    continue
                if t is not None and t.device.type == "npu" and t.device.index == i:
                    seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    total = sum(seen.values())
    _peak[i] = max(_peak.get(i, 0), total)
    return total


def max_memory_allocated(device=None):
    memory_allocated(device)
    return _peak[_index(device)]


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def reset_peak_memory_stats(device=None):
    _peak.pop(_index(device), None)


reset_max_memory_allocated = reset_peak_memory_stats


def memory_stats(device=None):
    return {"allocated_bytes.all.current": memory_allocated(device),
            "allocated_bytes.all.peak": max_memory_allocated(device)}


def mem_get_info(device=None):
    total = _Properties.total_memory
    return total - memory_allocated(device), total


def FloatTensor(values):    # DeepSpeed's name for it
    return torch.tensor(values, dtype=torch.float32, device="npu")


def empty_cache():
    pass


def ipc_collect():
    pass


# ------------------------------------------------------------ random numbers
def manual_seed(seed):
    default_generators[current_device()].manual_seed(seed)


def manual_seed_all(seed):
    for g in default_generators:
        g.manual_seed(seed)


def initial_seed():
    return default_generators[current_device()].initial_seed()


def get_rng_state(device="npu"):
    return default_generators[_index(device)].get_state()


def set_rng_state(new_state, device="npu"):
    default_generators[_index(device)].set_state(new_state)


def get_rng_state_all():
    return [get_rng_state(i) for i in range(device_count())]


def set_rng_state_all(new_states):
    for i, s in enumerate(new_states):
        set_rng_state(s, i)


class random:  # torch.npu.random.get_rng_state_all, as transformers' Trainer spells it
    get_rng_state = staticmethod(get_rng_state)
    set_rng_state = staticmethod(set_rng_state)
    get_rng_state_all = staticmethod(get_rng_state_all)
    set_rng_state_all = staticmethod(set_rng_state_all)


# ------------------------------------------------------------ streams (everything is synchronous)
class Stream(torch.Stream):
    def __new__(cls, device=None, priority=0, **kw):
        return super().__new__(cls, torch.device("npu", _index(device)), priority=priority)


class Event(torch.Event):
    def __new__(cls, enable_timing=False, blocking=False, interprocess=False):
        self = super().__new__(cls, torch.device("npu", current_device()), enable_timing=enable_timing)
        self.at = None
        return self

    def record(self, stream=None):
        self.at = time.perf_counter()

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, end_event):
        return (end_event.at - self.at) * 1e3


def current_stream(device=None):
    return Stream(device)


default_stream = current_stream


class stream:
    def __init__(self, stream):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *exc):
        pass


def set_stream(stream):
    pass


# ------------------------------------------------------------ mixed precision
def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16]


def is_bf16_supported(including_emulation=False):
    return True


class amp:
    class autocast(torch.autocast):
        def __init__(self, enabled=True, dtype=torch.float16, cache_enabled=True):
            super().__init__("npu", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)

    class GradScaler(torch.amp.GradScaler):
        def __init__(self, init_scale=2.0 ** 16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000,
                     dynamic=True, enabled=True):
            super().__init__("npu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)


jit_compile = True    # as the real one begins


def set_compile_mode(jit_compile=False):
    globals()["jit_compile"] = jit_compile


def set_option(option):
    pass


class config:
    allow_internal_format = True


class matmul:
    allow_hf32 = False


class conv:
    allow_hf32 = True
