"""A condensation loop of your own on ddfast's parts: siamese augmentation, distance of gradients, fused ConvNets.

python examples/condensation.py photos --ipc 10 --iterations 100

A loop that already calls the reference repository's functions of these names takes them from `ddfast.condensation`
in place of `utils`, and its network goes through `fuse`: two lines.
"""

import argparse

import torch
from torch.nn import functional

import ddfast
from ddfast.condensation import DiffAugment, ParamDiffAug, fuse, match_loss

STRATEGY = "color_crop_cutout_flip_scale_rotate"


def main() -> None:
    """Gradient matching (DSA) with a fresh network a step, on images of a folder or archive with train/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder, .zip or .tar with train/, or a torchvision set")
    parser.add_argument("--ipc", type=int, default=10, help="images per class")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--real-batch", type=int, default=256, help="real images a class and iteration")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.set_defaults(dis_metric="ours", device="cpu", dsa_param=ParamDiffAug())
    args = parser.parse_args()

    with ddfast.data.open_source(args.data) as source:
        images, labels, _ = ddfast.data.load_all(source, args.size)
    real_images = [images[labels == label] / 127.5 - 1 for label in labels.unique()]
    made = torch.stack([of_class[: args.ipc] for of_class in real_images]).requires_grad_()
    optimizer = torch.optim.SGD([made], lr=0.1, momentum=0.5)
    for step in range(args.iterations):
        torch.manual_seed(step)
        net = fuse(ddfast.create_model("convnet3_in", len(real_images), args.size))
        loss = torch.tensor(0.0)
        for label, of_class in enumerate(real_images):
            real = of_class[torch.randperm(len(of_class))[: args.real_batch]]
            gradients = []
            for x, synthetic in ((real, False), (made[label], True)):
                # The same seed for both.
                x = DiffAugment(x, STRATEGY, seed=1000 * step + label, param=args.dsa_param)
                of_label = functional.cross_entropy(net(x), torch.full((len(x),), label))
                parameters = list(net.parameters())
                gradients.append(torch.autograd.grad(of_label, parameters, create_graph=synthetic))
            loss = loss + match_loss(gradients[1], gradients[0], args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: distance {float(loss.detach()):.3f}")
    torch.save(made.detach(), "condensed.pt")


if __name__ == "__main__":
    main()
