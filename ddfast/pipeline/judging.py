"""Students trained on the images of a synthesis while it goes on: what `--evaluate-every` asks for.

Accuracies are told and kept, never used: nothing of a run is chosen on test data.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ddfast.data.opening import open_source
from ddfast.errors import UsageError
from ddfast.methods.synthesis import State, Synthesis
from ddfast.pipeline.run import Run
from ddfast.progress import say
from ddfast.training.augmentation import normalize
from ddfast.training.distilled_images import DistilledImages
from ddfast.training.evaluation import EvaluationResult, evaluate
from ddfast.training.image_sets import read_test_set
from ddfast.training.protocol import protocol_named
from ddfast.wording import argument


def check_judged(run: Run, method: Synthesis) -> None:
    """Refuse, before anything is written, a run whose images cannot be judged where that is asked for.

    Raises:
        UsageError: no group of the synthesis has all classes, or there is no test split.
    """
    if not run.plan.get("evaluate_every"):
        return
    if not method.judged:
        raise UsageError(
            f"{argument('evaluate_every')} is nothing to {method.name}, whose images are whole only at the end: leave "
            "it out, and use ddfast evaluate"
        )
    classes = len(run.source.class_names)
    if len(method.groups(classes, run.plan["ipc"])) > 1:
        raise UsageError(
            f"{argument('evaluate_every')} needs all {classes} classes in one group: "
            f"give {method.in_one_group(classes, run.plan['ipc'])}"
        )
    open_source(run.data, "test")


class Judge:
    """Trains a student on what a state holds and tests it on the test split, which is decoded once.

    One student a time, of the architecture that was matched, by the method's own protocol.
    """

    def __init__(self, run: Run, method: Synthesis) -> None:
        """Decode the test split.

        Raises:
            UsageError: the data have none.
        """
        self._run, self._method = run, method
        source = open_source(run.data, "test")
        enlarged = protocol_named(method.protocol).enlarged_tests
        self._test = read_test_set(
            source, run.plan["image_size"], enlarged=enlarged, workers=run.workers, quiet=True
        )

    def due(self, step: int) -> bool:
        """Whether the images of a state of so many steps are to be judged."""
        return step % self._run.plan["evaluate_every"] == 0 or step == self._method.steps

    def accuracy(self, state: State) -> float:
        """Test top-1 of a student of the images as they are, in percent."""
        images = self._method.images(state).detach().float().cpu()
        return self._judged(images, state, f"step {state.step}").mean

    def after_rounding(self, state: State) -> dict[str, Any]:
        """What the manifest tells of a finished synthesis: accuracy of the pixels, and of the same in 8 bits."""
        pixels = self._method.images(state).detach().float().cpu()
        return {
            "float32": self._judged(pixels, state, "the pixels").as_dict(),
            "8 bits": self._judged(pixels, state, "the same in 8 bits", rounded=True).as_dict(),
        }

    def _judged(self, images: Tensor, state: State, what: str, *, rounded: bool = False) -> EvaluationResult:
        run = self._run
        each = len(images) // len(state.group.classes)
        labels = [label for label in state.group.classes for _ in range(each)]
        if self._method.space == "unit":
            images = normalize(images, run.plan["mean"], run.plan["std"])
        distilled = DistilledImages(
            images=images,
            labels=state.pixels.new_tensor(labels).long().cpu(),
            class_names=run.source.class_names,
            mean=run.plan["mean"],
            std=run.plan["std"],
            factor=run.plan["factor"],
            learned_rate=self._method.learned_rate(state),
            whitening=self._method.whitening(run.context),
        )
        arch, options = self._method.judged_on(run.context)
        result = evaluate(
            distilled,
            self._test,
            arch=arch,
            arch_options=options,
            seeds=[run.plan["seed"]],
            teacher=run.label_teacher,
            protocol=self._protocol(),
            device=str(run.device),
            quiet=True,
            rounded=rounded,
        )
        say(f"{what}: test top-1 {result.mean:.2f}", quiet=run.quiet)
        return result

    def _protocol(self) -> str:
        """The method's own, without mirror images where it was told to make none."""
        protocol = self._method.protocol
        mirrored = protocol != "dsa" or getattr(self._method.options, "flip", True)
        return protocol if mirrored else f"{protocol}_no_flip"
