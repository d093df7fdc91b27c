"""The examples that close the help of every command."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, str]] = {
    "": (
        "ddfast demo",
        "ddfast distill random --data photos --teacher teacher.safetensors --ipc 10 --out run",
    ),
    "demo": ("ddfast demo", "ddfast demo --out my-demo --seed 1"),
    "train-teacher": (
        "ddfast train-teacher --data photos --arch convnet4 --image-size 64 --epochs 15 --out teacher.safetensors",
        "ddfast train-teacher --data cifar10:data --arch resnet18 --epochs 200 --checkpoint-epochs 5,20 "
        "--out resnet18.safetensors --resume",
    ),
    "distill": (
        "ddfast distill infoutil --data photos --teacher teacher.safetensors --ipc 10 --out run",
        "ddfast distill dm --data photos --ipc 1 --iterations 2000 --out pixels",
    ),
    "score": (
        "ddfast score infoutil --data photos --teacher teacher.safetensors --ipc 10 --out run",
        "ddfast score rded --data photos --teacher teacher.safetensors --ipc 10 --images-per-class all --out run",
    ),
    "prepare": ("ddfast prepare run", "ddfast prepare run --data moved/photos"),
    "select": ("ddfast select run", "ddfast select run --ipc 50"),
    "compose": ("ddfast compose run", "ddfast compose run --data moved/photos"),
    "relabel": ("ddfast relabel run", "ddfast relabel run --teacher moved/teacher.safetensors"),
    "synthesize": ("ddfast synthesize run", "ddfast synthesize run --device cuda:1 --pool-memory 16"),
    "train-proxies": (
        "ddfast train-proxies --data photos --out proxies",
        "ddfast train-proxies --data cifar10:data --arch resnet18_in --count 4 --epochs 10 --out proxies --resume",
    ),
    "train-experts": (
        "ddfast train-experts --data photos --epochs 20 --out experts",
        "ddfast train-experts --data cifar10:data --count 20 --images-per-class 500 --out experts --resume",
    ),
    "train-prior": (
        "ddfast train-prior --data photos --image-size 32 --epochs 100 --out prior",
        "ddfast train-prior --data cifar10:data --epochs 50 --width 64 --out prior --resume",
    ),
    "train-estimator": (
        "ddfast train-estimator --data photos --image-size 32 --epochs 50 --out estimator.safetensors",
        "ddfast train-estimator --data cifar10:data --arch resnet18_small --epochs 200 --out estimator.safetensors "
        "--resume",
    ),
    "evaluate": (
        "ddfast evaluate --distilled run --data photos --arch convnet4",
        "ddfast evaluate --distilled run --data photos --arch resnet18 --teacher teacher.safetensors --seeds 5 "
        "--json result.json",
    ),
    "compare": (
        "ddfast compare run --data photos",
        "ddfast compare infoutil-run rded-run --data photos --seeds 5 --coreset none",
    ),
    "attribute": (
        "ddfast attribute --data photos --teacher teacher.safetensors --out heatmaps --limit 16",
        "ddfast attribute --data cat.jpg --teacher torchvision:resnet18 --grid 7 --n-samples 256 --out heatmaps",
    ),
    "report": ("ddfast report run", "ddfast report run --data moved/photos"),
    "export": (
        "ddfast export run --out shards/train-{000000..}.tar",
        "ddfast export run --to huggingface --out hub",
    ),
    "utilization": (
        "ddfast utilization run --arch convnet3_in",
        "ddfast utilization run --teacher teacher.safetensors --out used.png",
    ),
    "env": ("ddfast env", "python -m ddfast env"),
}

# Of a method, what stands behind the arguments that every run needs.
_OF_METHOD = {
    "infoutil": ("--grid 4 --n-samples 32", "--rank-by grad_norm --order high"),
    "rded": ("--crops 5", "--rank-by grad_norm --images-per-class all"),
    "random": ("--seed 1", "--factor 1"),
    "herding": ("--images-per-class all", "--unit-length"),
    "k_center": ("--images-per-class all", "--unit-length"),
    "k_means": ("--restarts 3", "--unit-length --images-per-class all"),
    "forgetting": ("--epochs 20", "--arch convnet3 --lr 0.05"),
    "udd": ("--iterations 20", "--policy vote --cfc 0"),
    "mtt": (
        "--experts experts --iterations 1000",
        "--experts experts --unroll truncated:10 --expert-epochs 1 --max-start-epoch 5",
    ),
    "dm": ("--iterations 2000", "--cmi 2000 --proxies proxies"),
    "dc": ("--iterations 100", "--distance cosine --outer-loop 5"),
    "dsa": ("--iterations 100", "--cmi 50000 --proxies proxies"),
    "idc": ("--iterations 20 --inner-loop 20", "--factor 1 --init real"),
    "idm": ("--iterations 1000", "--queue 20 --queue-every 5"),
    "sre2l": ("--iterations 500", "--cmi-ratio 0.2"),
    "igds": (
        "--prior prior --estimator estimator.safetensors",
        "--prior prior --estimator estimator.safetensors --beta 0.5 --teacher teacher.safetensors",
    ),
}


def examples(command: str, method: str | None = None, *, needs_teacher: bool = True) -> tuple[str, ...]:
    """Two command lines that can be copied, of a command or of one with its method; "" is `ddfast` alone.

    Args:
        command: its name.
        method: of `distill` or `score`.
        needs_teacher: whether the method's runs need a teacher.
    """
    if method is None or method not in _OF_METHOD:
        return EXAMPLES.get(command, ())
    teacher = " --teacher teacher.safetensors" if needs_teacher else ""
    common = f"ddfast {command} {method} --data photos{teacher} --ipc 10 --out run"
    return tuple(f"{common} {own}" for own in _OF_METHOD[method])


def epilog(lines: tuple[str, ...]) -> str | None:
    """The last words of a help: examples, a line each."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines) if lines else None
