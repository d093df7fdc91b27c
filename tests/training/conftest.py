"""A rendered set that a small network learns in seconds: stripes whose direction is the class."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddfast.training import ImageSet

CLASSES = ["across", "down", "rising"]
SIZE = 16


def render(count, seed):
    """`count` images a class, uint8 [N, 3, 16, 16], and their labels: stripes of random colour, phase and
    noise."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    images, labels = [], []
    for label, along in enumerate((y, x, x + y)):
        for _ in range(count):
            wave = np.sin(along * 1.1 + draws.uniform(0, 2 * np.pi))
            colour = draws.uniform(0.3, 1.0, size=(3, 1, 1))
            image = 128 + 70 * colour * wave + draws.normal(0, 35, size=(3, SIZE, SIZE))
            images.append(np.clip(image, 0, 255).astype(np.uint8))
            labels.append(label)
    return ImageSet(torch.from_numpy(np.stack(images)), torch.tensor(labels))


@pytest.fixture(scope="session")
def toy_train():
    return render(60, seed=0)


@pytest.fixture(scope="session")
def toy_test():
    return render(30, seed=1)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory, toy_train, toy_test):
    """The same as an image folder, with two files that are no images."""
    root = tmp_path_factory.mktemp("toy")
    for split, images in (("train", toy_train), ("test", toy_test)):
        for number, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04d}.png")
    (root / "train" / "across" / "0000a.png").write_bytes(b"not an image")
    (root / "train" / "down" / "empty.png").write_bytes(b"")
    return root
