"""The HunyuanVideo transformer, top to bottom (spec 1).

It is written to be streamed and to hold little: modulation lives apart from the blocks, is computed for the
whole schedule first (`prepare_schedule`) and is never needed again; a block changes the joint sequence x
[S,D] (video first, text after) in place, works in chunks of tokens into the buffers of a `Workspace`,
applies its fused projections row slice by row slice, and never sees a mask, since text padding is dropped
before it gets here. A chunk and a group of heads leave nothing behind but their results, so that on meta
tensors one of each, the longest, shows the memory of all.

Nothing here knows where weights come from or on which device they lie; parameters are filled by
`weights.load`.
"""

# N video tokens  L text tokens  S = N + L  H heads  K head dim  D hidden  T steps
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvlite.dims import SINUSOID_WIDTH, DitDims, LatentShape
from hvlite.model.ops import (
    AffineLayerNorm,
    Linear,
    RmsNorm,
    attention,
    chunks_of,
    gelu_tanh_,
    make_rope,
    modulate,
    rotate_into,
    sinusoid,
)
from hvlite.model.visit import Visit, at_hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """The knobs of a block's schedule: tokens per chunk, groups of heads, attention back end."""

    token_chunk: int = 2048
    head_groups: int = 1
    attention: str = "sdpa"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """The buffers that all blocks share, and the RoPE tables; made once for a run.

    q, k, v [S,H/groups,K] hold one group of heads. cos, sin [S,K/2] fp32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    video_tokens: int
    knobs: Activations


@dataclass(frozen=True, slots=True)
class Conditioning:
    """All that depends on prompt and timestep, for every step: modulation vectors and the refined text.

    double [T,blocks,2,6,D] (image, text; shift, scale, gate of attention, then of the MLP), single
    [T,blocks,3,D], final [T,2,D] (shift, scale), text [T,L,D].
    """

    double: Tensor
    single: Tensor
    final: Tensor
    text: Tensor

    def of_block(self, index: int) -> Tensor:
        """Vectors of block `index`, counted through both kinds, at every step: [T,2,6,D] or [T,3,D]."""
        double_blocks = self.double.shape[1]
        return self.double[:, index] if index < double_blocks else self.single[:, index - double_blocks]

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Conditioning":
        """What `move` makes of each of them."""
        return Conditioning(*(move(getattr(self, each.name)) for each in fields(self)))

    def at_step(self, step: int, device: torch.device) -> "Conditioning":
        """A copy of one step's (T = 1) on `device`."""
        return self.moved(lambda every: every[step, None].to(device, copy=True))


@dataclass(frozen=True, slots=True)
class QkvPart:
    """What makes some rows of q, k, v: a Linear whose first 3 D rows are q | k | v, norms, shift, scale."""

    linear: Linear
    q_norm: RmsNorm
    k_norm: RmsNorm
    tokens: slice
    shift: Tensor
    scale: Tensor

    def project(self, x: Tensor, heads: range, work: Workspace) -> None:
        """Fill the buffers' rows of these tokens for `heads`: norm, modulation, projection, QK norm, RoPE."""
        for chunk in chunks_of(x[self.tokens], work.knobs.token_chunk):
            self._project_rows(x, slice(self.tokens.start + chunk.start, self.tokens.start + chunk.stop), heads, work)

    def _project_rows(self, x: Tensor, rows: slice, heads: range, work: Workspace) -> None:
        hidden, width = x.shape[-1], work.q.shape[-1]
        cos, sin = work.cos[rows], work.sin[rows]
        z = modulate(x[rows], self.shift, self.scale)

        def project_part(part: int) -> Tensor:
            begin = part * hidden + heads.start * width
            out: Tensor = self.linear(z, (begin, begin + len(heads) * width))
            return out.view(len(z), -1, width)

        rotate_into(work.q[rows], self.q_norm(project_part(0)), cos, sin)
        rotate_into(work.k[rows], self.k_norm(project_part(1)), cos, sin)
        work.v[rows] = project_part(2)


def attend(x: Tensor, parts: tuple[QkvPart, ...], work: Workspace) -> Tensor:
    """Joint attention over the tokens of all parts, one group of heads at a time: [S,D]."""
    tokens, group, width = len(x), work.q.shape[1], work.q.shape[2]
    heads = x.shape[1] // width

    def attend_group(first: int) -> Tensor:
        for part in parts:
            part.project(x, range(first, first + group), work)
        out: Tensor = attention(work.q[:tokens], work.k[:tokens], work.v[:tokens], work.knobs.attention)
        return out

    if group == heads:
        return attend_group(0).flatten(1)
    attended = x.new_empty(tokens, heads, width)
    for first in range(0, group if x.is_meta else heads, group):
        attended[:, first : first + group] = attend_group(first)
    return attended.flatten(1)


class EmbeddingMlp(nn.Module):
    """Linear, SiLU, Linear: the shape of every embedder of a vector."""

    def __init__(self, in_features: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, hidden)
        self.linear_2 = Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))  # type: ignore[no-any-return]


class RefinerBlock(nn.Module):
    """Self-attention over the text; affine norms, SiLU MLP, two gates, no QK norm, no RoPE (spec 1.6)."""

    def __init__(self, dims: DitDims) -> None:
        super().__init__()
        self.heads = dims.heads
        self.norm1 = AffineLayerNorm(dims.hidden)
        self.norm2 = AffineLayerNorm(dims.hidden)
        self.attn_qkv = Linear(dims.hidden, 3 * dims.hidden)
        self.attn_proj = Linear(dims.hidden, dims.hidden)
        self.fc1 = Linear(dims.hidden, dims.mlp_hidden)
        self.fc2 = Linear(dims.mlp_hidden, dims.hidden)
        self.mod = Linear(dims.hidden, 2 * dims.hidden)

    def forward(self, y: Tensor, condition: Tensor, backend: str) -> Tensor:
        gate_attn, gate_mlp = self.mod(F.silu(condition)).chunk(2, dim=-1)
        q, k, v = self.attn_qkv(self.norm1(y)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        y = y + gate_attn * self.attn_proj(attention(q, k, v, backend).flatten(1))
        return y + gate_mlp * self.fc2(F.silu(self.fc1(self.norm2(y))))  # type: ignore[no-any-return]


class TokenRefiner(nn.Module):
    """LLM states -> the text stream; conditioned by timestep and mean state, not by CLIP or guidance."""

    def __init__(self, dims: DitDims) -> None:
        super().__init__()
        self.input_embedder = Linear(dims.text_width, dims.hidden)
        self.t_embedder = EmbeddingMlp(SINUSOID_WIDTH, dims.hidden)
        self.c_embedder = EmbeddingMlp(dims.text_width, dims.hidden)
        self.blocks = nn.ModuleList(RefinerBlock(dims) for _ in range(dims.refiner_blocks))

    def forward(self, timestep: Tensor, text: Tensor, backend: str) -> Tensor:
        """timestep [1], text [L,text_width] without padding -> [L,D]."""
        mean = text.float().mean(dim=0, keepdim=True)
        condition = self.t_embedder(sinusoid(timestep)) + self.c_embedder(mean)
        y = self.input_embedder(text)
        for block in self.blocks:
            y = block(y, condition, backend)
        return y  # type: ignore[no-any-return]


class DoubleModulation(nn.Module):
    """The projections that give a double block its twelve vectors."""

    def __init__(self, dims: DitDims) -> None:
        super().__init__()
        self.img = Linear(dims.hidden, 6 * dims.hidden)
        self.txt = Linear(dims.hidden, 6 * dims.hidden)

    def forward(self, vector: Tensor) -> Tensor:
        """silu(vec) [1,D] -> [2,6,D]."""
        return torch.stack([self.img(vector).view(6, -1), self.txt(vector).view(6, -1)])


class Stream(nn.Module):
    """One of the two streams of a double block: its own projections and norms."""

    def __init__(self, dims: DitDims) -> None:
        super().__init__()
        self.attn_qkv = Linear(dims.hidden, 3 * dims.hidden)
        self.q_norm = RmsNorm(dims.head_dim)
        self.k_norm = RmsNorm(dims.head_dim)
        self.attn_proj = Linear(dims.hidden, dims.hidden)
        self.fc1 = Linear(dims.hidden, dims.mlp_hidden)
        self.fc2 = Linear(dims.mlp_hidden, dims.hidden)

    def finish(self, x: Tensor, attended: Tensor, vectors: Tensor, chunk: int) -> None:
        """x += gate1 proj(attended), then x += gate2 MLP(x), by chunks; x, attended [S,D], vectors [6,D]."""
        for tokens in chunks_of(x, chunk):
            self._finish_rows(x[tokens], attended[tokens], vectors)

    def _finish_rows(self, x: Tensor, attended: Tensor, vectors: Tensor) -> None:
        gate1, shift2, scale2, gate2 = vectors[2:]
        x += self.attn_proj(attended).mul_(gate1)
        hidden = gelu_tanh_(self.fc1(modulate(x, shift2, scale2)))
        x += self.fc2(hidden).mul_(gate2)


class DoubleBlock(nn.Module):
    """Two streams with weights of their own and one joint attention (spec 1.10)."""

    def __init__(self, dims: DitDims) -> None:
        super().__init__()
        self.img = Stream(dims)
        self.txt = Stream(dims)

    def forward(self, x: Tensor, vectors: Tensor, work: Workspace) -> None:
        """Change x [S,D] in place; vectors [2,6,D]."""
        streams = (
            (self.img, slice(0, work.video_tokens), vectors[0]),
            (self.txt, slice(work.video_tokens, len(x)), vectors[1]),
        )
        parts = tuple(
            QkvPart(stream.attn_qkv, stream.q_norm, stream.k_norm, tokens, own[0], own[1])
            for stream, tokens, own in streams
        )
        attended = attend(x, parts, work)
        for stream, tokens, own in streams:
            stream.finish(x[tokens], attended[tokens], own, work.knobs.token_chunk)


class SingleBlock(nn.Module):
    """One stream; attention and MLP in parallel behind one norm and one gate (spec 1.11).

    linear2 is held as two Linears, so that the MLP half is made and consumed chunk by chunk.
    """

    def __init__(self, dims: DitDims) -> None:
        super().__init__()
        self.linear1 = Linear(dims.hidden, 3 * dims.hidden + dims.mlp_hidden)
        self.linear2_attn = Linear(dims.hidden, dims.hidden)
        self.linear2_mlp = Linear(dims.mlp_hidden, dims.hidden, bias=False)
        self.q_norm = RmsNorm(dims.head_dim)
        self.k_norm = RmsNorm(dims.head_dim)
        self.mlp_rows = (3 * dims.hidden, 3 * dims.hidden + dims.mlp_hidden)

    def forward(self, x: Tensor, vectors: Tensor, work: Workspace) -> None:
        """Change x [S,D] in place; vectors [3,D]."""
        every = slice(0, len(x))
        attended = attend(x, (QkvPart(self.linear1, self.q_norm, self.k_norm, every, vectors[0], vectors[1]),), work)
        for tokens in chunks_of(x, work.knobs.token_chunk):
            self._finish_rows(x[tokens], attended[tokens], vectors)

    def _finish_rows(self, x: Tensor, attended: Tensor, vectors: Tensor) -> None:
        shift, scale, gate = vectors
        hidden = gelu_tanh_(self.linear1(modulate(x, shift, scale), self.mlp_rows))
        x += self.linear2_mlp.add_to(hidden, self.linear2_attn(attended)).mul_(gate)


class Dit(nn.Module):
    """The transformer's parameters, and the steps of one forward pass as methods."""

    def __init__(self, dims: DitDims) -> None:
        super().__init__()
        self.dims = dims
        self.img_in = Linear(dims.patch_features, dims.hidden)
        self.time_in = EmbeddingMlp(SINUSOID_WIDTH, dims.hidden)
        self.vector_in = EmbeddingMlp(dims.pooled_width, dims.hidden)
        if dims.has_guidance:
            self.guidance_in = EmbeddingMlp(SINUSOID_WIDTH, dims.hidden)
        self.txt_in = TokenRefiner(dims)
        self.double_mods = nn.ModuleList(DoubleModulation(dims) for _ in range(dims.double_blocks))
        self.single_mods = nn.ModuleList(Linear(dims.hidden, 3 * dims.hidden) for _ in range(dims.single_blocks))
        self.final_mod = Linear(dims.hidden, 2 * dims.hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(dims) for _ in range(dims.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(dims) for _ in range(dims.single_blocks))
        self.final_linear = Linear(dims.hidden, dims.patch_features)

    @property
    def blocks(self) -> list[nn.Module]:
        """Double blocks, then single blocks, in the order in which a step visits them."""
        return [*self.double_blocks, *self.single_blocks]

    @property
    def modulations(self) -> list[nn.Module]:
        """What gives each of `blocks` its vectors, in the same order."""
        return [*self.double_mods, *self.single_mods]

    @torch.no_grad()
    def prepare_schedule(
        self,
        timesteps: Tensor,
        guidance: float,
        prompts: Sequence[tuple[Tensor, Tensor]],
        backend: str = "sdpa",
        visit: Visit = at_hand,
    ) -> list[Conditioning]:
        """Everything of every step that does not depend on the latents, for each prompt.

        timesteps [T] fp32 (1000 sigma); guidance as asked (6.0); a prompt is its text [L,text_width] and pooled
        [pooled_width]. Modulation i is touched within `visit(i)` only, once for all steps and prompts. One timestep at
        a time, so that a vector has the same bits whichever others are computed.
        """
        started = [self._start(timesteps, guidance, *prompt, backend) for prompt in prompts]
        for index, modulation in enumerate(self.modulations):
            with visit(index):
                for vectors, conditioning in started:
                    of_block = conditioning.of_block(index)
                    for step, vector in enumerate(vectors):
                        of_block[step] = modulation(vector).view(of_block.shape[1:])
        return [conditioning for _, conditioning in started]

    def _start(
        self, timesteps: Tensor, guidance: float, text: Tensor, pooled: Tensor, backend: str
    ) -> tuple[list[Tensor], Conditioning]:
        """silu(vec) [1,D] of every step, and all that comes of it but the blocks' vectors, whose places are empty.

        On meta the first step stands for all.
        """
        dims, count = self.dims, len(timesteps)
        steps = timesteps.split(1)[:1] if timesteps.is_meta else timesteps.split(1)
        vectors = [F.silu(self._condition(step, guidance, pooled)) for step in steps]
        empty = vectors[0].new_empty
        conditioning = Conditioning(
            double=empty(count, dims.double_blocks, 2, 6, dims.hidden),
            single=empty(count, dims.single_blocks, 3, dims.hidden),
            final=empty(count, 2, dims.hidden),
            text=empty(count, len(text), dims.hidden),
        )
        for step, (timestep, vector) in enumerate(zip(steps, vectors, strict=True)):
            conditioning.final[step] = self.final_mod(vector).view(2, -1)
            conditioning.text[step] = self.txt_in(timestep, text, backend)
        return vectors, conditioning

    def _condition(self, timestep: Tensor, guidance: float, pooled: Tensor) -> Tensor:
        """time + pooled, then + guidance: [1,D] (spec 1.4)."""
        vector = self.time_in(sinusoid(timestep)) + self.vector_in(pooled[None])
        if self.dims.has_guidance:
            # rounded in the weights' dtype, as the reference does: 6.0 becomes 6016 in bf16
            dtype = self.final_mod.weight.dtype
            number = torch.tensor([guidance], dtype=dtype, device=timestep.device) * 1000
            vector = vector + self.guidance_in(sinusoid(number))
        return vector  # type: ignore[no-any-return]

    def make_workspace(self, shape: LatentShape, text_tokens: int, knobs: Activations, dtype: torch.dtype) -> Workspace:
        """Buffers for `shape` and prompts of up to `text_tokens`, on the device of the parameters."""
        dims = self.dims
        assert dims.heads % knobs.head_groups == 0, f"{dims.heads} heads, {knobs.head_groups} groups"
        device = self.final_linear.weight.device
        size = (shape.tokens + text_tokens, dims.heads // knobs.head_groups, dims.head_dim)
        q, k, v = (torch.empty(size, dtype=dtype, device=device) for _ in range(3))
        cos, sin = make_rope(shape.grid, text_tokens, dims.rope_axes, dims.rope_theta, device)
        return Workspace(q=q, k=k, v=v, cos=cos, sin=sin, video_tokens=shape.tokens, knobs=knobs)

    @torch.no_grad()
    def embed(self, latents: Tensor, text: Tensor) -> Tensor:
        """latents [1,C,T,H,W] and refined text [L,D] -> the joint sequence x [S,D]."""
        video = self.img_in(patchify(latents, self.dims.patch))
        return torch.cat([video, text.to(video.dtype)])

    @torch.no_grad()
    def run_block(self, index: int, x: Tensor, conditioning: Tensor, work: Workspace) -> None:
        """Block `index` (counted through both kinds) changes x in place."""
        self.blocks[index](x, conditioning, work)

    @torch.no_grad()
    def head(self, x: Tensor, final: Tensor, shape: LatentShape, chunk: int) -> Tensor:
        """x [S,D], final [2,D] -> velocity [1,C,T,H,W] in the weights' dtype."""
        shift, scale = final
        tokens = shape.tokens
        out = torch.empty(tokens, self.dims.patch_features, dtype=x.dtype, device=x.device)
        for rows in chunks_of(out, chunk):
            out[rows] = self.final_linear(modulate(x[rows], shift, scale))
        return unpatchify(out, shape, self.dims)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[1,C,T,H,W] -> [N,C*p*p]; token order (t,y,x), channel the slowest of a token's features (spec 1.5)."""
    _, channels, frames, height, width = latents.shape
    cut = latents.view(channels, frames, height // patch, patch, width // patch, patch)
    return cut.permute(1, 2, 4, 0, 3, 5).reshape(-1, channels * patch * patch)


def unpatchify(tokens: Tensor, shape: LatentShape, dims: DitDims) -> Tensor:
    """[N,C*p*p] -> [1,C,T,H,W] (spec 1.12)."""
    grid = tokens.view(*shape.grid, dims.latent_channels, dims.patch, dims.patch)
    latents = grid.permute(3, 0, 1, 4, 2, 5)
    return latents.reshape(1, dims.latent_channels, shape.frames, shape.height, shape.width)
