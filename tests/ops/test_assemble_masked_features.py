import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from ddfast.ops import assemble_masked_features, reference
from ddfast.ops._dispatch import native_status

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OP = torch.ops.ddfast.assemble_masked_features.default


def random_variants(batch, classes, channels, height, width, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(batch, 2**classes, height, width, channels, generator=generator)
    return flat.to(dtype).permute(0, 1, 4, 2, 3)


def random_coalitions(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def random_table(height, width, classes, players, seed=2):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(-1, players, (height, width, classes), generator=generator)
    table[:, 1::2] = table[:, : width // 2 * 2 : 2]  # neighbours that see the same players
    return table.int()


def by_hand(variants, coalition, table):
    """One map, location by location: the variant's number written out in binary."""
    _, channels, height, width = variants.shape
    assembled = torch.empty(channels, height, width, dtype=variants.dtype)
    for h, w in itertools.product(range(height), range(width)):
        bits = [p >= 0 and bool(coalition[p]) for p in table[h, w].tolist()]
        assembled[:, h, w] = variants[int("".join("01"[bit] for bit in reversed(bits)), 2), :, h, w]
    return assembled


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("shape", [(5, 6, 7, 4, 16), (3, 1, 1, 1, 1), (1, 5, 9, 2, 4), (8, 3, 4, 6, 9)])
def test_takes_each_location_from_the_variant_that_agrees(shape, each, device):
    channels, height, width, classes, players = shape
    variants = random_variants(2, classes, channels, height, width)
    coalitions = random_coalitions(*((2, 5, players) if each else (5, players)))
    table = random_table(height, width, classes, players)
    assembled = assemble_masked_features(variants.to(device), coalitions, table)
    assert assembled.shape == (10, channels, height, width)
    assert assembled.is_contiguous(memory_format=torch.channels_last)
    for b, k in itertools.product(range(2), range(5)):
        coalition = coalitions[b, k] if each else coalitions[k]
        assert torch.equal(assembled[b * 5 + k].cpu(), by_hand(variants[b], coalition, table))


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "planes", "strided"])
def test_cpp_has_the_bits_of_the_reference(dtype, each, layout):
    variants = random_variants(3, 4, 6, 8, 10, dtype=dtype)
    if layout == "planes":
        variants = variants.contiguous()
    elif layout == "strided":
        variants = variants[:, :, ::2, 1:, :-1]
    height, width = variants.shape[-2:]
    coalitions = random_coalitions(*((3, 7, 24) if each else (7, 24)))[..., ::2]
    table = random_table(height, width, 4, 12)
    native = torch.ops.ddfast_native.assemble_masked_features(variants, coalitions, table)
    expected = reference.assemble_masked_features(variants, coalitions, table)
    assert native.stride() == expected.stride()
    assert torch.equal(native, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_variants_that_are_masked_images_give_the_masked_images(device):
    """The identity of Sec. 4.1 on the layer that does nothing: its locations see one player each."""
    players = reference.player_map(4, 4, 13, 18)
    classes = players // 4 % 2 * 2 + players % 4 % 2
    table = torch.where(classes[..., None] == torch.arange(4), players[..., None], -1).int()
    of_class = (torch.arange(16) // 4 % 2 * 2 + torch.arange(16) % 4 % 2)[None]
    patterns = torch.arange(16)[:, None] >> of_class & 1 == 1
    images, coalitions = torch.rand(2, 3, 13, 18, device=device), random_coalitions(9, 16).to(device)

    def masked(coalitions):
        return torch.ops.ddfast.masked_batch(
            images, coalitions.to(device), torch.ones(3, device=device), None, None, 4, 4, torch.float32
        )

    variants = masked(patterns).unflatten(0, (2, 16))
    assert torch.equal(assemble_masked_features(variants, coalitions, table.to(device)), masked(coalitions))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch", "count", "channels"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(batch, count, channels, device):
    variants = random_variants(batch, 2, channels, 3, 5).to(device)
    assembled = assemble_masked_features(variants, random_coalitions(count, 4), random_table(3, 5, 2, 4))
    assert assembled.shape == (batch * count, channels, 3, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_every_element_is_written(device):
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        variants, table = random_variants(2, 4, 5, 17, 19), random_table(17, 19, 4, 16)
        assembled = assemble_masked_features(variants.to(device), random_coalitions(9, 16), table)
    finally:
        torch.use_deterministic_algorithms(False)
    assert assembled.isfinite().all()


@NATIVE
def test_threads_do_not_change_the_result():
    arguments = random_variants(2, 4, 64, 28, 28), random_coalitions(31, 16), random_table(28, 28, 4, 16)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(assemble_masked_features(*arguments))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("each", [False, True])
def test_opcheck(each, device):
    coalitions = random_coalitions(*((2, 4, 6) if each else (4, 6))).to(device)
    table = random_table(3, 5, 2, 6).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        variants = random_variants(2, 2, 3, 3, 5, dtype=dtype).to(device)
        opcheck(OP, (variants.clone().requires_grad_(dtype == torch.float32), coalitions, table))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("each", [False, True])
def test_gradients(each, device):
    variants = random_variants(2, 2, 2, 3, 4, dtype=torch.float64).to(device).requires_grad_()
    coalitions = random_coalitions(*((2, 5, 6) if each else (5, 6))).to(device)
    table = random_table(3, 4, 2, 6).to(device)

    def function(variants):
        # Squared, so that the second derivative is not zero.
        return assemble_masked_features(variants, coalitions, table).square()

    assert gradcheck(function, (variants,))
    assert gradgradcheck(function, (variants,))


def test_gradients_of_half_precision_variants_are_summed_in_float32():
    variants = torch.ones(1, 2, 1, 1, 1, dtype=torch.float16, requires_grad=True)
    coalitions = torch.ones(4096, 1, dtype=torch.bool)
    table = torch.zeros(1, 1, 1, dtype=torch.int32)
    assemble_masked_features(variants, coalitions, table).sum().backward()
    assert variants.grad.flatten().tolist() == [0, 4096]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (None, 0, None), (2, 1, None), (None, None, 0), (1, 0, 3)]
)
@pytest.mark.parametrize("each", [False, True])
def test_vmap(in_dims, each, device):
    def mapped(tensor, dim):
        if dim is None:
            return tensor.to(device)
        generator = torch.Generator().manual_seed(3)
        copies = [tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)] for _ in range(4)]
        return torch.stack([copy.view(tensor.shape) for copy in copies], dim).to(device)

    variants = mapped(random_variants(2, 2, 3, 4, 6), in_dims[0])
    coalitions = mapped(random_coalitions(*((2, 5, 6) if each else (5, 6))), in_dims[1])
    table = mapped(random_table(4, 6, 2, 6), in_dims[2])
    found = torch.vmap(torch.ops.ddfast.assemble_masked_features, in_dims)(variants, coalitions, table)
    assert found.shape == (4, 10, 3, 4, 6)
    for index in range(4):
        arguments = zip((variants, coalitions, table), in_dims, strict=True)
        expected = OP(*(x if dim is None else x.select(dim, index) for x, dim in arguments))
        assert torch.equal(found[index], expected)


def test_compiles_without_a_graph_break():
    variants, coalitions = random_variants(2, 2, 3, 4, 6), random_coalitions(5, 6)
    table = random_table(4, 6, 2, 6)

    def function(variants):
        return assemble_masked_features(variants, coalitions, table) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(variants), function(variants))


GOOD = {
    "variants": torch.zeros(2, 4, 3, 5, 6),
    "coalitions": torch.ones(7, 9, dtype=torch.bool),
    "table": torch.zeros(5, 6, 2, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"variants": torch.zeros(8, 3, 5, 6)},
            ValueError,
            r"a \[B, 2\^M, C, H, W\] tensor, got \[8, 3, 5, 6\]",
        ),
        ({"variants": "map"}, ValueError, "got str"),
        ({"variants": torch.zeros(2, 4, 3, 5, 6).int()}, TypeError, "floating point .* got torch.int32"),
        ({"variants": torch.zeros(2, 8, 3, 5, 6)}, ValueError, "must hold 2.M = 4 maps .* got 8"),
        ({"table": torch.zeros(5, 6, 2)}, TypeError, "table must be int32, got torch.float32"),
        ({"table": torch.zeros(6, 5, 2, dtype=torch.int32)}, ValueError, r"\[5, 6, M\] .* got \[6, 5, 2\]"),
        ({"table": torch.zeros(5, 6, 13, dtype=torch.int32)}, ValueError, "1 to 12 classes"),
        (
            {"table": torch.full((5, 6, 2), 9, dtype=torch.int32)},
            ValueError,
            r"players in \[-1, 9\), got 9 to 9",
        ),
        ({"table": torch.full((5, 6, 2), -2, dtype=torch.int32)}, ValueError, "got -2 to -2"),
        ({"coalitions": torch.ones(7, 9)}, TypeError, "coalitions must be bool, got torch.float32"),
        ({"coalitions": torch.ones(3, 7, 9).bool()}, ValueError, r"\[K, d\] or \[2, K, d\], got \[3, 7, 9\]"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        assemble_masked_features(**{**GOOD, **change})


@NATIVE
@pytest.mark.parametrize(
    "change",
    [
        {"variants": torch.zeros(8, 3, 5, 6)},
        {"variants": torch.zeros(2, 8, 3, 5, 6)},
        {"table": torch.zeros(5, 6, 2, dtype=torch.int64)},
        {"table": torch.zeros(5, 7, 2, dtype=torch.int32)},
        {"table": torch.full((5, 6, 2), 9, dtype=torch.int32)},
        {"coalitions": torch.ones(3, 7, 9).bool()},
        {"coalitions": torch.ones(7, 9)},
    ],
)
def test_cpp_does_not_read_outside_arguments_that_skipped_the_face(change):
    with pytest.raises(RuntimeError, match="assemble_masked_features: "):
        torch.ops.ddfast_native.assemble_masked_features(*{**GOOD, **change}.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_offsets_past_2_to_the_31():
    variants = random_variants(1, 4, 64, 56, 56, dtype=torch.float16).cuda()
    coalitions = random_coalitions(11000, 16)  # 11000 * 200704 elements
    table = random_table(56, 56, 4, 16)
    assembled = assemble_masked_features(variants, coalitions, table)
    assert assembled.numel() > 2**31
    assert torch.equal(assembled[-1:], assemble_masked_features(variants, coalitions[-1:], table))
