import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ddfast import files, state
from ddfast.data import open_source
from ddfast.errors import UsageError
from ddfast.files import temporary_path
from ddfast.models import create_model, load_teacher
from ddfast.ops import precision
from ddfast.seeding import generator, seeded
from ddfast.training import ImageSet, TeacherConfig, fit_teacher, read_training_set, train_teacher
from ddfast.training import teacher as module
from ddfast.training.augmentation import normalize, random_crop_flip
from ddfast.training.image_sets import StreamedSet, measure_accuracy
from tests.training.conftest import CLASSES, SIZE

TINY = TeacherConfig(arch="convnet3", epochs=3, image_size=SIZE, arch_options={"width": 16}, batch_size=32)


def fit(train, test, out, config=TINY, **options):
    return fit_teacher(train, test, config, class_names=CLASSES, out=out, quiet=True, **options)


def test_a_teacher_learns_the_toy_set(toy_train, toy_test, tmp_path):
    teacher = fit(toy_train, toy_test, tmp_path / "t.safetensors", replace(TINY, epochs=6), device="cpu")
    assert teacher.top1 > 85  # chance is 33
    assert teacher.epoch == 6
    measured = measure_accuracy(teacher.model, toy_test, teacher.mean, teacher.std, torch.device("cpu"))
    assert measured.top1 == pytest.approx(teacher.top1, abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.safetensors"]


def test_the_file_says_how_it_was_made(toy_train, toy_test, tmp_path):
    teacher = fit(toy_train, toy_test, tmp_path / "t.safetensors", data_fingerprint="abc")
    training = teacher.facts["training"]
    assert training["data"] == "abc"
    assert (training["lr"], training["augment"], training["optimizer"]) == (0.05, "crop-flip", "sgd")
    assert (training["weight_decay"], training["momentum"], training["seed"]) == (5e-4, 0.9, 0)
    assert teacher.facts["arithmetic"] == "float32"
    assert (teacher.facts["images"], teacher.facts["unreadable"]) == (180, 0)
    assert json.dumps(teacher.facts)


def test_the_steps_are_sgd_with_a_cosine_on_augmented_batches(toy_train, tmp_path):
    """Two epochs against the loop written out."""
    config = replace(TINY, epochs=2, batch_size=64, weight_decay=1e-3, momentum=0.8, lr=0.03)
    teacher = fit(toy_train, None, tmp_path / "t.safetensors", config, device="cpu")
    with seeded(0, "weights"):
        model = create_model("convnet3", 3, SIZE, width=16).to(memory_format=torch.channels_last)
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for epoch in (1, 2):
        order = torch.randperm(180, generator=generator(0, "order", epoch))
        draws = generator(0, "augmentation", epoch)
        for step, index in enumerate(order.split(64)):
            lr = 0.03 * 0.5 * (1 + math.cos(math.pi * (3 * (epoch - 1) + step) / 6))
            images = normalize(random_crop_flip(toy_train.images[index], draws), teacher.mean, teacher.std)
            loss = F.cross_entropy(model(images), toy_train.labels[index])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient, v in zip(model.parameters(), gradients, velocity, strict=True):
                    v.mul_(0.8).add_(gradient + 1e-3 * parameter)
                    parameter.sub_(lr * v)
    assert teacher.top1 is None
    for ours, expected in zip(teacher.model.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "precision": "auto", "schedule": "constant"}])
@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_resumed_run_writes_the_same_bytes(
    toy_train, toy_test, tmp_path, monkeypatch, changes, killed_after
):
    config, train = replace(TINY, **changes), toy_train
    whole = tmp_path / "whole.safetensors"
    fit(train, toy_test, whole, config, checkpoint_epochs=[2])

    part = tmp_path / "part.safetensors"
    original, calls = module._train_epoch, []

    def killed(*arguments):
        if len(calls) == killed_after:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(module, "_train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(train, toy_test, part, config, checkpoint_epochs=[2])
    assert not part.exists()
    monkeypatch.setattr(module, "_train_epoch", original)
    fit(train, toy_test, part, config, checkpoint_epochs=[2], resume=True)
    assert part.read_bytes() == whole.read_bytes()
    checkpoints = [tmp_path / f"{name}-epoch2.safetensors" for name in ("part", "whole")]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()
    assert not list(tmp_path.glob("*.state"))


def test_what_auto_is_stands_from_the_start_of_a_training(toy_train, tmp_path, monkeypatch):
    config, original = replace(TINY, precision="auto", epochs=2), module._train_epoch
    monkeypatch.setattr(precision, "cpu_gains_from_bfloat16", lambda: False)
    whole = fit(toy_train, None, tmp_path / "whole.safetensors", config)
    assert whole.facts["arithmetic"] == "float32"

    def killed(fitting, train, config, epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        return original(fitting, train, config, epoch, *rest)

    monkeypatch.setattr(module, "_train_epoch", killed)
    part = tmp_path / "part.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(toy_train, None, part, config)
    monkeypatch.setattr(module, "_train_epoch", original)
    monkeypatch.setattr(precision, "cpu_gains_from_bfloat16", lambda: True)
    fit(toy_train, None, part, config, resume=True)
    assert part.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert fit(toy_train, None, tmp_path / "new.safetensors", config).facts["arithmetic"] == "bfloat16"


def test_dropout_has_a_seed_of_its_own(toy_train, tmp_path, monkeypatch):
    def with_dropout(*_, **__):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * SIZE * SIZE, 3)
        )

    monkeypatch.setattr(module, "create_model", with_dropout)
    monkeypatch.setattr("ddfast.models.teacher.create_model", with_dropout)
    config = replace(TINY, epochs=1, arch_options={})
    torch.manual_seed(0)
    first = fit(toy_train, None, tmp_path / "a.safetensors", config)
    torch.manual_seed(1)
    second = fit(toy_train, None, tmp_path / "b.safetensors", config)
    assert first.sha256 == second.sha256


def test_a_checkpoint_is_the_model_of_that_epoch(toy_train, toy_test, tmp_path):
    config = replace(TINY, schedule="constant", lr=0.01)
    fit(toy_train, toy_test, tmp_path / "long.safetensors", config, checkpoint_epochs=[1, 2])
    short = fit(toy_train, toy_test, tmp_path / "short.safetensors", replace(config, epochs=2))
    early = load_teacher(tmp_path / "long-epoch2.safetensors")
    assert early.epoch == 2
    for one, two in zip(early.model.state_dict().values(), short.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert load_teacher(tmp_path / "long-epoch1.safetensors").sha256 != early.sha256


def test_more_epochs_lower_the_loss(toy_train, tmp_path, capsys):
    fit_teacher(toy_train, None, TINY, class_names=CLASSES, out=tmp_path / "t.safetensors")
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert len(losses) == 3
    assert losses[2] < 0.7 * losses[0]


def test_a_folder_trains_and_unreadable_files_are_counted(toy_folder, toy_train, toy_test, tmp_path, capsys):
    settings = {"arch": "convnet3", "epochs": 2, "arch_options": {"width": 16}, "batch_size": 32}
    teacher = train_teacher(toy_folder, out=tmp_path / "folder.safetensors", workers=0, **settings)
    assert "left out 2 training images" in capsys.readouterr().err
    assert (teacher.class_names, teacher.image_size) == (CLASSES, SIZE)
    assert (teacher.facts["images"], teacher.facts["unreadable"]) == (180, 2)
    memory = fit(toy_train, toy_test, tmp_path / "memory.safetensors", replace(TINY, epochs=2))
    for one, two in zip(teacher.model.state_dict().values(), memory.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert teacher.top1 == memory.top1

    again = train_teacher(
        toy_folder, out=tmp_path / "folder.safetensors", workers=0, resume=True, quiet=True, **settings
    )
    assert again.sha256 == teacher.sha256
    for changed, message in (({"lr": 0.2}, "another lr"), ({"seed": 1}, "another seed")):
        with pytest.raises(UsageError, match=message):
            train_teacher(
                toy_folder,
                out=tmp_path / "folder.safetensors",
                workers=0,
                resume=True,
                quiet=True,
                **{**settings, **changed},
            )
    with pytest.raises(UsageError, match="no checkpoint of epoch 1"):
        train_teacher(
            toy_folder,
            out=tmp_path / "folder.safetensors",
            workers=0,
            resume=True,
            quiet=True,
            checkpoint_epochs=[1],
            **settings,
        )


def test_a_split_beyond_the_memory_limit_is_streamed_to_the_same_images(toy_folder, toy_train, tmp_path):
    source = open_source(toy_folder, "train")
    streamed = read_training_set(source, SIZE, workers=0, quiet=True, memory_limit=10_000)
    held = read_training_set(source, SIZE, workers=0, quiet=True)
    assert isinstance(streamed, StreamedSet)
    assert isinstance(held, ImageSet)
    assert torch.equal(held.images, toy_train.images)
    batches = list(streamed.batches(torch.arange(len(streamed)), 32))
    assert torch.equal(torch.cat([images for images, _ in batches]), held.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), held.labels)
    assert [len(labels) for _, labels in batches] == [32] * 5 + [20]
    assert streamed.bad == held.bad == {"across/0000a.png", "down/empty.png"}
    teacher = fit(streamed, None, tmp_path / "t.safetensors", replace(TINY, epochs=1))
    assert (teacher.facts["images"], teacher.facts["unreadable"]) == (180, 2)


def test_data_without_a_test_split_trains_without_an_accuracy(toy_folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(toy_folder / "train")
    teacher = train_teacher(
        tmp_path / "data", out=tmp_path / "t.safetensors", arch="convnet3", epochs=1, workers=0
    )
    assert teacher.top1 is None
    assert "accuracy will not be measured" in capsys.readouterr().err


def test_large_images_are_cut_at_random_sizes(tmp_path):
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 80, 80), generator=draws, dtype=torch.uint8)
    config = TeacherConfig(arch="convnet3", epochs=1, image_size=72, arch_options={"width": 4}, batch_size=3)
    assert config.resolved().augment == "rrc-flip"
    assert config.resolved().stored_size == 80
    assert replace(config, image_size=64).resolved().augment == "crop-flip"
    train = ImageSet(images, torch.arange(6) % 3)
    assert fit(train, None, tmp_path / "t.safetensors", config).epoch == 1


def test_the_folder_of_the_file_is_made(toy_train, tmp_path):
    out = tmp_path / "new" / "deep" / "t.safetensors"
    fit(toy_train, None, out, replace(TINY, epochs=1))
    assert out.is_file()


def test_a_streamed_split_without_a_readable_image_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(b"no")
    streamed = StreamedSet(open_source(tmp_path), SIZE, workers=0)
    with pytest.raises(UsageError, match="none of the 2 training images can be decoded"):
        fit(streamed, None, tmp_path / "t.safetensors")


def test_defaults_of_the_learning_rate():
    def lr(**changes):
        return replace(TINY, **changes).resolved().lr

    assert lr() == 0.05
    assert lr(arch="resnet18") == 0.1
    assert lr(optimizer="adamw") == 1e-3
    assert lr(lr=0.3) == 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; known: sgd, adamw"),
        ({"schedule": "step"}, "unknown schedule 'step'; known: cosine, constant"),
        ({"augment": "mixup"}, "unknown augment 'mixup'; known: crop-flip"),
        ({"precision": "fp16"}, "unknown precision 'fp16'; known: float32, bfloat16, auto"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"normalization": "mnist"}, "unknown normalization 'mnist'"),
        ({"arch": "convnet9"}, "unknown model 'convnet9'"),
        ({"image_size": 12}, "multiple of 8, got 12"),
    ],
)
def test_bad_settings_are_usage_errors(toy_train, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        fit(toy_train, None, tmp_path / "t.safetensors", replace(TINY, **changes))
    assert not list(tmp_path.iterdir())


def test_other_bad_input_is_a_usage_error(toy_folder, toy_train, tmp_path):
    out = tmp_path / "t.safetensors"
    with pytest.raises(UsageError, match=r"checkpoint epochs must lie in 1..3, got 4"):
        fit(toy_train, None, out, checkpoint_epochs=[2, 4])
    with pytest.raises(UsageError, match=r"at least 2 images, got 1"):
        fit(ImageSet(toy_train.images[:1], toy_train.labels[:1]), None, out)
    with pytest.raises(UsageError, match=r"must end in .safetensors"):
        train_teacher(toy_folder, out=tmp_path / "t.pt", arch="convnet3", epochs=1)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        fit(toy_train, None, tmp_path / "folder.safetensors")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot write"):
        fit(toy_train, None, tmp_path / "file" / "t.safetensors")
    with pytest.raises(UsageError, match=r"loss became (nan|inf).*lower lr"):
        fit(toy_train, None, out, replace(TINY, lr=1e30))
    assert not out.exists()


def test_a_damaged_state_is_refused(toy_train, tmp_path):
    out = tmp_path / "t.safetensors"
    (tmp_path / "t.state").write_bytes(b"half a sta")
    with pytest.raises(UsageError, match="no complete safetensors training state"):
        fit(toy_train, None, out, resume=True)
    fit(toy_train, None, out)
    (tmp_path / "t.state").write_bytes(out.read_bytes())
    with pytest.raises(UsageError, match="not a training state"):
        fit(toy_train, None, out, resume=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_an_earlier_run_wrote_is_never_overwritten(toy_train, toy_folder, tmp_path):
    out, one = tmp_path / "t.safetensors", replace(TINY, epochs=1)
    fit(toy_train, None, out, one, checkpoint_epochs=[1])
    before = contents(tmp_path)
    for config in (one, replace(one, seed=1)):
        with pytest.raises(UsageError, match=r"exists already \(a teacher, convnet3, 1 epoch\).*resume=True"):
            fit(toy_train, None, out, config)
    with pytest.raises(UsageError, match="exists already"):  # before the data is even opened
        train_teacher(tmp_path / "nowhere", out=out, arch="convnet3", epochs=1)
    out.rename(tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"t-epoch1.safetensors exists already"):
        fit(toy_train, None, out, replace(one, seed=1), checkpoint_epochs=[1])
    with pytest.raises(UsageError, match=r"t-epoch1.safetensors belongs to a run with another seed"):
        fit(toy_train, None, out, replace(one, seed=1), checkpoint_epochs=[1], resume=True)
    (tmp_path / "other.safetensors").rename(out)
    assert contents(tmp_path) == before
    out.write_bytes(b"my notes")
    for resume, message in ((False, "not a teacher file"), (True, "is no teacher file")):
        with pytest.raises(UsageError, match=message):
            fit(toy_train, None, out, one, resume=resume)
    assert out.read_bytes() == b"my notes"


def test_an_unfinished_run_is_kept_unless_it_is_resumed(toy_train, tmp_path, monkeypatch, capsys):
    out = tmp_path / "t.safetensors"
    kill_at_write(monkeypatch, 1)
    with pytest.raises(Killed):
        fit(toy_train, None, out)
    monkeypatch.undo()
    before = (tmp_path / "t.state").read_bytes()
    with pytest.raises(UsageError, match=r"t.state holds an unfinished run, 1 of 3 epochs: continue"):
        fit(toy_train, None, out)
    with pytest.raises(UsageError, match=r"another batch_size \(32, now 16\)"):
        fit(toy_train, None, out, replace(TINY, batch_size=16), resume=True)
    with pytest.raises(UsageError, match="has no checkpoint of epoch 1"):
        fit(toy_train, None, out, checkpoint_epochs=[1], resume=True)
    assert (tmp_path / "t.state").read_bytes() == before
    fit_teacher(toy_train, None, TINY, class_names=CLASSES, out=out, resume=True)
    assert "behind epoch 1 of 3" in capsys.readouterr().err
    finished = fit_teacher(toy_train, None, TINY, class_names=CLASSES, out=out, resume=True)
    assert "t.safetensors is finished" in capsys.readouterr().err
    assert finished.epoch == 3
    fit_teacher(toy_train, None, TINY, class_names=CLASSES, out=tmp_path / "new.safetensors", resume=True)
    assert "nothing to resume at" in capsys.readouterr().err


def test_a_file_that_is_no_state_is_put_aside(toy_train, tmp_path):
    (tmp_path / "t.state").write_bytes(b"mine")
    fit(toy_train, None, tmp_path / "t.safetensors", replace(TINY, epochs=2))
    assert (tmp_path / "t.state.kept-1").read_bytes() == b"mine"
    assert not (tmp_path / "t.state").exists()


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


def kill_at_write(monkeypatch, whole):
    """Die at the write behind `whole` whole ones, half of its bytes on the disk, as SIGKILL leaves them."""
    original, left = files.atomic_write_bytes, [whole]

    def dying(path, data):
        left[0] -= 1
        if left[0] < 0:
            temporary_path(path).write_bytes(data[: len(data) // 2])
            raise Killed
        original(path, data)

    for writer in (module, state):
        monkeypatch.setattr(writer, "atomic_write_bytes", dying)


def test_a_run_killed_while_it_writes_resumes_to_the_same_bytes(toy_train, tmp_path, monkeypatch):
    small, config = ImageSet(toy_train.images[::4], toy_train.labels[::4]), replace(TINY, epochs=3)
    (tmp_path / "whole").mkdir()
    (tmp_path / "part").mkdir()
    fit(small, None, tmp_path / "whole" / "t.safetensors", config, checkpoint_epochs=[1, 3])
    out = tmp_path / "part" / "t.safetensors"
    for whole in (0, 1, 2, 1, 1):  # dies in the checkpoint, both states, the last checkpoint and the teacher
        kill_at_write(monkeypatch, whole)
        with pytest.raises(Killed):
            fit(small, None, out, config, checkpoint_epochs=[1, 3], resume=True)
        monkeypatch.undo()
    assert sorted(contents(tmp_path / "part"))[-3:] == [
        "t-epoch1.safetensors",
        "t-epoch3.safetensors",
        "t.state",
    ]
    assert [path for path in (tmp_path / "part").iterdir() if ".tmp-" in path.name]
    fit(small, None, out, config, checkpoint_epochs=[1, 3], resume=True)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_a_resumed_run_keeps_its_threads(toy_train, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    kill_at_write(monkeypatch, 1)
    with pytest.raises(Killed):
        fit(toy_train, None, tmp_path / "t.safetensors")
    monkeypatch.undo()
    torch.set_num_threads(before + 1)
    try:
        teacher = fit(toy_train, None, tmp_path / "t.safetensors", resume=True)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert teacher.facts["threads"] == before


def test_a_default_dtype_of_float64_changes_nothing(toy_train, toy_test, tmp_path):
    fit(toy_train, toy_test, tmp_path / "one.safetensors")
    torch.set_default_dtype(torch.float64)
    try:
        fit(toy_train, toy_test, tmp_path / "two.safetensors")
        assert torch.get_default_dtype() == torch.float64
        assert create_model("convnet3", 3, SIZE).classifier.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
