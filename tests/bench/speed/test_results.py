import csv

import pytest
import torch
from PIL import Image

from bench import facts
from bench.speed.measuring import Spread
from bench.speed.registry import Entry, Measurement, Target
from bench.speed.results import COLUMNS, plot, read_csv, rows_of, summary, write_csv

CPU = torch.device("cpu")
ENTRY = Entry(
    "grad_norm", "norms", 1.0, lambda settings: [],
    {"cpu": {"float32": Target(5.0, memory=0.25), "tail: float32": Target(share=0.02)}},
)  # fmt: skip
SPEED = Measurement(
    "ResNet-18", "float32", "vmap", "images", "norms: 1e-07 <= 1e-04", 7,
    seconds=Spread(0.009, 0.01, 0.011), peer_seconds=Spread(0.05, 0.06, 0.07), ratio=Spread(5.5, 6.0, 6.5),
    extra_bytes=10 * 2**20, peer_extra_bytes=100 * 2**20, peer_package="captum", note="a note",
)  # fmt: skip
SHARE = Measurement("tail", "float32", "", "images", "boxes: 0 <= 0", 3, share=Spread(0.01, 0.03, 0.04))


def rows():
    return rows_of(ENTRY, [SPEED, SHARE], CPU)


def test_rows_hold_what_the_numbers_depend_on():
    speed, share = rows()
    assert tuple(speed) == COLUMNS
    assert (speed["entry"], speed["ratio_p50"], speed["extra_bytes"]) == ("grad_norm", "6", str(10 * 2**20))
    assert (speed["target_ratio"], speed["target_memory"], speed["met"]) == ("5", "0.25", "true")
    assert (share["target_share"], share["met"], share["ratio_p50"]) == ("0.02", "false", "")
    assert speed["device"] == "cpu"
    assert int(speed["threads"]) == torch.get_num_threads()
    assert speed["torch"] == torch.__version__
    assert speed["peer_version"] == facts.version("captum")
    assert speed["dirty"] in ("true", "false")
    assert all(speed[name] for name in ("device_name", "triton", "ddfast", "commit", "date"))


def test_csv_comes_back_and_keeps_the_rows_of_another_device(tmp_path):
    path = tmp_path / "new" / "grad_norm.csv"
    write_csv(path, rows())
    assert read_csv(path) == rows()
    on_gpu = [{**row, "device": "cuda", "ratio_p50": "30"} for row in rows()]
    write_csv(path, on_gpu)
    write_csv(path, rows())
    assert [row["device"] for row in read_csv(path)] == ["cpu", "cpu", "cuda", "cuda"]
    assert read_csv(path)[2]["ratio_p50"] == "30"


def test_a_csv_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(["arm", "ipc"])
    with pytest.raises(ValueError, match="does not have the columns"):
        read_csv(path)


def test_summary_tells_ratios_targets_shares_and_conditions():
    text = summary(rows())
    assert (
        "| grad_norm | ResNet-18 | float32 | vmap | **6** (5.5 to 6.5) | ≥ 5, memory ≤ 0.25 | 100 images |"
        in text
    )
    assert "0.10 (10 of 100 MiB)" in text
    assert "| grad_norm | tail | float32 | 3.00 (1.00 to 4.00) | ≤ 2 (missed) |" in text
    assert "- grad_norm: a note" in text
    assert "norms: 1e-07 <= 1e-04" in text
    assert torch.__version__ in text


def test_plot_is_a_picture_whatever_rows_there_are(tmp_path):
    for number, some in enumerate((rows(), rows()[:1], [{**rows()[0], "target_ratio": "", "met": ""}])):
        path = tmp_path / f"{number}.png"
        plot(path, some)
        with Image.open(path) as picture:
            assert picture.width > 600
            assert len(picture.convert("RGB").getcolors(10**6)) > 20
    plot(tmp_path / "none.png", rows()[1:])  # a share outside the score pass is in the table alone
    assert not (tmp_path / "none.png").exists()
