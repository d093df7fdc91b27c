"""Distribution matching from Python: distil a set, train students on it, and open it as a torch Dataset.

python examples/dm.py cifar10 --ipc 10 --iterations 300 --out dm
"""

import argparse

import ddfast


def main() -> None:
    """Distil, evaluate and open."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder, .zip or .tar with train/ and test/, or a torchvision set")
    parser.add_argument("--out", default="dm")
    parser.add_argument("--ipc", type=int, default=10, help="images per class")
    parser.add_argument("--iterations", type=int, default=300, help="20000 in the paper")
    parser.add_argument("--real-batch", type=int, default=256, help="real images a class and iteration")
    parser.add_argument("--epochs", type=int, default=None, help="of a student; default 1000")
    given = parser.parse_args()

    settings = {"iterations": given.iterations, "real_batch": given.real_batch}
    out = ddfast.distill("dm", data=given.data, ipc=given.ipc, out=given.out, resume=True, **settings)
    print(ddfast.evaluate(out, given.data, arch="convnet3_in", protocol="dsa", epochs=given.epochs))

    train = ddfast.DistilledSet(out)
    image, label = train[0][:2]
    print(f"{len(train)} images; the first: {tuple(image.shape)}, {train.class_names[int(label)]}")


if __name__ == "__main__":
    main()
