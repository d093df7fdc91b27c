"""Underutilised regions from Python: distil, train students with and without the regions, and see which were chosen.

python examples/udd.py cifar10 --ipc 1 --iterations 20 --out udd
"""

import argparse

import ddfast
from ddfast.report.utilization import utilization


def main() -> None:
    """Distil, evaluate in two ways, and measure how evenly the images are used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder, .zip or .tar with train/ and test/, or a torchvision set")
    parser.add_argument("--out", default="udd")
    parser.add_argument("--ipc", type=int, default=1, help="images per class")
    parser.add_argument("--iterations", type=int, default=20, help="2000 in the paper, each of 100 steps")
    parser.add_argument("--inner-loop", type=int, default=100, help="steps of an iteration")
    parser.add_argument("--real-batch", type=int, default=64, help="real images a class and step")
    parser.add_argument("--epochs", type=int, default=None, help="of a student; default the protocol's")
    given = parser.parse_args()

    settings = {
        name: getattr(given, name) for name in ("ipc", "iterations", "inner_loop", "real_batch", "out")
    }
    out = ddfast.distill("udd", data=given.data, resume=True, **settings)
    for regions in ("none", "chosen"):
        print(regions, ddfast.evaluate(out, given.data, protocol="idc", epochs=given.epochs, regions=regions))

    held = ddfast.DistilledSet(out).pixels.regions
    print(f"regions of the first image, x0 y0 x1 y1: {held.boxes()[0].tolist()}")
    print(utilization(out, data=given.data, picture=f"{given.out}-utilization.png"))


if __name__ == "__main__":
    main()
