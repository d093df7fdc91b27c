"""Trajectory matching from Python: train experts, distil a set, and train students on it at the rate it came with.

python examples/mtt.py cifar10 --ipc 10 --count 10 --iterations 1000 --out mtt
"""

import argparse
from pathlib import Path

import ddfast


def main() -> None:
    """Train experts, distil, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder, .zip or .tar with train/ and test/, or a torchvision set")
    parser.add_argument("--out", default="mtt")
    parser.add_argument("--ipc", type=int, default=10, help="images per class")
    parser.add_argument("--count", type=int, default=10, help="experts; 100 in the paper")
    parser.add_argument("--expert-epochs", type=int, default=50, help="that an expert trains for")
    parser.add_argument("--iterations", type=int, default=1000, help="5000 in the paper")
    parser.add_argument(
        "--syn-steps", type=int, default=30, help="steps of a student on the synthetic images"
    )
    parser.add_argument(
        "--max-start-epoch", type=int, default=20, help="of an expert, that a student begins before"
    )
    parser.add_argument("--epochs", type=int, default=None, help="of a student that is tested; default 1000")
    given = parser.parse_args()

    experts = Path(f"{given.out}-experts")
    print(
        ddfast.training.train_experts(
            given.data, count=given.count, epochs=given.expert_epochs, out=experts, resume=True
        )
    )
    settings = {
        "experts": str(experts),
        "iterations": given.iterations,
        "syn_steps": given.syn_steps,
        "max_start_epoch": given.max_start_epoch,
    }
    out = ddfast.distill("mtt", data=given.data, ipc=given.ipc, out=given.out, resume=True, **settings)
    print(ddfast.evaluate(out, given.data, arch="convnet3_in", protocol="dsa", epochs=given.epochs))


if __name__ == "__main__":
    main()
