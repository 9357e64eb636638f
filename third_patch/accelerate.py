"""accelerate 1.15."""

from third_patch import demand


def apply() -> list[str]:
    """Every patch of this package -> what was changed now."""
    demand("accelerate", "1.15.0", "--optimizer_sharding zero1 (--optimizer oss)")
    return leave_shared_state_where_it_is()


def leave_shared_state_where_it_is() -> list[str]:
    """`AcceleratedOptimizer` leaves the state of an optimizer that is shared out where it is.

    Reason: its constructor reads `state_dict()` and loads it again, to bring the state to the device. fairscale's OSS and torch's
    ZeroRedundancyOptimizer raise RuntimeError there, as no process has the state of all; gathered for it, the state would
    lie on every process, and OSS would give that first state, an empty one, whenever it is asked later on. There is nothing
    to bring to the device: it is made there at the first step.
    """
    from accelerate.optimizer import AcceleratedOptimizer
    original = AcceleratedOptimizer.__init__
    if getattr(original, "patched", False):
        return []

    def __init__(self, optimizer, device_placement=True, scaler=None):
        original(self, optimizer, device_placement and not hasattr(optimizer, "consolidate_state_dict"), scaler)

    __init__.patched = True
    AcceleratedOptimizer.__init__ = __init__
    return ["accelerate: AcceleratedOptimizer.__init__"]
