"""Bytes of a tile, as predicted: held against what the very code allocates on meta tensors."""

from functools import cache, partial
from itertools import product

import pytest
import torch
from torch import Tensor

from hvlite.dims import HUNYUANVIDEO, LatentShape, VaeDims
from hvlite.memory.decode_needs import (
    decode_host_bytes,
    decode_tile_bytes,
    decoder_weight_bytes,
    encode_tile_bytes,
    encoder_weight_bytes,
)
from hvlite.memory.geometry import parse_tiles, wide_ladder
from hvlite.memory.tiles import PUBLISHED_TILES, TileGeometry, decode_tiles
from hvlite.model.vae import USED_BY_DECODE, Vae
from tests.live_bytes import peak_bytes

REAL = HUNYUANVIDEO.vae
ONE_LAYER = VaeDims(
    channels=(16, 24, 48, 64), layers_per_block=1, norm_groups=2, latent_channels=16, scaling_factor=1.0
)
# Widens where the real one narrows.
UNEVEN = VaeDims(channels=(8, 8, 24, 16), layers_per_block=2, norm_groups=2, latent_channels=4, scaling_factor=1.0)
ALL = pytest.mark.parametrize("dims", [REAL, ONE_LAYER, UNEVEN], ids=["real", "one layer", "uneven"])
DTYPES = {2: torch.float16, 4: torch.float32}
TILES = [(17, 32, 32), (9, 24, 18), (1, 32, 32), (2, 90, 160), (5, 8, 8)]
GIB = 2**30


@cache
def on_meta(dims: VaeDims, dtype_bytes: int) -> Vae:
    with torch.device("meta"):
        return Vae(dims).to(DTYPES[dtype_bytes])


@ALL
@pytest.mark.parametrize("dtype_bytes", DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_decoding_a_tile_takes_what_is_predicted(dims: VaeDims, dtype_bytes: int, tile: tuple[int, int, int]) -> None:
    vae = on_meta(dims, dtype_bytes)
    latents = torch.empty(1, dims.latent_channels, *tile, device="meta", dtype=DTYPES[dtype_bytes])
    traced = peak_bytes(lambda: vae.decode(latents))
    assert decode_tile_bytes(dims, LatentShape(*tile), dtype_bytes) == pytest.approx(traced, rel=0.02)


@ALL
@pytest.mark.parametrize("dtype_bytes", DTYPES)
@pytest.mark.parametrize("tile", TILES[::2], ids=str)
def test_encoding_a_tile_takes_what_is_predicted(dims: VaeDims, dtype_bytes: int, tile: tuple[int, int, int]) -> None:
    vae = on_meta(dims, dtype_bytes)
    frames, height, width = 4 * tile[0] - 3, 8 * tile[1], 8 * tile[2]
    clip = torch.empty(1, 3, frames, height, width, device="meta", dtype=DTYPES[dtype_bytes])
    traced = peak_bytes(lambda: vae.encode(clip))
    assert encode_tile_bytes(dims, LatentShape(*tile), dtype_bytes) == pytest.approx(traced, rel=0.02)


def test_on_a_cpu_the_pieces_are_smaller() -> None:
    latents = torch.randn(1, 16, 5, 12, 12)
    vae = Vae(ONE_LAYER)
    traced = peak_bytes(lambda: vae.decode(latents))
    predicted = decode_tile_bytes(ONE_LAYER, LatentShape(5, 12, 12), 4, "cpu")
    assert predicted == pytest.approx(traced, rel=0.02)
    assert predicted < decode_tile_bytes(ONE_LAYER, LatentShape(5, 12, 12), 4, "cuda")


def test_the_published_tile_stays_below_the_promise() -> None:
    tile = decode_tile_bytes(REAL, LatentShape(17, 32, 32), 2)
    assert tile + decoder_weight_bytes(REAL, 2) < 4.6 * GIB


@ALL
@pytest.mark.parametrize("dtype_bytes", DTYPES)
def test_weights_are_counted_by_part(dims: VaeDims, dtype_bytes: int) -> None:
    sizes = {name: tensor.numel() * dtype_bytes for name, tensor in on_meta(dims, dtype_bytes).state_dict().items()}
    decoder = sum(size for name, size in sizes.items() if name.startswith(USED_BY_DECODE))
    assert decoder_weight_bytes(dims, dtype_bytes) == decoder
    assert encoder_weight_bytes(dims, dtype_bytes) == sum(sizes.values()) - decoder


CLIPS = [(33, 90, 160), (17, 90, 90), (65, 32, 32), (1, 90, 160)]
GEOMETRIES = [PUBLISHED_TILES, parse_tiles("65x192"), parse_tiles("33x256x320"), None]


@pytest.mark.parametrize(("clip", "geometry", "dtype_bytes"), list(product(CLIPS, GEOMETRIES, DTYPES)))
def test_the_host_holds_what_is_predicted(
    clip: tuple[int, int, int], geometry: TileGeometry | None, dtype_bytes: int
) -> None:
    shape = LatentShape(*clip)
    geometry = geometry or wide_ladder(shape)[-1]
    latents = torch.empty(1, 16, *clip, device="meta")

    def run() -> None:
        for step in decode_tiles(latents, partial(arrive, dtype=DTYPES[dtype_bytes]), geometry):
            assert step.tile < step.tiles

    traced = peak_bytes(run)
    assert traced <= decode_host_bytes(shape, geometry, dtype_bytes) <= traced * 1.3


def arrive(tile: Tensor, dtype: torch.dtype) -> Tensor:
    frames, height, width = tile.shape[2:]
    return torch.empty(1, 3, 4 * frames - 3, 8 * height, 8 * width, device="meta", dtype=dtype)


def test_the_host_holds_no_more_of_a_longer_clip() -> None:
    assert decode_host_bytes(LatentShape(33, 90, 160), PUBLISHED_TILES) == decode_host_bytes(
        LatentShape(257, 90, 160), PUBLISHED_TILES
    )
