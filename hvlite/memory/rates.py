"""How fast a device computes and data moves: measured figures of this machine, and public figures of known cards.

Arithmetic only, no torch: `hvlite.measure` measures, `hvlite doctor --measure` writes the file that `load_rates` reads.
Rates are per second: FLOP (two for a multiply-add), bytes, weights.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from hvlite.atomic import explained, replaced_file
from hvlite.errors import ProfileError, RequestError

FORMAT = 1

# What the elementwise operations of a block (norms, modulation, RoPE, GELU, gates, casts) read and write for each token
# and feature of the hidden width, in any dtype; a test counts it on the blocks themselves.
ELEMENTWISE_BYTES = 250
# Formats that a product takes as they are.
NOT_DEQUANTISED = ("fp32", "bf16", "fp16", "int8-dynamic")


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate that depends on the number of tokens: (tokens, rate), by rising tokens."""

    points: tuple[tuple[int, float], ...]

    def at(self, tokens: int) -> float:
        """Beyond the last point flat; between two, the time (tokens / rate) grows evenly with tokens.

        Below the first one the time stays the same, since it is then spent on reading the weights, not on tokens.
        """
        (first, lowest), (last, highest) = self.points[0], self.points[-1]
        if tokens <= first:
            return lowest * tokens / first
        if tokens >= last:
            return highest
        above = next(index for index, (count, _) in enumerate(self.points) if count > tokens)
        (low, slow), (high, fast) = self.points[above - 1], self.points[above]
        share = (tokens - low) / (high - low)
        return tokens / ((1 - share) * low / slow + share * high / fast)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What a device does in one dtype: FLOP/s of a Linear and of attention, bytes/s of elementwise work."""

    matmul: Curve
    attention: Curve
    elementwise: Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """One machine. `made_by` says what was measured, and with what.

    `disk_read` is from the disk itself, not from the page cache; `disk_cpu` are the seconds of a core that reading a
    byte costs. `dequantise` is in weights per second, by format; `int8_matmul` is for int8-dynamic. `others_cores` is
    what other processes took of the CPU meanwhile. None: not known.
    """

    format: int = FORMAT
    made_by: str
    compute: Mapping[str, Compute]
    dequantise: Mapping[str, float] = field(default_factory=dict)
    int8_matmul: Curve | None = None
    host_to_device: float | None = None
    disk_read: float | None = None
    disk_cpu: float = 0.0
    others_cores: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWork:
    """One visit of one block. `chunk` is the plan's token chunk, `weights` the format that the weights are held in."""

    kind: Literal["double", "single"]
    hidden: int
    mlp_ratio: int
    video_tokens: int
    text_tokens: int
    chunk: int
    dtype: str
    weights: str

    @property
    def weights_per_stream(self) -> int:
        """qkv and the projection behind attention, and both of the MLP."""
        return (4 + 2 * self.mlp_ratio) * self.hidden**2

    @property
    def streams(self) -> tuple[int, ...]:
        """Tokens of each sequence that passes through weights of its own."""
        if self.kind == "double":
            return self.video_tokens, self.text_tokens
        return (self.video_tokens + self.text_tokens,)


def block_seconds(rates: Rates, work: BlockWork) -> float:
    """Seconds of computing, by adding up its parts; weights are taken to be where they are needed."""
    compute = rates.compute[work.dtype]
    matmul = (work.weights == "int8-dynamic" and rates.int8_matmul) or compute.matmul
    tokens = work.video_tokens + work.text_tokens
    seconds = 4 * tokens**2 * work.hidden / compute.attention.at(tokens)
    seconds += ELEMENTWISE_BYTES * tokens * work.hidden / compute.elementwise.at(min(tokens, work.chunk))
    for stream in work.streams:
        if not stream:
            continue
        seconds += 2 * work.weights_per_stream * stream / matmul.at(min(stream, work.chunk))
        if work.weights not in NOT_DEQUANTISED:
            uses = math.ceil(stream / work.chunk)
            seconds += uses * work.weights_per_stream / rates.dequantise[work.weights]
    return seconds


def save_rates(rates: Rates, file: Path) -> None:
    """In place of what was there."""
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(file) as temporary, explained(file):
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(rates), indent=1) + b"\n")


def load_rates(file: Path) -> Rates | None:
    """What `save_rates` wrote; None where nothing was measured yet."""
    advice = "Measure again: hvlite doctor --measure"
    try:
        rates = msgspec.json.decode(file.read_bytes(), type=Rates)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ProfileError(f"{file} cannot be used: {error}. {advice}") from None
    if rates.format != FORMAT:
        raise ProfileError(f"{file} is of format {rates.format}, this hvlite reads {FORMAT}. {advice}")
    curves = [curve for each in rates.compute.values() for curve in (each.matmul, each.attention, each.elementwise)]
    if not all(_is_sound(curve) for curve in curves):
        raise ProfileError(f"{file} cannot be used: it holds a rate that is not above 0. {advice}")
    return rates


def _is_sound(curve: Curve) -> bool:
    counts = [count for count, _ in curve.points]
    return (
        bool(counts) and counts == sorted(set(counts)) and counts[0] > 0 and all(rate > 0 for _, rate in curve.points)
    )


# Known cards.


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """The shares of its peak that a card reaches in large products and in attention."""

    matmul: float
    attention: float


# Products: 80 to 90 % is what well-tuned ones reach (FlashAttention-2, arXiv 2307.08691, section 1). Attention:
# FlashAttention-2 at head dim 128 by the charts of SageAttention (arXiv 2411.10958): 4090 164, 3090 68 to 70 TFLOP/s.
# An Ada card with full-rate accumulation is alike: the published tool's step at 720x1280x129 would take 117 s on an L20
# (119.5 TFLOP/s, 864 GB/s); 122 s is what was reported.
NEAR_PEAK = Shares(matmul=0.85, attention=0.92)
# FlashAttention-2 on an A100: up to 73 % of the peak (its abstract). That step comes to 56 s; 56 s was reported.
A100_LIKE = Shares(matmul=0.8, attention=0.73)
# FlashAttention-2 on an H100: 35 % (FlashAttention-3, arXiv 2407.08608, abstract). That step comes to 34 s; 38 s was
# published for an H800, which computes alike.
HOPPER = Shares(matmul=0.7, attention=0.35)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFigures:
    """Public figures: dense (never with sparsity) TFLOP/s in bf16 and fp16 with fp32 accumulation, dense int8 TOP/s.

    Bandwidths in GB/s; PCIe is one direction.
    """

    name: str
    memory_gib: int
    half_tflops: float
    int8_tops: float
    memory_gbs: float
    pcie_gbs: float
    shares: Shares


# PCI Express, GB/s in one direction: 16 lanes of 8, 16 and 32 GT/s with 128b/130b coding.
GEN4_X16, GEN4_X8, GEN5_X16 = 31.5, 15.75, 63.0
# What large copies from pinned memory reach of that: 25 GB/s of 31.5 is usual.
PCIE_SHARE = 0.8


def _card(
    name: str, memory_gib: int, tensor: tuple[float, float], memory_gbs: float, pcie_gbs: float, shares: Shares
) -> CardFigures:
    return CardFigures(
        name=name,
        memory_gib=memory_gib,
        half_tflops=tensor[0],
        int8_tops=tensor[1],
        memory_gbs=memory_gbs,
        pcie_gbs=pcie_gbs,
        shares=shares,
    )


CARDS = (
    # NVIDIA Ampere GA102 GPU Architecture whitepaper v2, appendix A; the 3060 by its rule: 512 FLOP a clock and SM in
    # bf16, 2048 OP in int8, x 28 SM x 1.777 GHz.
    _card("RTX 3060", 12, (25.5, 101.9), 360, GEN4_X16, NEAR_PEAK),
    _card("RTX 3080", 10, (59.5, 238), 760, GEN4_X16, NEAR_PEAK),
    _card("RTX 3090", 24, (71, 284), 936, GEN4_X16, NEAR_PEAK),
    # NVIDIA Ada GPU Architecture whitepaper v2, appendix; those that came later by its rule (the same as above):
    # 34 SM x 2.535 GHz, 46 x 2.475, 66 x 2.61.
    _card("RTX 4060 Ti", 16, (44.1, 176.5), 288, GEN4_X8, NEAR_PEAK),
    _card("RTX 4070", 12, (58.3, 233.2), 504, GEN4_X16, NEAR_PEAK),
    _card("RTX 4070 Ti Super", 16, (88.2, 352.8), 672, GEN4_X16, NEAR_PEAK),
    _card("RTX 4080", 16, (97.5, 389.9), 717, GEN4_X16, NEAR_PEAK),
    _card("RTX 4090", 24, (165.2, 660.6), 1008, GEN4_X16, NEAR_PEAK),
    # NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix (its rule: 70 SM x 2.452 GHz, 84 x 2.617, 170 x 2.407).
    _card("RTX 5070 Ti", 16, (87.9, 351.5), 896, GEN5_X16, NEAR_PEAK),
    _card("RTX 5080", 16, (112.6, 450.2), 960, GEN5_X16, NEAR_PEAK),
    _card("RTX 5090", 32, (209.5, 838), 1792, GEN5_X16, NEAR_PEAK),
    # Datasheets of the RTX A4000, A5000 and A6000: "tensor performance" 153.4, 222.2, 309.7 with sparsity, halved.
    _card("RTX A4000", 16, (76.7, 153.4), 448, GEN4_X16, A100_LIKE),
    _card("RTX A5000", 24, (111.1, 222.2), 768, GEN4_X16, A100_LIKE),
    _card("RTX A6000", 48, (154.8, 309.7), 768, GEN4_X16, A100_LIKE),
    # Datasheets of the L4 (242 and 485 with sparsity; 72 W, so a long run is slower than this) and the L40S.
    _card("L4", 24, (121, 242), 300, GEN4_X16, NEAR_PEAK),
    _card("L40S", 48, (362, 733), 864, GEN4_X16, NEAR_PEAK),
    # Datasheet of the A100 (40 GB: 1,555 GB/s; 80 GB: PCIe 1,935, SXM 2,039).
    _card("A100 40GB", 40, (312, 624), 1555, GEN4_X16, A100_LIKE),
    _card("A100 80GB", 80, (312, 624), 1935, GEN4_X16, A100_LIKE),
    # Datasheet of the H100: PCIe 1,513 and 3,026, SXM 1,979 and 3,958 with sparsity, halved.
    _card("H100 PCIe", 80, (756, 1513), 2000, GEN5_X16, HOPPER),
    _card("H100", 80, (989, 1979), 3350, GEN5_X16, HOPPER),
)


def find_card(name: str) -> CardFigures:
    """The card of that name, as people or the driver write it; RequestError lists those that are known."""
    known = {_plain(card.name): card for card in CARDS}
    found = known.get(_plain(name))
    if found is None:
        nearest = difflib.get_close_matches(_plain(name), known, n=1)
        hint = f" - did you mean {known[nearest[0]].name!r}?" if nearest else ""
        raise RequestError(f"no figures of a card named {name!r}{hint} Known: {', '.join(card.name for card in CARDS)}")
    return found


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())


def card_rates(card: CardFigures, *, disk_read: float | None = None) -> Rates:
    """What is to be expected of a card by its public figures, in a machine with that disk."""
    half = _product_curve(card, card.half_tflops, 2)
    attention = Curve(((256, card.half_tflops * 1e12 * card.shares.attention),))
    compute = Compute(matmul=half, attention=attention, elementwise=Curve(((1, card.memory_gbs * 1e9),)))
    # A weight is read in its own bytes and written in two.
    dequantise = {"int8": 3.0, "fp8": 3.0, "nf4": 2.5, "nf4-double": 2.5}
    return Rates(
        made_by=f"the public figures of the {card.name}",
        compute={"bf16": compute, "fp16": compute},
        dequantise={weights: card.memory_gbs * 1e9 / nbytes for weights, nbytes in dequantise.items()},
        int8_matmul=_product_curve(card, card.int8_tops, 1),
        host_to_device=card.pcie_gbs * 1e9 * PCIE_SHARE,
        disk_read=disk_read,
    )


def _product_curve(card: CardFigures, tera: float, weight_bytes: int) -> Curve:
    """With few tokens a product takes as long as reading its weights; with enough of them it reaches its share."""
    reading = 2 * card.memory_gbs * 1e9 / weight_bytes
    computing = tera * 1e12 * card.shares.matmul
    enough = math.ceil(computing / reading)
    return Curve(((1, reading), (max(2, enough), computing)))
