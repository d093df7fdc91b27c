"""Micro-batches in flight: found by measurement, shrunk where memory runs out, never in the result."""

from dataclasses import dataclass

import pytest
import torch

from ddfast.attribution import engine, flight, shapley
from ddfast.attribution.flight import Flight
from tests.masked_forward.networks import local_net


@dataclass
class Batch:
    number: int
    tensors: tuple


class Machine:
    """Prepares and runs numbered batches: `cost` seconds each by how many are held, memory for `room` of them."""

    def __init__(self, cost=lambda held: 1.0, room=100, elements=1):
        self.time, self.cost, self.room, self.elements = 0.0, cost, room, elements
        self.held, self.most, self.runs = 0, 0, []
        self.flight = Flight(torch.device("cpu"), clock=lambda: self.time)

    def prepare(self, number):
        if self.held == self.room:
            self.held = 0  # the caller lets go of what it has
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.held += 1
        self.most = max(self.most, self.held)
        return Batch(number, (torch.empty(self.elements),))

    def forward(self, batch):
        self.time += self.cost(self.flight.size)
        self.held -= 1
        self.runs.append(batch.number)
        return -batch.number

    def run(self, count):
        assert list(self.flight.run(range(count), self.prepare, self.forward)) == [
            (i, -i) for i in range(count)
        ]
        assert self.runs == list(range(count))


def test_stays_at_one_where_more_is_not_faster():
    machine = Machine()
    machine.run(40)
    assert machine.flight.size == 1
    assert machine.most == 2  # tried, and given up


@pytest.mark.parametrize(("best", "found"), [(4, 4), (64, flight.MAX_IN_FLIGHT)])
def test_grows_while_a_micro_batch_takes_less_time(best, found):
    machine = Machine(cost=lambda held: 1 / min(held, best))
    machine.run(200)
    assert machine.flight.size == found


def test_stays_within_memory(monkeypatch):
    monkeypatch.setattr(flight, "free_memory", lambda device: 10_000)
    machine = Machine(
        cost=lambda held: 1 / held, elements=600
    )  # 2400 bytes each: two fit into half of 10,000
    machine.run(50)
    assert machine.flight.size == machine.most == 2


def test_shrinks_for_good_after_a_failed_allocation(caplog):
    machine = Machine(cost=lambda held: 1 / held, room=5)
    machine.run(60)
    assert machine.flight.size == 4
    assert "out of memory: 4 micro-batches in flight from now on" in caplog.text


def test_with_one_in_flight_the_error_says_what_to_do():
    machine = Machine(room=0)
    with pytest.raises(
        RuntimeError, match=r"one micro-batch in flight, give a smaller chunk_size: CUDA out of memory"
    ):
        machine.run(3)


def test_other_errors_pass():
    def broken(number):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(Flight(torch.device("cpu")).run([0], broken, lambda batch: batch))


def test_the_cpus_error_is_one_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert flight.is_out_of_memory(caught.value)
    assert not flight.is_out_of_memory(RuntimeError("device-side assert"))
    assert flight.free_memory(torch.device("cpu")) > 2**20


@pytest.mark.parametrize("size", [2, 7])
def test_neither_the_number_nor_a_failure_changes_a_bit(size, monkeypatch):
    model = local_net()
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 5
    arguments = (model, images, labels, 4, 64)
    expected = shapley(*arguments, chunk_size=25)
    run, failures = engine.ImageGame.run, []

    def fails_once(self, batch):
        if self.evaluated > 40 and not failures:
            failures.append(batch)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return run(self, batch)

    monkeypatch.setattr(engine, "Flight", lambda device: Flight(device, size=size))
    assert torch.equal(shapley(*arguments, chunk_size=25), expected)
    monkeypatch.setattr(engine.ImageGame, "run", fails_once)
    assert torch.equal(shapley(*arguments, chunk_size=25), expected)
    assert len(failures) == 1
