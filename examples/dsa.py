"""Gradient matching from Python: DSA, or DC with --method dc, and what 8 bits cost its images.

python examples/dsa.py cifar10 --ipc 10 --iterations 20 --out dsa
"""

import argparse

import ddfast


def main() -> None:
    """Distil, and evaluate by the method's own protocol."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder, .zip or .tar with train/ and test/, or a torchvision set")
    parser.add_argument("--method", default="dsa", choices=("dsa", "dc"))
    parser.add_argument("--out", default="dsa")
    parser.add_argument("--ipc", type=int, default=10, help="images per class")
    parser.add_argument("--iterations", type=int, default=20, help="new networks, 1000 in the paper")
    parser.add_argument("--real-batch", type=int, default=256, help="real images a class and step")
    parser.add_argument("--inner-loop", default="auto", help="epochs of a network between two steps")
    parser.add_argument("--epochs", type=int, default=None, help="of a student; default the protocol's")
    given = parser.parse_args()

    settings = {
        "iterations": given.iterations,
        "real_batch": given.real_batch,
        "inner_loop": given.inner_loop,
    }
    out = ddfast.distill(given.method, data=given.data, ipc=given.ipc, out=given.out, resume=True, **settings)
    for rounded in (False, True):
        found = ddfast.evaluate(
            out, given.data, arch="convnet3_in", protocol=given.method, epochs=given.epochs, rounded=rounded
        )
        print(f"{'8-bit images' if rounded else 'float32'}: {found}")


if __name__ == "__main__":
    main()
