"""What each --weighting_scheme makes of the noise levels: the plot and the tables of docs/sd3.md, from library/diffusion/flow.py.

    PYTHONPATH=. python docs/noise_levels.py    # writes docs/noise_levels.png, prints the tables
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from library.diffusion import flow

DRAWS = (torch.arange(1_000_000) + 0.5) / 1_000_000    # even quantiles instead of random numbers
HALF = 0.5 / flow.STEPS    # edges lie between two levels
FIFTHS = torch.linspace(0, 1, 6) + HALF
WAYS = {    # name: density, weighting scheme, whether images are compared instead of velocities
    "none": ("uniform", "none", False), "logit_normal": ("logit_normal", "logit_normal", False), "mode": ("mode", "mode", False),
    "beta": ("beta", "none", False), "cosmap": ("uniform", "cosmap", False), "sigma_sqrt": ("uniform", "sigma_sqrt", False),
    "sigma_sqrt, preconditioned": ("uniform", "sigma_sqrt", True),
    "logit_normal, preconditioned": ("logit_normal", "logit_normal", True)}
DRAWN, WEIGHED = list(WAYS)[:4], list(WAYS)[4:]


def shares(way: str, shift: float, edges: torch.Tensor, weighed: bool) -> torch.Tensor:
    """Share of draws, or of the velocity's squared error at an error equal everywhere, between edges of sigma -> [edges - 1]."""
    density, scheme, preconditioned = WAYS[way]
    sigma = flow.sigmas(flow.draw_u(DRAWS, density), shift)
    weight = flow.loss_weight(scheme, sigma) * (sigma ** 2 if preconditioned else 1) if weighed else torch.ones_like(sigma)
    place = torch.bucketize(sigma, edges[1:-1], right=True)
    total = torch.zeros(len(edges) - 1, dtype=torch.float64).index_add_(0, place, weight.double())
    return total / total.sum()


def table(shift: float, weighed: bool) -> str:
    rows = [f"| {way} | " + " | ".join(f"{share:.1%}" for share in shares(way, shift, FIFTHS, weighed).tolist()) + " |"
            for way in (WEIGHED if weighed else DRAWN)]
    heads = [f"{low:.1f} to {high:.1f}" for low, high in zip(FIFTHS[:-1].tolist(), FIFTHS[1:].tolist(), strict=True)]
    return "\n".join([f"| shift {shift:g} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads), *rows])


def plot(path: Path) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    edges = torch.linspace(0, 1, 41) + HALF
    titles = (("drawn, --flow_schedule_shift 1", 1.0, False), ("drawn, --flow_schedule_shift 3", 3.0, False),
              ("drawn times weight, shift 3", 3.0, True))
    for axes, (title, shift, weighed) in zip(figure.subplots(1, 3, sharex=True), titles, strict=True):
        for way in (WEIGHED if weighed else DRAWN):
            axes.stairs((shares(way, shift, edges, weighed) * 40).tolist(), edges.tolist(), label=way, linewidth=1.5)
        axes.set(title=title, xlabel="noise level sigma: 0 is the image, 1 is noise")
        axes.set(yscale="log", ylim=(3e-2, 4e1)) if weighed else axes.set(ylim=(0, 5), ylabel="density")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    plot(Path(__file__).with_suffix(".png"))
    for each in ((1.0, False), (3.0, False), (3.0, True)):
        print(table(*each), end="\n\n")
