"""ZCA: the transform against its definition, there and back, and as a file."""

import pytest
import torch
from safetensors.torch import save_file

from ddfast.errors import UsageError
from ddfast.output.whitening import WHITENING, Whitening, read_whitening


def images(count=40, side=4):
    draws = torch.Generator().manual_seed(0)
    smooth = torch.randn(count, 3, 1, 1, generator=draws) * 40 + 128
    return (smooth + 20 * torch.randn(count, 3, side, side, generator=draws)).clamp(0, 255).byte()


@pytest.mark.parametrize("count", [40, 5])  # more and fewer images than an image has pixels
def test_it_is_its_definition(count):
    given = images(count)
    flat = given.double().flatten(1) / 255
    centred = flat - flat.mean(dim=0)
    covariance = centred.T @ centred / (count - 1)
    left, values, _ = torch.linalg.svd(covariance)
    transform = left @ torch.diag((values + 0.1).rsqrt()) @ left.T
    wanted = (centred @ transform.T).view(given.shape)
    whitening = Whitening.fit(given)
    torch.testing.assert_close(whitening(given).double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whitening(given.float() / 255), whitening(given))
    assert whitening.eps == 0.1


def test_white_is_nearly_uncorrelated():
    given = images(400)
    flat = Whitening.fit(given, eps=1e-4)(given).flatten(1)
    torch.testing.assert_close(torch.cov(flat.T), torch.eye(48), atol=0.03, rtol=0)


def test_it_is_undone_and_differentiable():
    given = images()
    whitening = Whitening.fit(given)
    torch.testing.assert_close(whitening.undone(whitening(given)), given.float() / 255, atol=1e-5, rtol=1e-5)
    white = whitening(given[:2].double() / 255).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: whitening.undone(z).square().sum(), white, atol=1e-4)


def test_a_folder_keeps_it(tmp_path):
    assert read_whitening(tmp_path) is None
    whitening = Whitening.fit(images())
    whitening.write(tmp_path)
    data = (tmp_path / WHITENING).read_bytes()
    found = read_whitening(tmp_path)
    for name in ("mean", "basis", "variances", "eps"):
        assert torch.equal(torch.as_tensor(getattr(found, name)), torch.as_tensor(getattr(whitening, name)))
    found.write(tmp_path)
    assert (tmp_path / WHITENING).read_bytes() == data


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: save_file({"mean": torch.zeros(3, 2, 2)}, path),
        lambda path: save_file(
            {"mean": torch.zeros(3, 2, 2), "basis": torch.zeros(5, 5), "variances": torch.zeros(12)},
            path,
            {"zca": '{"eps": 0.1}'},
        ),
    ],
)
def test_a_damaged_one_is_one_line(damage, tmp_path):
    Whitening.fit(images()).write(tmp_path)
    damage(tmp_path / WHITENING)
    with pytest.raises(UsageError, match=WHITENING) as error:
        read_whitening(tmp_path)
    assert "\n" not in str(error.value)
