"""Every random number that touches a sample, from a counter-based generator.

The numbers depend on (seed, sample, visit, purpose) alone: not on the device, the number of processes, or on
what was drawn before. So a restart, another process count or another kind of device sees the same noise. The streams of
two purposes never meet.
Generator: Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

import numpy as np

AUGMENT, CAPTION, LATENT, NOISE, TIMESTEP, ORDER, PASS, SUBSET, COLOUR, ENCODERS = range(10)    # purposes


def generator(seed: int, sample: int, visit: int, purpose: int) -> np.random.Generator:
    """The generator of one purpose for one visit of one sample. All arguments are >= 0 and < 2**64."""
    # The low counter words count the numbers drawn; the high ones tell visits and purposes apart.
    # uint64 is named: NumPy would make floats of a pair that holds a number of 2**63 or more, and lose its last bits.
    words = [np.array(pair, np.uint64) for pair in ((seed, sample), (0, 0, visit, purpose))]
    return np.random.Generator(np.random.Philox(key=words[0], counter=words[1]))
