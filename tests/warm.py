"""srpo.py whose learning rate rises over the first updates, in place of a constant one.

AdamW divides a gradient by its own running size. Its first updates are therefore full steps, even
of two or three successes, and on hard problems such a step can destroy the policy.

Left out: a decay at the end.

Try it alone:  python tests/warm.py --method walk --train_data chain-12-below-4e-4 --steps 3
"""

import sys
from pathlib import Path

import torch
from torch.optim import AdamW

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import srpo  # noqa: E402

UPDATES = 10  # until the rate is --lr


class WarmAdamW(AdamW):
    """AdamW; update n of the first ones has n / UPDATES of the learning rate."""

    def step(self, closure=None) -> None:
        group = self.param_groups[0]
        done = max((state["step"].item() for state in self.state.values()), default=0)
        lr = group["lr"]
        group["lr"] = lr * min(1, (done + 1) / UPDATES)
        super().step()
        group["lr"] = lr


if __name__ == "__main__":
    torch.optim.AdamW = WarmAdamW
    srpo.main(sys.argv[1:])
