import pytest
import torch
import torch.nn.functional as F

from bench.speed.augmentation import plain
from ddfast.training.differentiable import (
    DSA,
    IDC_EVALUATION,
    IDC_MATCHING,
    IDC_TRAINING,
    MOVES,
    Drawn,
    DrawnTogether,
    augment_groups,
    draw,
    draw_idc,
    draw_one,
    dsa,
    group_parameters,
    idc,
)


def drawn(operation, images, generator):
    """The images under an operation with parameters of their own."""
    return draw(operation, len(images), tuple(images.shape[-2:]), generator)(images)


def test_shift_moves_whole_pixels_and_brings_zeros():
    images = torch.arange(1.0, 65.0).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    moved = drawn("shift", images, torch.Generator().manual_seed(0))
    seen = set()
    for image in moved[:, 0]:
        places = [
            (dy, dx)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if torch.equal(image, F.pad(images[0, 0], (1, 1, 1, 1))[1 + dy : 9 + dy, 1 + dx : 9 + dx])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9


def test_cutout_zeroes_half_a_side_around_a_centre_that_may_be_at_the_border():
    holes = drawn("cutout", torch.ones(500, 1, 8, 8), torch.Generator().manual_seed(0))[:, 0] == 0
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), rows * columns)
    assert rows.max() == columns.max() == 4
    assert rows.min() == 2  # a centre on the first pixel


def test_colour_keeps_the_order_of_its_three_steps():
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    changed = drawn("colour", images, torch.Generator().manual_seed(2))
    brightness, saturation, contrast = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    for i in range(4):
        x = images[i] + brightness[i] - 0.5
        grey = x.mean(0, keepdim=True)
        x = grey + (x - grey) * saturation[i] * 2
        x = x.mean() + (x - x.mean()) * (contrast[i] + 0.5)
        torch.testing.assert_close(changed[i], x)


def test_scale_and_rotation_keep_the_centre_and_stay_within_their_bounds():
    ramp = torch.linspace(-1, 1, 33).expand(300, 1, 33, 33)
    scaled = drawn("scale", ramp, torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled[:, 0, 16, 16], torch.zeros(300), atol=1e-5, rtol=0)
    slope = (scaled[:, 0, 16, 20] - scaled[:, 0, 16, 12]) / 0.5
    assert slope.min() >= 1 / 1.2 - 1e-4
    assert slope.max() <= 1.2 + 1e-4
    assert slope.max() - slope.min() > 0.3
    turned = drawn("rotation", ramp, torch.Generator().manual_seed(0))
    across, down = turned[:, 0, 16, 20] - turned[:, 0, 16, 12], turned[:, 0, 20, 16] - turned[:, 0, 12, 16]
    angle = torch.rad2deg(torch.atan2(down, across))
    assert angle.abs().max() <= 15.01
    assert angle.min() < -12
    assert angle.max() > 12


def test_dsa_takes_one_operation_a_batch():
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(0)
    unmirrored = 0
    for _ in range(60):
        changed = dsa(images, draws)
        assert changed.shape == images.shape
        kept = [torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(changed, images, strict=True)]
        unmirrored += not all(kept)
    assert 30 < unmirrored < 60  # five operations of six change more than the side


@pytest.mark.parametrize("operation", DSA)
def test_a_single_row_changes_all_images_alike(operation):
    images = torch.randn(3, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    for seed in range(8):
        shared = draw(operation, 1, (12, 10), torch.Generator().manual_seed(seed))
        rows = tuple(parameter.expand(3, *parameter.shape[1:]) for parameter in shared.parameters)
        torch.testing.assert_close(shared(images), Drawn(operation, rows)(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("operation", DSA)
def test_every_operation_is_differentiable_in_the_pixels(operation):
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for rows in (1, 2):
        apply = draw(operation, rows, (6, 6), torch.Generator().manual_seed(3))
        assert torch.autograd.gradcheck(apply, images.clone().requires_grad_())


def test_an_unknown_operation_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="one of colour, shift, cutout, flip, scale, rotation, got 'blur'"):
        draw("blur", 1, (8, 8), torch.Generator())


def test_one_operation_of_several_is_as_likely_as_another():
    generator = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(DSA, 0)
    for _ in range(600):
        counts[draw_one(DSA, 1, (8, 8), generator).operation] += 1
    assert 60 < min(counts.values()) <= max(counts.values()) < 145


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("size", [(32, 32), (9, 14), (1, 1)])
@pytest.mark.parametrize("operation", DSA)
def test_what_is_drawn_is_applied_as_pytorch_does(operation, size, rows):
    images = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(1))
    for seed in range(3):
        drawn = draw(operation, rows, size, torch.Generator().manual_seed(seed))
        found = []
        for augment in (drawn, plain(drawn)):
            leaf = images.clone().requires_grad_()
            made = augment(leaf)
            found.append((made, *torch.autograd.grad(made.square().sum(), leaf)))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("operations", "always", "moves"),
    [
        (IDC_MATCHING, ["colour", "cutout"], {"shift"}),
        (IDC_TRAINING, ["colour"], {"shift"}),
        (IDC_EVALUATION, ["flip", "colour"], set(MOVES)),
        (("cutout", "flip"), ["flip", "cutout"], {None}),
    ],
)
def test_idc_does_all_that_is_listed_and_one_that_moves(operations, always, moves):
    images = torch.randn(4, 3, 8, 9, generator=torch.Generator().manual_seed(1))
    generator, seen = torch.Generator().manual_seed(0), set()
    for rows in (1, 4) * 10:
        together = draw_idc(operations, rows, (8, 9), generator)
        names = [each.operation for each in together.drawn]
        assert [name for name in names if name not in MOVES] == always
        seen.add(next((name for name in names if name in MOVES), None))
        assert names == sorted(names, key=["flip", "colour", *MOVES, "cutout"].index)
        wanted = images
        for each in together.drawn:
            wanted = plain(each)(wanted)
        torch.testing.assert_close(together(images), wanted, rtol=1e-5, atol=1e-5)
    assert seen == moves


def test_operations_in_any_order_are_applied_in_that_order():
    images = torch.randn(3, 3, 10, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for names in (("rotation", "scale"), ("cutout", "flip", "colour"), ("shift", "shift", "flip"), ()):
        drawn = tuple(
            draw(name, rows, (10, 8), generator) for name, rows in zip(names, (1, 3, 3), strict=False)
        )
        wanted = images
        for each in drawn:
            wanted = plain(each)(wanted)
        torch.testing.assert_close(DrawnTogether(drawn)(images), wanted, rtol=1e-5, atol=1e-5)


def test_idcs_evaluation_is_what_is_drawn_for_it():
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for seed in range(4):
        drawn = draw_idc(IDC_EVALUATION, 4, (8, 8), torch.Generator().manual_seed(seed))
        assert torch.equal(idc(images, torch.Generator().manual_seed(seed)), drawn(images))


def test_an_unknown_operation_of_idc_is_named():
    with pytest.raises(ValueError, match="among colour, shift, cutout, flip, scale, rotation, got 'crop'"):
        draw_idc(("crop",), 1, (8, 8), torch.Generator())


def test_groups_in_one_call_have_the_bits_of_one_after_another():
    images = torch.randn(9, 4, 3, 8, 9, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(3)
    drawn = [draw(operation, 1, (8, 9), generator) for operation in DSA]
    drawn += [draw_idc(IDC_MATCHING, 1, (8, 9), generator), DrawnTogether(())]
    drawn.append(DrawnTogether((drawn[5], drawn[0], drawn[4])))  # three calls
    apart = torch.stack([augment(group) for augment, group in zip(drawn, images, strict=True)])
    assert torch.equal(augment_groups(group_parameters(drawn, (8, 9)), images), apart)
    nothing = group_parameters([DrawnTogether(())] * 9, (8, 9))
    assert nothing.shape == (0, 9, 16)
    assert torch.equal(augment_groups(nothing, images), images)
