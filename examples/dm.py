"""Distribution matching from Python: distil a set, train students on it, and open it as a torch Dataset.

    python examples/dm.py cifar10 --ipc 10 --iterations 300 --out dm
"""

import argparse

import ddfast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="a folder, .zip or .tar with train/ and test/, or a torchvision set by name")
    parser.add_argument("--out", default="dm")
    parser.add_argument("--ipc", type=int, default=10, help="images per class")
    parser.add_argument("--iterations", type=int, default=300, help="20000 in the paper")
    parser.add_argument("--real-batch", type=int, default=256, help="real images a class and iteration")
    parser.add_argument("--epochs", type=int, default=None, help="of a student; default the protocol's 1000")
    arguments = parser.parse_args()

    folder = ddfast.distill(
        "dm",
        data=arguments.data,
        ipc=arguments.ipc,
        out=arguments.out,
        iterations=arguments.iterations,
        real_batch=arguments.real_batch,
        resume=True,
    )
    result = ddfast.evaluate(folder, arguments.data, arch="convnet3_in", protocol="dsa", epochs=arguments.epochs)
    print(result)

    train = ddfast.DistilledSet(folder)
    image, label = train[0][:2]
    print(f"{len(train)} images; the first is {tuple(image.shape)} of class {train.class_names[int(label)]}")


if __name__ == "__main__":
    main()
