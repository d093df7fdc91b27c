"""The paper's accuracy studies, each as a table of arms: what is distilled, labelled and trained, and what it tests.

A recipe's defaults are the paper's budget: three seeds, the protocol's epochs, the table's IPCs and architectures.
Every recipe has the row that no table of the paper has: random images with the same soft labels.
"""

from __future__ import annotations

from dataclasses import dataclass

FULL, EARLY, AS_PAPER, STAGES = "full", "early", "as paper", "stages"
LABELS_OF = ", labels of"  # in the name of a row that stands for a stage: between it and the teacher's age
EARLY_UP_TO = 10  # IPC up to which the paper labels with the teacher of epoch 10 (B.2)


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: what stands in the table.
        arm: method and options, as `bench.studies.compare --arm` takes them.
        method: the row's name in `reported.csv`, empty where the paper has no such row.
        labels: whose labels the students get: the `full` teacher's, an `early` one's (epoch 10), `as paper` early up
            to IPC 10 and full beyond (B.2), or one row for each of the teacher's `stages`.
        autoaugment: AutoAugment on the students' images.
        protocol: of the students. One with hard labels trains ConvNets with InstanceNorm, as its numbers were made.
    """

    name: str
    arm: str
    method: str = ""
    labels: str = FULL
    autoaugment: bool = False
    protocol: str = "rded"


@dataclass(frozen=True)
class Gain:
    """A claim: one row against another, and the paper's rows for the same claim."""

    claim: str
    row: str
    base: str
    method: str = ""
    base_method: str = ""


@dataclass(frozen=True)
class Recipe:
    """One study.

    Attributes:
        title: heading.
        tests: what it tests, one sentence or two.
        rows: the arms.
        gains: the claims.
        ipcs: images per class.
        teachers: architectures that distil, where no teacher file is given; `convnet` takes the depth that fits.
        students: architectures that are trained on what each of them distilled; missing: the same one.
        seeds: students a cell.
        images_per_class: sources scored of each class.
        note: what else the reader must know.
    """

    title: str
    tests: str
    rows: tuple[Row, ...]
    gains: tuple[Gain, ...] = ()
    ipcs: tuple[int, ...] = (1, 10, 50)
    teachers: tuple[str, ...] = ("convnet", "resnet18")
    students: tuple[tuple[str, tuple[str, ...]], ...] = ()
    seeds: int = 3
    images_per_class: int = 300
    note: str = ""


RANDOM = Row("random images, same soft labels", "random")
_OURS = Row("InfoUtil", "infoutil", "InfoUtil")
_LITERAL = Row("InfoUtil, the paper's rules", "infoutil preset=paper", "InfoUtil")
_RDED = Row("RDED", "rded", "RDED")
_OVER_RDED = (
    Gain("InfoUtil over RDED", "InfoUtil", "RDED", "InfoUtil", "RDED"),
    Gain("the paper's rules over RDED", "InfoUtil, the paper's rules", "RDED", "InfoUtil", "RDED"),
    Gain("InfoUtil over random images", "InfoUtil", RANDOM.name),
    Gain("RDED over random images", "RDED", RANDOM.name),
)
_RESNETS = (("resnet18", ("resnet18", "resnet101")),)

RECIPES: dict[str, Recipe] = {
    "table1": Recipe(
        "Table 1: main results",
        "Are students trained on InfoUtil's sets better than those trained on RDED's, and than those trained on random "
        "images? First with the same labels for all; then with the paper's: a teacher of 10 epochs up to IPC 10 (B.2) "
        "and AutoAugment, which its RDED did not have.",
        (
            _OURS,
            _LITERAL,
            _RDED,
            RANDOM,
            Row("InfoUtil, the paper's labels", "infoutil", "InfoUtil", AS_PAPER, True),
            Row(
                "InfoUtil, the paper's rules and labels", "infoutil preset=paper", "InfoUtil", AS_PAPER, True
            ),
            Row("RDED, the paper's labels", "rded", "", AS_PAPER, True),
            Row("random images, the paper's labels", "random", "", AS_PAPER, True),
        ),
        (
            *_OVER_RDED,
            Gain(
                "the paper's rules and labels over RDED",
                "InfoUtil, the paper's rules and labels",
                "RDED",
                "InfoUtil",
                "RDED",
            ),
            Gain(
                "InfoUtil with the paper's labels over RDED without them",
                "InfoUtil, the paper's labels",
                "RDED",
                "InfoUtil",
                "RDED",
            ),
            Gain("the paper's labels alone, on RDED", "RDED, the paper's labels", "RDED"),
            Gain(
                "InfoUtil over RDED, both with the paper's labels",
                "InfoUtil, the paper's labels",
                "RDED, the paper's labels",
            ),
        ),
        students=_RESNETS,
    ),
    "table2": Recipe(
        "Table 2: cross-architecture performance",
        "Do sets distilled with one architecture train others?",
        (_OURS, _LITERAL, _RDED, RANDOM),
        _OVER_RDED,
        (10,),
        ("resnet18", "resnet50", "mobilenet_v2", "vgg11", "swin_v2_t"),
        tuple(
            (teacher, ("resnet18", "mobilenet_v2", "swin_v2_t"))
            for teacher in ("resnet18", "resnet50", "mobilenet_v2", "vgg11", "swin_v2_t")
        ),
    ),
    "table5": Recipe(
        "Table 5: large IPC",
        "Does the lead last where a set is large?",
        (_OURS, _LITERAL, _RDED, RANDOM),
        _OVER_RDED,
        (50, 100, 200),
        ("resnet18",),
        (("resnet18", ("resnet18", "resnet50")),),
        note="For ImageNet-1K at IPC 200 the paper takes full images from a pool of 600 a class: "
        "`--images-per-class 600 --factor 1`.",
    ),
    "table6": Recipe(
        "Table 6: component ablation",
        "Is the gradient norm a better score than the loss, and are attribution crops better than random ones? The "
        "paper has three of the four combinations; all four are here.",
        (
            _RDED,
            Row("random crops, gradient norm", "rded rank_by=grad_norm", "gradient norm"),
            Row(
                "attribution crops, loss",
                "infoutil preset=paper within=min_loss rank_by=loss order=low",
            ),
            Row(
                "attribution crops, gradient norm",
                "infoutil preset=paper",
                "gradient norm and attribution",
            ),
            Row("InfoUtil", "infoutil"),
            RANDOM,
        ),
        (
            Gain(
                "gradient norm over loss, random crops",
                "random crops, gradient norm",
                "RDED",
                "gradient norm",
                "RDED",
            ),
            Gain(
                "gradient norm over loss, attribution crops",
                "attribution crops, gradient norm",
                "attribution crops, loss",
            ),
            Gain(
                "attribution crops over random ones, gradient norm",
                "attribution crops, gradient norm",
                "random crops, gradient norm",
                "gradient norm and attribution",
                "gradient norm",
            ),
            Gain("attribution crops over random ones, loss", "attribution crops, loss", "RDED"),
            Gain(
                "both over neither",
                "attribution crops, gradient norm",
                "RDED",
                "gradient norm and attribution",
                "RDED",
            ),
            Gain("InfoUtil's defaults over RDED", "InfoUtil", "RDED"),
        ),
        note="RDED is random crops with the lowest loss. Attribution crops are the paper's: half-side windows, four "
        "noisy and one clean.",
    ),
    "table7": Recipe(
        "Table 7: noise ablation",
        "Does noise on the pooled attribution, which spreads an image's crops, train better students?",
        (
            Row("noise, the paper's rules", "infoutil preset=paper", "noise"),
            Row("no noise, the paper's rules", "infoutil preset=paper alpha=0", "no noise"),
            Row("noise, least-loss crop", "infoutil within=min_loss"),
            Row("no noise: InfoUtil's defaults", "infoutil"),
            RANDOM,
        ),
        (
            Gain(
                "noise over none, the paper's rules",
                "noise, the paper's rules",
                "no noise, the paper's rules",
                "noise",
                "no noise",
            ),
            Gain("noise over none, our windows", "noise, least-loss crop", "no noise: InfoUtil's defaults"),
        ),
        note="The defaults keep the clean crop of an image, so noise has no part in them; the row above them keeps the "
        "one of the five crops that the teacher reads best.",
    ),
    "table8": Recipe(
        "Table 8: Grad-CAM against Shapley",
        "Do Shapley values find better crops than Grad-CAM?",
        (
            Row("Shapley, the paper's rules", "infoutil preset=paper", "Shapley"),
            Row("Grad-CAM, the paper's rules", "infoutil preset=paper attribution=grad_cam", "Grad-CAM"),
            Row("Shapley, InfoUtil's defaults", "infoutil"),
            Row("Grad-CAM, InfoUtil's defaults", "infoutil attribution=grad_cam"),
            RANDOM,
        ),
        (
            Gain(
                "Shapley over Grad-CAM, the paper's rules",
                "Shapley, the paper's rules",
                "Grad-CAM, the paper's rules",
                "Shapley",
                "Grad-CAM",
            ),
            Gain(
                "Shapley over Grad-CAM, InfoUtil's defaults",
                "Shapley, InfoUtil's defaults",
                "Grad-CAM, InfoUtil's defaults",
            ),
        ),
    ),
    "table9": Recipe(
        "Table 9: coresets",
        "How far are real images, selected and not cut, behind a distilled set? The paper compares their hard-label "
        "numbers (ConvNet with InstanceNorm) with InfoUtil's soft-label ones; here every selection gets both.",
        (
            *(
                Row(f"{title}, hard labels", method, title, protocol="dc")
                for title, method in (
                    ("Random", "random"),
                    ("Herding", "herding"),
                    ("K-Center", "k_center"),
                    ("Forgetting", "forgetting"),
                    ("K-Means", "k_means"),
                )
            ),
            RANDOM,
            Row("herding, same soft labels", "herding"),
            Row("k-center, same soft labels", "k_center"),
            Row("forgetting, same soft labels", "forgetting"),
            Row("k-means, same soft labels", "k_means"),
            _OURS,
        ),
        (
            Gain("InfoUtil over herding", "InfoUtil", "Herding, hard labels", "InfoUtil", "Herding"),
            Gain("the same, both with soft labels", "InfoUtil", "herding, same soft labels"),
            Gain("InfoUtil over random images, both with soft labels", "InfoUtil", RANDOM.name),
        ),
        teachers=("convnet",),
    ),
    "table10": Recipe(
        "Table 10: coresets, ResNet-18",
        "As Table 9, with ResNet-18 and k-means.",
        (
            *(
                Row(f"{title}, hard labels", method, title, protocol="dc")
                for title, method in (("Random", "random"), ("Herding", "herding"), ("K-Means", "k_means"))
            ),
            RANDOM,
            Row("herding, same soft labels", "herding"),
            Row("k-means, same soft labels", "k_means"),
            _OURS,
        ),
        (
            Gain("InfoUtil over herding", "InfoUtil", "Herding, hard labels", "InfoUtil", "Herding"),
            Gain("the same, both with soft labels", "InfoUtil", "herding, same soft labels"),
        ),
        (10,),
        ("resnet18",),
    ),
    "table11": Recipe(
        "Table 11: one fully converged teacher for all",
        "What is left of the lead where method and baseline get the same labels, a fully trained teacher's?",
        (_OURS, _LITERAL, _RDED, RANDOM),
        _OVER_RDED,
        students=_RESNETS,
    ),
    "figure4": Recipe(
        "Figure 4: early against full label teachers",
        "The paper: at IPC 1 the labels of an early teacher are better than the full one's, at IPC 10 the full one's "
        "are. One row for each checkpoint beside the teacher file (`<teacher>-epochN.safetensors`).",
        (
            Row("InfoUtil", "infoutil", labels=STAGES),
            Row("RDED", "rded", labels=STAGES),
            Row("random images", "random", labels=STAGES),
        ),
        ipcs=(1, 10),
        teachers=("convnet",),
        note="The figure's values are not printed in the paper.",
    ),
}
