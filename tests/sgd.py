"""srpo.py with steps of a fixed length along the plain gradient, in place of AdamW.

AdamW makes a full step of a single success. Here every step has the length --lr, whatever the
gradient's size; so it keeps the gradient's direction, and rare successes stay small beside others.

Left out: momentum and weight decay.

Try it alone:  python tests/sgd.py --method grpo --lr 0.1 --steps 3
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import srpo  # noqa: E402


class FixedLength(torch.optim.SGD):
    """p <- p - lr g / |g|, with the norm over all parameters. lr: the length of a step."""

    def step(self, closure=None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient /= norm.clamp(min=1e-12)
        super().step()


def fixed_length(parameters, lr: float, weight_decay: float) -> FixedLength:
    """Takes AdamW's place in srpo.py. weight_decay is left out."""
    return FixedLength(parameters, lr=lr)


if __name__ == "__main__":
    torch.optim.AdamW = fixed_length
    srpo.main(sys.argv[1:])
