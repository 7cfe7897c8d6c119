"""The dimensions of every known model part, and the lengths that follow from them. No torch, nothing but
numbers.

`HUNYUANVIDEO` is the published model; other models (the embedded `shapes`, a test's tiny one) get their
dims from the config files or tensor shapes of a checkpoint (`weights.load`).
"""

from dataclasses import dataclass

HEAD_DIM_ROPE_AXES = {128: (16, 56, 56)}
# The width of every sinusoidal embedding (spec 1.3).
SINUSOID_WIDTH = 256

# Elements that the VAE handles at once (model.causal computes with them, memory.decode_needs counts them). On a CPU a
# convolution's buffer should stay in the last cache, an element-wise block in L2; elsewhere a launch must be worth
# its while, and the buffers must stay small beside the activations.
CONV_ELEMENTS_CPU, CONV_ELEMENTS = 2**21, 2**25
BLOCK_ELEMENTS_CPU, BLOCK_ELEMENTS = 2**18, 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class DitDims:
    """The diffusion transformer. Sizes count features, not bytes."""

    hidden: int
    heads: int
    double_blocks: int
    single_blocks: int
    refiner_blocks: int
    mlp_ratio: int
    latent_channels: int
    text_width: int
    pooled_width: int
    rope_axes: tuple[int, int, int]
    rope_theta: float
    has_guidance: bool
    patch: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        return self.hidden * self.mlp_ratio

    @property
    def patch_features(self) -> int:
        """Features of one token before the patch embedding: channels x patch x patch."""
        return self.latent_channels * self.patch * self.patch

    @property
    def blocks(self) -> int:
        return self.double_blocks + self.single_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeDims:
    """The causal 3D VAE: one encoder and one decoder level for each entry of `channels`."""

    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    latent_channels: int
    scaling_factor: float
    spatial_ratio: int = 8
    temporal_ratio: int = 4

    @property
    def level_ratios(self) -> list[tuple[int, int]]:
        """(time, space) ratio of the step after each level: the first steps scale space, the last ones time.

        Encoder and decoder share it: the decoder is no mirror image of the encoder (spec 3.3).
        """
        last = len(self.channels) - 1
        space_steps, time_steps = self.spatial_ratio.bit_length() - 1, self.temporal_ratio.bit_length() - 1
        assert max(space_steps, time_steps) <= last, f"too few levels for these ratios: {self}"
        return [
            (2 if last - time_steps <= level < last else 1, 2 if level < space_steps else 1)
            for level in range(last + 1)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaDims:
    """The language model; only `used_layers` of its `layers` run: all but the last two."""

    vocabulary: int
    hidden: int
    mlp_hidden: int
    layers: int
    heads: int
    kv_heads: int
    rms_eps: float
    rope_theta: float
    max_positions: int

    @property
    def used_layers(self) -> int:
        return self.layers - 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipDims:
    """The CLIP text tower whose pooled output conditions every block."""

    vocabulary: int
    hidden: int
    mlp_hidden: int
    layers: int
    heads: int
    positions: int
    eos_token: int
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestDefaults:
    """What a Request's None means for this model. `size` is (height, width) in pixels."""

    size: tuple[int, int]
    frames: int
    steps: int
    guidance: float
    flow_shift: float
    known_sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDims:
    """All parts of one model."""

    name: str
    dit: DitDims
    vae: VaeDims
    llama: LlamaDims
    clip: ClipDims
    defaults: RequestDefaults


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Latent frames, height, width of a clip; `tokens` of them after patching."""

    frames: int
    height: int
    width: int
    patch: int = 2

    @property
    def grid(self) -> tuple[int, int, int]:
        """The token grid (t, h, w)."""
        return self.frames, self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        grid = self.grid
        return grid[0] * grid[1] * grid[2]


def latent_shape(size: tuple[int, int], frames: int, vae: VaeDims) -> LatentShape:
    """Latents of `frames` frames of `size` (height, width) pixels: ((F-1)/4+1, H/8, W/8)."""
    return LatentShape(
        (frames - 1) // vae.temporal_ratio + 1,
        size[0] // vae.spatial_ratio,
        size[1] // vae.spatial_ratio,
    )


HUNYUANVIDEO_SIZES = (
    (544, 960),
    (960, 544),
    (624, 832),
    (832, 624),
    (720, 720),
    (720, 1280),
    (1280, 720),
    (1104, 832),
    (832, 1104),
    (960, 960),
)

HUNYUANVIDEO_DEFAULTS = RequestDefaults(
    size=(720, 1280),
    frames=129,
    steps=50,
    guidance=6.0,
    flow_shift=7.0,
    known_sizes=HUNYUANVIDEO_SIZES,
)

HUNYUANVIDEO = ModelDims(
    name="hunyuanvideo",
    dit=DitDims(
        hidden=3072,
        heads=24,
        double_blocks=20,
        single_blocks=40,
        refiner_blocks=2,
        mlp_ratio=4,
        latent_channels=16,
        text_width=4096,
        pooled_width=768,
        rope_axes=(16, 56, 56),
        rope_theta=256.0,
        has_guidance=True,
    ),
    vae=VaeDims(
        channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_groups=32,
        latent_channels=16,
        scaling_factor=0.476986,
    ),
    llama=LlamaDims(
        vocabulary=128320,
        hidden=4096,
        mlp_hidden=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        rms_eps=1e-5,
        rope_theta=500000.0,
        max_positions=8192,
    ),
    clip=ClipDims(
        vocabulary=49408,
        hidden=768,
        mlp_hidden=3072,
        layers=12,
        heads=12,
        positions=77,
        eos_token=49407,
    ),
    defaults=HUNYUANVIDEO_DEFAULTS,
)
