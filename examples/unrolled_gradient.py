"""The gradient of a network's last weights in the images it was trained on, exactly, in the memory of one step.

python examples/unrolled_gradient.py
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

import ddfast


def main() -> None:
    """Train an MLP for 20 steps, ask how its distance to a goal depends on the images, and compare with unrolling."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    start = {name: weight.detach() for name, weight in model.named_parameters()}
    goal = {name: torch.randn_like(weight) for name, weight in start.items()}
    images, labels = torch.randn(20, 8, 10).double(), torch.randint(3, (20, 8))

    def objective(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([(weights[name] - goal[name]).square().sum() for name in goal]).sum()

    batches = list(zip(images, labels, strict=True))
    found = ddfast.unrolled_gradient(model, start, batches, objective, lr=0.1)

    leaf, weights = images.clone().requires_grad_(), {n: w.clone().requires_grad_() for n, w in start.items()}
    for x, y in zip(leaf, labels, strict=True):
        loss = functional.cross_entropy(functional_call(model, weights, (x,)), y)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
    (wanted,) = torch.autograd.grad(objective(weights), leaf)
    difference = (torch.stack(found.images) - wanted).norm() / wanted.norm()
    print(f"objective {found.value:.4f}; difference from full unrolling {difference:.1e}")


if __name__ == "__main__":
    main()
