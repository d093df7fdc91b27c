"""A network trained on real images for a short while: it chooses the regions that students see, and measures mUE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ddfast.data.pool import ClassPool
from ddfast.errors import DivergedError
from ddfast.methods.base import Context
from ddfast.methods.matching.networks import Built
from ddfast.methods.matching.real import normalised
from ddfast.methods.matching.trained import Descent, real_batch
from ddfast.ops.precision import autocast
from ddfast.ops.transfer import to_device
from ddfast.seeding import generator, seeded
from ddfast.wording import plural

_BATCH = 64


def trained_on_real(arch: str, steps: int, pool: ClassPool, context: Context) -> tuple[nn.Module, str]:
    """A new network after so many steps of 64 real images of all classes, plain ones, by SGD as IDC trains its own.

    Returns:
        The network, in eval mode, and what it is, in words: also how much it read of the images of its last tenth of
        steps, each looked at before the step that trains on it.

    Raises:
        DivergedError: its loss is no longer finite.
    """
    pool.say(f"a new {arch} is trained for {plural(steps, 'step')} on real images")
    network = Built(arch, trained=True).on(context).drawn(context.seed, "chooser").train()
    parameters = list(network.parameters())
    velocities = [torch.zeros_like(each) for each in parameters]
    descent = Descent(0.01, momentum=0.9, weight_decay=5e-4)
    right = torch.zeros((), device=context.device)
    seen, first_read = 0, steps - max(1, steps // 10)
    with seeded(context.seed, "chooser", "training", device=context.device), torch.enable_grad():
        for step in range(steps):
            found, labels = real_batch(pool, _BATCH, generator(context.seed, "chooser", step))
            targets = to_device(labels, context.device)
            with autocast(context.precision, context.device):
                logits = network(normalised(found, context))
            loss = F.cross_entropy(logits.float(), targets)
            descent.step(parameters, velocities, loss)
            if step >= first_read:
                right += (logits.detach().argmax(1) == targets).sum()
                seen += len(targets)
    if not torch.isfinite(loss):
        raise DivergedError(f"the training of a {arch} on real images diverged after {plural(steps, 'step')}")
    read = f"it read {100 * right.item() / seen:.0f}% of its last {seen:,} training images"
    return network.requires_grad_(
        False
    ).eval(), f"a {arch} after {plural(steps, 'step')} on real images; {read}"
