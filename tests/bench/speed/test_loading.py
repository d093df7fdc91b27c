"""The page of the loading bench from made-up figures, and its stages on a few images. Nothing is timed."""

from PIL import Image

from bench.speed import loading
from ddfast.data.native_jpeg import torchvision_decodes
from ddfast.data.opening import open_source
from tests.data.rendering import encoded, smooth, write_folder


def test_the_page_compares_with_pillow_and_judges_the_score_pass():
    common = {"data": "photos.zip", "size": 224, "threads": 2, "images": 64, "p20": "90", "p80": "110"}
    common |= {"mean_difference": "0.002", "max_difference": 1}
    rows = [
        {**common, "loader": "pillow", "p50": "100.0"},
        {**common, "loader": "torchvision", "p50": "210.0"},
    ]
    shares = {"photos.zip": {"pillow": {"read": 1.0, "decode": 6.0, "resize and crop": 3.0}}}
    one = {"data": "photos.zip", "size": 224, "arch": "resnet18", "loader": "pillow", "sources": 40}
    one |= {"seconds": 20.0, "processor_seconds": 36.0, "busy": 0.97}
    page = loading.report(rows, shares, [one], "cpu")
    assert "| photos.zip | 224 | torchvision | 2 | 210 | 90 to 110 | 2.10 | 0.002 / 1 |" in page
    assert "| photos.zip | pillow | decode | 6.000 | 60% |" in page
    assert "| photos.zip | resnet18, 224 px | pillow | 40 | 2.00 | 900.0 | 97.0% |" in page
    assert "90% of the time: met" in page
    assert "90% of the time: missed" in loading.report(rows, shares, [{**one, "busy": 0.8}], "cpu")
    assert "| decodes | libjpeg-turbo | nvJPEG in CUDA | the engine;" in page
    assert "ddfast score" not in loading.report(rows, shares, [], "cpu")


def test_the_stages_of_each_loader(tmp_path):
    picture = encoded(Image.fromarray(smooth(60, 45)), "JPEG")
    files = {f"train/{name}/{number}.jpg": picture for name in "ab" for number in range(2)}
    with open_source(write_folder(tmp_path, files)) as source:
        found = loading.stages(source, source.samples[:], 24)
    assert set(found) == {"pillow", *(["torchvision"] if torchvision_decodes() else [])}
    assert {"read", "decode", "resize and crop"} == set(found["pillow"])
    assert all(taken["read"] > 0 and taken["decode"] > 0 for taken in found.values())
