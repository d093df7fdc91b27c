"""Feature maps of every coalition of players, location by location, from those of a few variants."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, channels_last, prepared

# Elements of a map a program: 8 a thread, so that a thread moves 16 bytes of half precision at a time.
BLOCK = 1024
# About one wave of programs on the largest GPUs.
PROGRAMS = 1024


@triton.jit
def _assemble_masked_features(
    variants,
    coalitions,
    table,
    assembled,
    locations,
    channels,
    players,
    count,
    count_a_program,
    coalitions_image_stride,
    CLASSES: tl.constexpr,
    LOCATIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program owns LOCATIONS locations by CHANNELS channels of an image's map, for a run of its coalitions.

    For each location it reads once which players are seen. For each coalition it then gathers their M bits
    into the number of a variant, the same for all channels, and copies the channels from there.

    Bytes moved: B K C H W e written (e bytes an element); as much read, but of 2^M variants only, which stay
    in L2 while the coalitions pass, so that B 2^M C H W e comes from memory; the coalitions, from L1.
    Operations: M loads, shifts and ORs a location and coalition, shared by its channels. The writes bind: the
    kernel runs at the bandwidth of memory as long as loads and stores are 16 bytes wide, for which C has to be
    a multiple of 16.
    """
    program = tl.program_id(0).to(tl.int64)
    slabs = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(locations, LOCATIONS)
    chunks = tl.cdiv(count, count_a_program)
    slab = (program % slabs).to(tl.int32)
    tile = (program // slabs % tiles).to(tl.int32)
    first = (program // slabs // tiles % chunks).to(tl.int32) * count_a_program
    image = program // slabs // tiles // chunks

    location = tile * LOCATIONS + tl.arange(0, LOCATIONS)
    entry = table + location.to(tl.int64) * CLASSES
    channel = slab * CHANNELS + tl.arange(0, CHANNELS)
    there = location < locations
    inside = there[:, None] & (channel < channels)[None, :]
    element = location[:, None] * channels + channel[None, :]
    elements = tl.cast(locations, tl.int64) * channels

    maps = variants + image * (elements << CLASSES) + element
    copy = assembled + (image * count + first) * elements + element
    cells = coalitions.to(tl.pointer_type(tl.uint8), bitcast=True)
    cells += image * coalitions_image_stride + first.to(tl.int64) * players
    for _ in range(first, tl.minimum(first + count_a_program, count)):
        variant = tl.zeros([LOCATIONS], tl.int64)
        for m in tl.static_range(CLASSES):
            # The table stays in L1; holding M of its columns in registers would spill where M is large.
            player = tl.load(entry + m, mask=there, other=-1)
            present = tl.load(cells + player, mask=there & (player >= 0), other=0) != 0
            variant += present.to(tl.int64) << m
        features = tl.load(maps + (variant * elements)[:, None], mask=inside, other=0)
        tl.store(copy, features, mask=inside)
        cells += players
        copy += elements


@prepared
def assemble_masked_features(variants: torch.Tensor, coalitions: torch.Tensor, table: torch.Tensor) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::assemble_masked_features`."""
    batch, _, channels, height, width = variants.shape
    count, players = coalitions.shape[-2:]
    locations = height * width
    if locations * channels > 2**31 - BLOCK:
        raise ValueError(
            f"maps must have at most {2**31 - BLOCK} elements each, got {list(variants.shape[2:])}"
        )
    size = (batch * count, channels, height, width)
    empty = Allocation(size, variants.dtype, variants.device, channels_last(size))
    if 0 in size:
        return lambda *_: empty()
    in_place = variants.permute(0, 1, 3, 4, 2).is_contiguous()

    channels_a_program = min(triton.next_power_of_2(channels), 128)
    locations_a_program = BLOCK // channels_a_program
    owned = triton.cdiv(channels, channels_a_program) * triton.cdiv(locations, locations_a_program) * batch
    # Coalitions are shared out among programs only as far as the maps alone leave the GPU idle.
    count_a_program = triton.cdiv(count, min(count, triton.cdiv(PROGRAMS, owned)))
    launch = Launch(
        _assemble_masked_features,
        (owned * triton.cdiv(count, count_a_program),),
        (
            locations,
            channels,
            players,
            count,
            count_a_program,
            count * players if coalitions.ndim == 3 else 0,
        ),
        CLASSES=table.shape[-1],
        LOCATIONS=locations_a_program,
        CHANNELS=channels_a_program,
        num_warps=4,
    )

    def run(variants: torch.Tensor, coalitions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        assembled = empty()
        maps = variants if in_place else variants.permute(0, 1, 3, 4, 2).contiguous()
        launch(maps, coalitions.contiguous(), table.contiguous(), assembled)
        return assembled

    return run
