"""The trial of a fast method on a model: its norms for two images against those of the loop over images.

What it finds is remembered for a model as it stands, for one kind of input: a model that is changed is tried again.

The algebra is tried in float64, whatever the model's precision: in float32 an activation that is zero but for rounding
can be on in a batch of two and off in a batch of one, where other kernels run, and the norms then differ by more than
rounding. What runs in the end is tried as well, in the model's own precision and layout, at a batch of one, of two and
at the size of every chunk. There a method is refused where it fails on images of noise too, on which such an
activation has no chance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ddfast.gradients.fingerprint import fingerprint
from ddfast.gradients.ghost import UnservedModel
from ddfast.gradients.preservation import substituted

Norms = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]

_KEPT = 16  # kinds of input for each model
_RUNS = 8  # of a model that draws random numbers

_TRIALS: WeakKeyDictionary[nn.Module, dict[Any, dict[str, Any]]] = WeakKeyDictionary()


class Trial:
    """What is known of a model as it stands and of inputs like `images` [B, ...], prepared, of one chunk.

    `forward` gives the model's logits, `loop` the norms by definition.

    Attributes:
        classes: the model's number of outputs.
        refusals: for each method tried, why it must not be used, None where it may.

    Raises:
        ValueError: a model that returns no logits, or others each time.
    """

    def __init__(self, model: nn.Module, images: Tensor, forward: Callable[..., Tensor], loop: Norms) -> None:
        self.model, self.images = model, images
        self.autocast = torch.is_autocast_enabled(images.device.type)
        self.forward, self.loop = forward, loop
        self.key = _key(model, images)
        known = _TRIALS.setdefault(model, {})
        if self.key not in known:
            self.pairs, self.classes = self._prepared()
            while len(known) >= _KEPT:
                known.pop(next(iter(known)))
            known[self.key] = {"classes": self.classes, "refusals": {}, "sizes": {}, "warned": set()}
        self._known = known[self.key]
        self.classes = self._known["classes"]
        self.refusals: dict[str, str | None] = self._known["refusals"]

    def serves(self, name: str, norms: Norms) -> bool:
        """Whether a method may be used, after a trial on two images where there was none yet."""
        if name not in self.refusals:
            self.refusals[name] = self._refusal(name, norms)
        return self.refusals[name] is None

    def held(
        self, name: str, norms: Norms, model: nn.Module, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Norms and logits of a chunk; those of a size that was not seen yet are held against the loop's.

        Raises:
            UnservedModel: the method does not serve the model, or its norms are not the loop's.
        """
        found, logits = norms(model, images, labels)
        sizes = self._known["sizes"].setdefault(name, {1, 2})
        if len(images) in sizes:
            return found, logits
        judged = found
        with torch.autocast(images.device.type, enabled=False):
            if self.autocast:  # the loop keeps to the model's own precision
                judged = norms(model, images, labels)[0]
            reason = self._disagreement(judged, images, labels)
            if reason is not None:
                noise = _noise(images, len(images))
                least = self.forward(model, noise).argmin(1)
                reason = self._disagreement(norms(model, noise, least)[0], noise, least) and reason
        if reason is not None:
            raise UnservedModel(reason)
        sizes.add(len(images))
        return found, logits

    def warn(self, chain: Sequence[str], used: str) -> None:
        """Warn once where the first method of a chain does not serve the model, and say which one does."""
        if not chain or used == chain[0] or (chain, used) in self._known["warned"]:
            return
        self._known["warned"].add((chain, used))
        names = {"ghost": "the ghost method", "vmap": "vmap", "loop": "the loop over images"}
        refused = [name for name in chain if self.refusals.get(name) is not None]
        reasons = "; ".join(f"{names[name]}: {self.refusals[name]}" for name in refused)
        if len(refused) == 1:
            reasons = str(self.refusals[refused[0]])
        verb = "does" if len(refused) == 1 else "do"
        warnings.warn(
            f"grad_norm: {' and '.join(names[name] for name in refused)} {verb} not serve "
            f"{type(self.model).__name__}, using {names[used]}: {reasons}",
            UserWarning,
            stacklevel=4,
        )

    def _prepared(self) -> tuple[list[Tensor], int]:
        """Batches of two unlike images that the model takes, and its number of outputs.

        Raises:
            ValueError: the model returns something else each time.
        """
        first = self.images[:2]
        classes = self.forward(self.model, first).shape[1]
        pairs = []
        noise = _noise(self.images, 2)
        varied = bool((self.images[0] != self.images[0].flatten()[:1]).any())
        for pair in [torch.cat([self.images[:1], noise[:1]]), noise] if varied else [noise]:
            try:
                if self.forward(self.model, pair).shape[1] == classes:
                    pairs.append(_laid_out(pair, self.images))
            except Exception:  # noise is no input of this model
                continue
        pairs = pairs or [first]
        for pair in pairs[:1]:
            self._require_one_output(pair)
        return pairs, classes

    def _require_one_output(self, images: Tensor) -> None:
        before = _states(images.device)
        once = self.forward(self.model, images)
        random = not all(map(torch.equal, before, _states(images.device)))
        # What draws numbers must return the same to the bit, but for a GPU's order of additions.
        tolerance = 1e-3 if not random else 0.0 if images.device.type == "cpu" else 1e-5
        for _ in range(_RUNS if random else 1):
            again = self.forward(self.model, images)
            if not torch.allclose(again, once, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True):
                raise ValueError(
                    f"the model ({type(self.model).__name__}) returns other logits for the same images each time, "
                    "which makes the norm of an image depend on chance; switch off what is random in it"
                )

    def _refusal(self, name: str, norms: Norms) -> str | None:
        """Why a method must not be used for the model; None where it may."""
        if not hasattr(self, "pairs"):
            self.pairs, _ = self._prepared()
        with torch.autocast(self.images.device.type, enabled=False):
            reason: str | None = None
            for number, pair in enumerate(self.pairs):
                labels = self.forward(self.model, pair).argmin(1)
                try:
                    if name == "ghost" and number == 0:
                        reason = self._refusal_in_double(norms, pair, labels)
                        if reason is not None:
                            return reason
                    found = norms(self.model, pair, labels)[0]
                    expected = self.loop(self.model, pair, labels)[0]
                    reason = _difference(found, expected, pair)
                    if reason is None:
                        alone = norms(self.model, pair[:1], labels[:1])[0]
                        reason = _difference(alone, expected[:1], pair)
                except UnservedModel as error:
                    return str(error)
                except Exception as error:
                    if isinstance(error, torch.OutOfMemoryError | MemoryError):
                        raise
                    reason = raised(error)
                if reason is None:
                    return None
            return reason

    def _refusal_in_double(self, norms: Norms, images: Tensor, labels: Tensor) -> str | None:
        """The trial in float64; None as well for a model that does not run in float64."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        double = {id(t): t.detach().double() for t in tensors if t.is_floating_point()}
        images = images.double() if images.is_floating_point() else images
        try:
            with substituted(self.model, double):
                found = norms(self.model, images, labels)[0]
                expected = self.loop(self.model, images, labels)[0]
        except UnservedModel:
            raise
        except Exception:
            return None
        return _difference(found, expected, images)

    def _disagreement(self, found: Tensor, images: Tensor, labels: Tensor) -> str | None:
        """Why norms of a chunk are wrong, judged by its two largest; None where they are the loop's."""
        which = found.nan_to_num(0.0, 0.0).topk(min(2, len(found))).indices
        expected = self.loop(self.model, images[which], labels[which])[0]
        return _difference(found[which], expected, images, count=len(images))


def _difference(found: Tensor, expected: Tensor, images: Tensor, count: int | None = None) -> str | None:
    """A sentence where norms are not those expected, within what their precision allows."""
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(found.dtype, 0.1)
    if images.dtype in (torch.float16, torch.bfloat16):
        tolerance = 0.1
    elif images.device.type != "cpu" and found.dtype == torch.float32:
        tolerance = 2e-2  # products of TF32
    if torch.allclose(found, expected, rtol=tolerance, atol=1e-6, equal_nan=True):
        return None
    words = {1: "one image", 2: "two images"}
    where = words.get(count or len(found), f"{count} images")
    return f"on {where} it gives {found.tolist()} where autograd gives {expected.tolist()}"


def _states(device: torch.device) -> list[Tensor]:
    """Of the generators of random numbers that a model on the device draws from."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _noise(images: Tensor, count: int) -> Tensor:
    """`count` images of uniform noise in the range of the given ones; of integers, of those between them."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, *images.shape[1:])
    if images.numel() == 0:
        return images.new_zeros(shape)
    if images.is_floating_point():
        low, high = (float(bound) for bound in torch.aminmax(images.nan_to_num(0.0, 1.0, 0.0)))
        high = high if high > low else low + 1
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    elif images.dtype == torch.bool:
        drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int64)
    else:
        low, high = int(images.min()), int(images.max())
        drawn = torch.randint(low, max(high, low + 1) + 1, shape, generator=generator, dtype=torch.int64)
    return _laid_out(drawn.to(images.device, images.dtype), images)


def _laid_out(batch: Tensor, images: Tensor) -> Tensor:
    """A batch in the memory layout of others."""
    if images.ndim == 4 and not images.is_contiguous():
        return batch.contiguous(memory_format=torch.channels_last)
    return batch


def raised(error: Exception) -> str:
    """An exception as a reason: its kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"it raises {type(error).__name__}: {lines[0] if lines else 'without a message'}"


def _key(model: nn.Module, images: Tensor) -> tuple[Any, ...]:
    """What a verdict holds for."""
    layout = images.ndim == 4 and not images.is_contiguous()
    device = images.device.type
    switches = torch.is_autocast_enabled(device), torch.get_default_dtype()
    return (*fingerprint(model), images.dtype, tuple(images.shape[1:]), layout, images.device, *switches)
