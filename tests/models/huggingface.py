"""Image classifiers in the Hub's layout: made by `transformers` where it is installed, else by a stand-in for it.

The stand-in has the same calls and the same three files, `config.json`, `preprocessor_config.json` and
`model.safetensors`; what it cannot find it says as `transformers` does offline.
"""

import importlib.util
import json
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ddfast.models.published import _transformers

INSTALLED = importlib.util.find_spec("transformers") is not None
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


class _Classifier(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.config = types.SimpleNamespace(
            id2label=dict(enumerate(names)), num_labels=len(names), model_type="resnet"
        )
        self.body = nn.Conv2d(3, 8, 3, stride=2)
        self.classifier = nn.Linear(8, len(names))

    def forward(self, pixel_values):
        pooled = self.body(pixel_values).relu().mean(dim=(2, 3))
        return types.SimpleNamespace(logits=self.classifier(pooled))

    def save_pretrained(self, folder):
        labels = {str(place): name for place, name in self.config.id2label.items()}
        config = {"model_type": "resnet", "id2label": labels, "label2id": {}}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, name, output_loading_info, trust_remote_code):
        assert trust_remote_code is False
        _there(name)
        config = json.loads((Path(name) / "config.json").read_text())
        if "id2label" not in config:
            raise ValueError(f"Unrecognized model in {name}.")
        model = cls(list(config["id2label"].values()))
        model.config.image_size = config.get("image_size")
        held = load_file(Path(name) / "model.safetensors")
        told = model.load_state_dict(held, strict=False)
        return model.eval(), {"missing_keys": set(told.missing_keys), "mismatched_keys": set()}


class _Processor:
    def __init__(self, said):
        self.said = said

    def save_pretrained(self, folder):
        (folder / "preprocessor_config.json").write_text(json.dumps(self.said))

    @classmethod
    def from_pretrained(cls, name, trust_remote_code):
        assert trust_remote_code is False
        _there(name)
        return cls(json.loads((Path(name) / "preprocessor_config.json").read_text()))

    def __call__(self, images, return_tensors):
        side = self.said["size"]
        pixels = np.asarray(images, np.float64)[:side, :side].transpose(2, 0, 1) * self.said["rescale_factor"]
        if self.said.get("do_flip_channel_order"):
            pixels = pixels[::-1]
        mean, std = (np.array(self.said[key])[:, None, None] for key in ("image_mean", "image_std"))
        return {"pixel_values": ((pixels - mean) / std)[None].astype(np.float32)}


def _there(name):
    if not Path(name).is_dir():
        raise OSError(
            f"We couldn't connect to the Hub to load the files, and couldn't find them in the cached files: {name}"
        )


STAND_IN = types.ModuleType("transformers")
STAND_IN.utils = types.SimpleNamespace()
STAND_IN.AutoModelForImageClassification = _Classifier
STAND_IN.AutoImageProcessor = _Processor


def make_classifier(folder, names, *, size=16, turned=False, factor=1 / 255):
    """Write a small classifier with random weights, and return it.

    Args:
        folder: made here.
        names: classes in the order of the outputs.
        size: side of its images in pixels.
        turned: whether it reads blue, green, red as MobileViT does, which subtracts no mean.
        factor: what pixels of 0 to 255 are multiplied by before mean and deviation.
    """
    folder.mkdir()
    torch.manual_seed(0)
    said = {"image_mean": MEAN, "image_std": STD, "rescale_factor": factor, "do_flip_channel_order": turned}
    if INSTALLED:
        transformers = _transformers("a test")
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape, **labels)).eval()
        kind = transformers.MobileViTImageProcessor if turned else transformers.ViTImageProcessor
        square = {"height": size, "width": size}
        more = {"crop_size": square, "size": {"shortest_edge": size}} if turned else {"size": square}
        processor = kind(**{**said, **more})
    else:
        model, processor = _Classifier(names).eval(), _Processor({**said, "size": size})
        if turned:
            processor.said |= {"image_mean": (0, 0, 0), "image_std": (1, 1, 1)}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model
