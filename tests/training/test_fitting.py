import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddfast.errors import UsageError
from ddfast.models import create_model
from ddfast.models.fusing import FusedSequential
from ddfast.training.fitting import Fitting, constant, cosine, finite_loss
from tests.training.conftest import SIZE

CPU = torch.device("cpu")


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3)


def adamw(model):
    """Two groups, in another order than the model's parameters."""
    named = dict(model.named_parameters())
    late = [value for name, value in named.items() if name.startswith("classifier")]
    early = [value for name, value in named.items() if not name.startswith("classifier")]
    return torch.optim.AdamW([{"params": late, "weight_decay": 0.0}, {"params": early}])


def network(arch="convnet3", seed=0):
    torch.manual_seed(seed)
    return create_model(arch, 3, SIZE, **({"width": 8} if arch.startswith("convnet") else {}))


def batches(seed=0, count=3):
    draws = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(6, 3, SIZE, SIZE, generator=draws),
            torch.randint(3, (6,), generator=draws),
        )


def weights(model):
    return [value.clone() for value in model.state_dict().values()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_steps_of_a_network_with_batch_norm_are_the_loop_written_out(precision):
    fitting = Fitting(network("resnet18_small"), sgd, CPU, precision)
    losses = fitting.epoch(batches(), F.cross_entropy, rate=lambda step: 0.1 / (step + 1))
    model = network("resnet18_small").to(memory_format=torch.channels_last)
    optimizer, wanted = sgd(model), []
    for step, (images, labels) in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
    assert losses.tolist() == wanted
    assert not losses.requires_grad
    for ours, theirs in zip(weights(fitting.model), weights(model), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("arch", ["convnet3", "convnet3_in"])
def test_convnets_are_trained_fused_to_the_same_weights_up_to_rounding(arch):
    fitting = Fitting(network(arch), sgd, CPU)
    assert isinstance(fitting.network.blocks, FusedSequential)
    assert type(fitting.model.blocks) is nn.Sequential
    fitting.epoch(batches(), F.cross_entropy, rate=constant(0.05))
    model = network(arch)
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = 0.05
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for ours, theirs in zip(weights(fitting.model), weights(model), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert list(fitting.network.state_dict()) == list(model.state_dict())
    images, _ = next(batches(5))
    torch.testing.assert_close(fitting.network(images), fitting.model(images), atol=1e-5, rtol=1e-4)


def test_what_does_not_gain_is_the_network_itself():
    fitting = Fitting(network("resnet18_small"), sgd, CPU)
    assert fitting.network is fitting.model


@pytest.mark.parametrize("arch", ["convnet3", "convnet3_in"])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_state_continues_to_the_same_bits(arch, make):
    whole = Fitting(network(arch), make, CPU)
    whole.epoch(batches(1), F.cross_entropy, rate=constant(0.02))
    state = {name: value.clone() for name, value in whole.state().items()}
    whole.epoch(batches(2), F.cross_entropy, rate=constant(0.01))

    part = Fitting(network(arch, seed=9), make, CPU)
    part.restore({**state, "history.correct": torch.zeros(2)})
    part.epoch(batches(2), F.cross_entropy, rate=constant(0.01))
    assert list(part.state()) == list(whole.state())
    for name, value in whole.state().items():
        assert torch.equal(part.state()[name], value), name


def test_a_batch_is_drawn_when_its_step_comes_and_noted_before_it():
    events = []

    def drawn():
        for number, batch in enumerate(batches()):
            events.append(f"draw {number}")
            yield batch

    model = network()
    before = weights(model)
    fitting = Fitting(model, sgd, CPU)

    def note(logits, labels):
        assert fitting.network.training
        assert not logits.requires_grad
        assert logits.shape == (6, 3)
        same = all(torch.equal(a, b) for a, b in zip(before[:2], weights(model)[:2], strict=True))
        events.append(f"note, weights {'as they were' if same else 'moved'}")

    model.eval()
    fitting.epoch(drawn(), F.cross_entropy, rate=constant(0.1), note=note)
    assert events == [
        "draw 0",
        "note, weights as they were",
        "draw 1",
        "note, weights moved",
        "draw 2",
        "note, weights moved",
    ]


def test_an_epoch_without_batches_is_no_step():
    fitting = Fitting(network(), sgd, CPU)
    before = weights(fitting.model)
    assert fitting.epoch(iter(()), F.cross_entropy, rate=constant(0.1)).tolist() == []
    assert all(torch.equal(a, b) for a, b in zip(before, weights(fitting.model), strict=True))


def test_a_new_optimizer_forgets_its_momentum():
    fitting = Fitting(network(), sgd, CPU)
    fitting.epoch(batches(), F.cross_entropy, rate=constant(0.1))
    assert any(name.startswith("optimizer.") for name in fitting.state())
    fitting.renew_optimizer()
    assert not any(name.startswith("optimizer.") for name in fitting.state())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_is_one_line(value):
    with pytest.raises(UsageError) as error:
        finite_loss(torch.tensor(value), "lower lr (now 3)", when=" in epoch 2")
    assert str(error.value) == f"the loss became {value} in epoch 2: lower lr (now 3)"
    assert finite_loss(torch.tensor(0.25), "") == 0.25


def test_a_cosine_falls_from_one_to_zero():
    assert [cosine(0), cosine(0.5), cosine(1)] == pytest.approx([1, 0.5, 0])
