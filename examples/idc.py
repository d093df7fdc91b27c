"""IDC from Python: images that decode to four each, and students of two architectures on them.

python examples/idc.py cifar10 --ipc 10 --iterations 20 --out idc
"""

import argparse

import ddfast


def main() -> None:
    """Distil, evaluate, and look at what is stored."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder, .zip or .tar with train/ and test/, or a torchvision set")
    parser.add_argument("--out", default="idc")
    parser.add_argument("--ipc", type=int, default=10, help="stored images per class")
    parser.add_argument("--iterations", type=int, default=20, help="new networks, 2000 in the paper")
    parser.add_argument("--inner-loop", type=int, default=20, help="steps on a network, 100 in the paper")
    parser.add_argument("--real-batch", type=int, default=64, help="real images a class and step")
    parser.add_argument("--net-samples", type=int, default=2000, help="real images of training a step")
    parser.add_argument("--epochs", type=int, default=None, help="of a student; default 1000")
    given = parser.parse_args()

    settings = {
        name: getattr(given, name) for name in ("iterations", "inner_loop", "real_batch", "net_samples")
    }
    out = ddfast.distill("idc", data=given.data, ipc=given.ipc, out=given.out, resume=True, **settings)
    for arch in ("convnet3_in", "convnet4_in"):
        print(arch, ddfast.evaluate(out, given.data, arch=arch, protocol="idc", epochs=given.epochs))

    stored = ddfast.DistilledSet(out)
    print(f"{len(stored)} images are stored, {stored.factor**2} in each")


if __name__ == "__main__":
    main()
