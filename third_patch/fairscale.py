"""fairscale 0.4.13."""

from third_patch import demand


def apply() -> list[str]:
    """Every patch of this package -> what was changed now."""
    demand("fairscale", "0.4.13", "--optimizer oss")
    return refill_buckets()


def refill_buckets() -> list[str]:
    """`OSS.step` fills its buckets anew where the parameters are no longer in them.

    Reason: OSS makes all parameters of a process views of one buffer, and sends buffers. Who moves the network afterwards, as
    accelerate does, gives the parameters storage of their own. OSS looks for another *type* of device alone, at the first
    parameter: from cpu to cpu:0, where accelerate moves to on CPUs, or from npu to npu:1, it goes on sending the old buffer,
    without an error, and every process trains the parameters that are its own and keeps those of others as they were.
    """
    from fairscale.optim import OSS
    original = OSS.step
    if getattr(original, "patched", False):
        return []

    def step(self, closure=None, **named):
        buckets = [bucket for of_device in self.buckets.values() for bucket in of_device.values()]
        if any(_place(p) != _place(bucket.buffer) for bucket in buckets for p in bucket._params):
            self._clear_cache()
            self.buckets.clear()
            self.refresh_trainable()
        return original(self, closure, **named)

    step.patched = True
    OSS.step = step
    return ["fairscale: OSS.step"]


def _place(tensor) -> int:
    return tensor.untyped_storage().data_ptr()
