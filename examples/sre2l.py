"""SRe2L from Python: squeeze a data set into a teacher, recover images from it, and train students on them.

python examples/sre2l.py cifar10 --arch resnet18_small --ipc 10 --iterations 200 --out sre2l
"""

import argparse
from pathlib import Path

import ddfast


def main() -> None:
    """Squeeze, recover and relabel, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder, .zip or .tar with train/ and test/, or a torchvision set")
    parser.add_argument("--out", default="sre2l")
    parser.add_argument("--arch", default="convnet3", help="of teacher and students; it needs BatchNorm")
    parser.add_argument("--teacher-epochs", type=int, default=10)
    parser.add_argument("--ipc", type=int, default=10, help="images per class")
    parser.add_argument("--iterations", type=int, default=200, help="1000 in the paper")
    parser.add_argument("--cmi-ratio", type=float, default=0.0, help="share of CMI's gradient; 0: no CMI")
    parser.add_argument("--epochs", type=int, default=None, help="of a student; default 400")
    given = parser.parse_args()

    teacher = Path(f"{given.out}-teacher.safetensors")
    ddfast.train_teacher(given.data, out=teacher, arch=given.arch, epochs=given.teacher_epochs, resume=True)
    out = ddfast.distill(
        "sre2l",
        data=given.data,
        teacher=teacher,
        ipc=given.ipc,
        out=given.out,
        resume=True,
        iterations=given.iterations,
        cmi_ratio=given.cmi_ratio,
    )
    settings = {"arch": given.arch, "teacher": teacher, "protocol": "sre2l", "epochs": given.epochs}
    print(ddfast.evaluate(out, given.data, **settings))


if __name__ == "__main__":
    main()
