"""Captum as a peer: the same Shapley values, the same KernelSHAP law and solution, the same Grad-CAM map."""

import functools
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddfast.attribution import grad_cam, shapley
from ddfast.attribution.estimators.coalitions import shapley_kernel_subsets
from ddfast.attribution.estimators.plans import make_plan

captum_attr = pytest.importorskip("captum.attr", reason="Captum is not installed (extra [dev])")


def net(inplace=False, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=inplace),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 4),
    ).eval()


def images_and_labels(count=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, 12, 12, generator=generator), torch.arange(count) % 4


def feature_mask(side, grid):
    """Captum's name for the player of each pixel."""
    cell = torch.arange(side) * grid // side
    return (cell[:, None] * grid + cell)[None, None]


def per_cell(attribution, grid):
    """Captum returns phi at every pixel; the cells' first pixels hold them all."""
    step = attribution.shape[-1] // grid
    return attribution[:, 0, ::step, ::step].flatten(1)


def test_exact_values_are_captums():
    model = net()
    images, labels = images_and_labels()
    theirs = captum_attr.ShapleyValues(model).attribute(
        images, target=labels, feature_mask=feature_mask(12, 2), perturbations_per_eval=4
    )
    ours = shapley(model, images, labels, 2, estimator="exact")
    torch.testing.assert_close(ours, per_cell(theirs, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 5])
def test_kernel_gives_captums_solution_of_the_same_coalitions(seed):
    pytest.importorskip("sklearn", reason="Captum solves KernelShap with scikit-learn (extra [dev])")
    model = net()
    images, labels = images_and_labels(1)
    n_samples = 40
    ours = shapley(model, images, labels, 3, n_samples, "kernel", seed=torch.tensor([seed]))
    coalitions, _ = make_plan("kernel", 9, n_samples, torch.tensor([seed])).rows(0, n_samples)
    explainer = captum_attr.KernelShap(model)

    def replay(original, **_):
        for coalition in coalitions[0]:
            yield coalition[None].long()

    explainer.perturb_func = replay
    theirs = explainer.attribute(
        images,
        target=int(labels),
        feature_mask=feature_mask(12, 3),
        n_samples=n_samples,
        perturbations_per_eval=8,
    )
    torch.testing.assert_close(ours, per_cell(theirs, 3), rtol=2e-3, atol=2e-4)


def test_kernel_draws_by_captums_law():
    """Sizes of Captum's coalitions against ours: two samples of one distribution."""
    d, draws = 16, 3000
    explainer = captum_attr.KernelShap(net())
    sizes = torch.arange(d, dtype=torch.float)
    law = (d - 1) / (sizes * (d - sizes))
    law[0] = 0.0
    torch.manual_seed(0)
    stream = explainer.kernel_shap_perturb_generator(
        torch.zeros(1, d), num_interp_features=d, num_select_distribution=torch.distributions.Categorical(law)
    )
    assert next(stream).all()
    assert not next(stream).any()
    drawn = torch.cat([next(stream) for _ in range(draws)])
    ours = shapley_kernel_subsets(torch.tensor([1]), draws, d)[0]
    theirs_by_size = torch.bincount(drawn.sum(1), minlength=d + 1)[1:d].double()
    ours_by_size = torch.bincount(ours.sum(1), minlength=d + 1)[1:d].double()
    statistic = ((theirs_by_size - ours_by_size) ** 2 / (theirs_by_size + ours_by_size)).sum()
    # 14 degrees of freedom: the 99.99% quantile is 42.6.
    assert float(statistic) < 42.6
    # Every player is drawn alike by both.
    assert float((drawn.double().mean(0) - ours.double().mean(0)).abs().max()) < 4.5 * (0.5 / draws) ** 0.5


def test_kernel_errs_as_captum_does():
    """At the paper's 25 evaluations the squared error against the exact values is the same within chance."""
    pytest.importorskip("sklearn", reason="Captum solves KernelShap with scikit-learn (extra [dev])")
    model = net()
    images, labels = images_and_labels(1)
    truth = shapley(model, images, labels, 3, estimator="exact")[0]
    torch.manual_seed(0)
    attribute = functools.partial(
        captum_attr.KernelShap(model).attribute,
        images,
        target=int(labels),
        feature_mask=feature_mask(12, 3),
        n_samples=25,
        perturbations_per_eval=25,
    )
    theirs = torch.cat([per_cell(attribute(), 3) for _ in range(60)])
    repeated = images.expand(400, -1, -1, -1), labels.expand(400)
    ours = shapley(model, *repeated, 3, 25, "kernel", seed=torch.arange(400))
    # Medians: a stream that is nearly singular has an error without bound, in Captum as here.
    errors = [((phi - truth) ** 2).sum(1).median() for phi in (theirs, ours)]
    assert 0.5 < float(errors[0] / errors[1]) < 2.0


@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam_is_captums_map_averaged_over_cells(relu):
    model = net()
    images, labels = images_and_labels(3)
    heat = captum_attr.LayerGradCam(model, model[2]).attribute(
        images.clone().requires_grad_(), target=labels, relu_attributions=relu
    )
    heat = F.interpolate(heat, size=(12, 12), mode="bilinear").detach()[:, 0]
    expected = heat.view(3, 4, 3, 4, 3).mean((2, 4)).flatten(1)
    assert expected.abs().sum() > 0
    for layer in (None, "2", model[2]):
        found = grad_cam(model, images, labels, layer, relu=relu, chunk_size=2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert not found.requires_grad
        assert found.dtype == torch.float32


def test_grad_cam_of_frozen_weights_and_in_place_activations():
    images, labels = images_and_labels(2)
    expected = grad_cam(net(), images, labels, grid=(2, 3))
    assert expected.shape == (2, 6)
    frozen = net(inplace=True).requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(grad_cam(frozen, images, labels, grid=(2, 3)), expected)
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_grad_cam_normalises_bytes_and_splits_unevenly():
    model = net()
    pixels = torch.randint(
        0, 256, (2, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    normalised = (pixels.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    labels = torch.tensor([1, 3])
    found = grad_cam(model, pixels, labels, grid=5, mean=mean, std=std)
    torch.testing.assert_close(found, grad_cam(model, normalised, labels, grid=5), rtol=1e-4, atol=1e-6)
    # Cells of 2 or 3 pixels, weighted by their area, give the mean of the whole map.
    ends = [i * 12 // 5 for i in range(6)]
    length = torch.tensor([b - a for a, b in itertools.pairwise(ends)])
    area = (length[:, None] * length).flatten() / 144
    torch.testing.assert_close((found * area).sum(1), grad_cam(model, normalised, labels, grid=1)[:, 0])


def test_grad_cam_arguments_that_do_not_fit():
    model = net()
    images, labels = images_and_labels(2)
    with pytest.raises(ValueError, match="layer must name a module of the model, got 'conv9'"):
        grad_cam(model, images, labels, "conv9")
    with pytest.raises(ValueError, match="not part of it"):
        grad_cam(model, images, labels, nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="has no Conv2d"):
        grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).eval(), images, labels)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3"):
        grad_cam(model, images, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="training mode"):
        grad_cam(net().train(), images, labels)
    with pytest.raises(ValueError, match="NaN or infinity for 1 of 2 images"):
        grad_cam(model, torch.stack([images[0], images[0] * float("nan")]), labels)
    assert grad_cam(model, images[:0], labels[:0]).shape == (0, 16)


def test_without_captum_grad_cam_names_the_extra():
    script = (
        "import sys; sys.modules['captum'] = None; sys.modules['captum.attr'] = None\n"
        "import torch, ddfast.attribution as a\n"
        "try: a.grad_cam(torch.nn.Conv2d(3, 3, 1).eval(), torch.zeros(1, 3, 8, 8), torch.tensor([0]))\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "grad_cam needs captum, which is not installed: pip install 'ddfast[bench]'"
