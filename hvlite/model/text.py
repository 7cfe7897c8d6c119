"""Text conditioning: a prompt -> Llama's states [l,width] and CLIP's pooled vector [P] (spec 4).

Tokenising is apart from running, so that what a prompt loses is known before any weight moves. Nothing is
padded: both encoders are causal, so the true tokens alone give the published states. The modules are
transformers' own, built empty, with only the layers that are used; whoever loads weights assigns parameters.

Never call `.to(dtype)` on these modules: it would round the RoPE frequencies too, which stay in fp32.
"""

# l tokens of one prompt  P pooled width
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from hvlite.dims import ClipDims, LlamaDims
from hvlite.errors import RequestError, WeightsError
from hvlite.events import Note
from hvlite.model.visit import Visit, at_hand

# Its models take seconds to import: a clip that goes on, or is only decoded, needs none of them.
if TYPE_CHECKING:
    from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerFast

TEXT_TOKENS = 256
# Configs written before 2023 hold this instead of CLIP's end token; transformers then takes the highest id.
LEGACY_EOS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTemplate:
    """What Llama reads around a prompt; `prefix` is `published_crop` tokens of the published tokenizer."""

    name: str
    prefix: str
    suffix: str
    published_crop: int


def _template(name: str, instruction: str, published_crop: int) -> TextTemplate:
    return TextTemplate(
        name=name,
        prefix=(
            f"<|start_header_id|>system<|end_header_id|>\n\n{instruction}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n"
        ),
        suffix="<|eot_id|>",
        published_crop=published_crop,
    )


# The published wording, missing spaces and all: any change moves every state.
TEMPLATES = {
    "video": _template(
        "video",
        "Describe the video by detailing the following aspects: 1. The main content and theme of the video."
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
        "4. background environment, light, style and atmosphere."
        "5. camera angles, movements, and transitions used in the video:",
        published_crop=95,
    ),
    "image": _template(
        "image",
        "Describe the image by detailing the color, shape, size, texture, quantity, text, "
        "spatial relationships of the objects and background:",
        published_crop=36,
    ),
}


def text_template(name: str) -> TextTemplate:
    """The published template `video` or `image`."""
    if name not in TEMPLATES:
        raise RequestError(f'template must be {" or ".join(TEMPLATES)}; got "{name}"')
    return TEMPLATES[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokens:
    """One prompt as one encoder reads it: its first `crop` ids are the template's, `cut` ids did not fit."""

    ids: tuple[int, ...]
    crop: int = 0
    cut: int = 0
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptStates:
    """What the transformer is told: text [l,width] without padding and template, pooled [P]."""

    text: Tensor
    pooled: Tensor
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """Both encoders. `device` is where Llama's layers lie; None: where its table of embeddings does."""

    llama: "LlamaModel"
    clip: "CLIPTextModel"
    device: torch.device | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoders(Encoders):
    """Both encoders with their tokenizers."""

    llama_tokenizer: "PreTrainedTokenizerFast"
    clip_tokenizer: "PreTrainedTokenizerFast"


def import_encoders() -> None:
    """Take the seconds now that building the first encoder would take for its imports."""
    from transformers import CLIPTextModel, LlamaModel

    del CLIPTextModel, LlamaModel


def build_llama(dims: LlamaDims, dtype: torch.dtype = torch.float32) -> "LlamaModel":
    """The used layers, with empty (meta) parameters and no final norm: they end in `hidden_states[-3]`."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=dims.vocabulary,
        hidden_size=dims.hidden,
        intermediate_size=dims.mlp_hidden,
        num_hidden_layers=dims.used_layers,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads,
        rms_norm_eps=dims.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": dims.rope_theta},
        max_position_embeddings=dims.max_positions,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        llama = LlamaModel(config)
    llama.add_module("norm", nn.Identity())
    _freeze_empty(llama, dtype)
    return llama


def build_clip(dims: ClipDims, dtype: torch.dtype = torch.float32) -> "CLIPTextModel":
    """CLIP's text tower with empty (meta) parameters, without projection."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=dims.vocabulary,
        hidden_size=dims.hidden,
        intermediate_size=dims.mlp_hidden,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        max_position_embeddings=dims.positions,
        hidden_act=dims.activation,
        layer_norm_eps=dims.layer_norm_eps,
        eos_token_id=dims.eos_token,
        bos_token_id=None,  # never used here; its default lies outside a small vocabulary
        pad_token_id=None,
    )
    config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        clip = CLIPTextModel(config)
    _freeze_empty(clip, dtype)
    return clip


def _freeze_empty(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the empty parameters their dtype; buffers keep theirs."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            owner.register_parameter(name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    module.eval()


def has_tokenizer(folder: Path) -> bool:
    """Whether the files that `load_tokenizer` needs are in this folder."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a local folder: `tokenizer.json`, or CLIP's `vocab.json` and `merges.txt`.

    The class is chosen by the files alone: nothing in the folder can name code to run or reach the network.
    """
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    if not has_tokenizer(folder):
        raise WeightsError(
            f"{folder} holds no tokenizer: found neither tokenizer.json nor vocab.json with merges.txt. "
            "Copy the tokenizer's files there from the model's repository."
        )
    kind: type[PreTrainedTokenizerFast] = CLIPTokenizer
    if (folder / "tokenizer.json").is_file():
        kind = PreTrainedTokenizerFast
    try:
        tokenizer: PreTrainedTokenizerFast = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a malformed file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"the tokenizer in {folder} cannot be read: {reason}. Copy its files again from the model's repository."
        ) from error
    return tokenizer


def text_tokens(tokenizer: "PreTrainedTokenizerFast", prompt: str, template: TextTemplate) -> PromptTokens:
    """The prompt in its template, for Llama: 256 tokens after the template, a longer prompt loses its tail.

    Names of special tokens in a prompt are read as those tokens, as published, and noted. What stands before
    the prompt never depends on it (WeightsError if the tokenizer would let it).
    """
    prompt = _clean(prompt)
    prefix = _with_bos(tokenizer, template.prefix)
    every = _with_bos(tokenizer, template.prefix + prompt + template.suffix)
    crop = len(prefix)
    if every[:crop] != prefix:
        same = next(i for i, token in enumerate(prefix) if every[i : i + 1] != [token])
        raise WeightsError(
            f"the {template.name} template alone is {crop} tokens, only {same} of them open the whole text: "
            "this tokenizer merges template and prompt. Use the one that came with the text encoder."
        )
    if len(every) == crop:
        raise RequestError(
            f"the prompt is empty: 0 tokens follow the {crop} of the {template.name} template, 1 is needed. "
            "Write a prompt."
        )
    ids, rest = every[: crop + TEXT_TOKENS], every[crop + TEXT_TOKENS :]
    return PromptTokens(
        ids=tuple(ids),
        crop=crop,
        cut=len(rest),
        notes=_notes(tokenizer, prompt, "text encoder", len(ids) - crop, rest),
    )


def pooled_tokens(tokenizer: "PreTrainedTokenizerFast", prompt: str, positions: int) -> PromptTokens:
    """The bare prompt, for CLIP: at most `positions` tokens, the last of them always the end token."""
    prompt = _clean(prompt)
    every = _ids(tokenizer, prompt)
    rest: list[int] = []
    if len(every) > positions:
        every, rest = [*every[: positions - 1], every[-1]], every[positions - 1 : -1]
    return PromptTokens(
        ids=tuple(every),
        cut=len(rest),
        notes=_notes(tokenizer, prompt, "pooled text encoder", len(every), rest),
    )


def _clean(prompt: str) -> str:
    """The prompt, stripped as the reference does; RequestError if it holds half a surrogate pair."""
    broken = next((i for i, char in enumerate(prompt) if 0xD800 <= ord(char) <= 0xDFFF), None)
    if broken is not None:
        raise RequestError(
            f"character {broken + 1} of {len(prompt)} of the prompt is no text (U+{ord(prompt[broken]):X}): "
            "it was not UTF-8 where it came from. Write it again in UTF-8."
        )
    return prompt.strip()


def _ids(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, padding=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _with_bos(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Ids that begin with the tokenizer's bos, which transformers 5 forgets if only a config asks for it."""
    ids, bos = _ids(tokenizer, text), tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _notes(
    tokenizer: "PreTrainedTokenizerFast", prompt: str, reader: str, read: int, rest: list[int]
) -> tuple[Note, ...]:
    """What a user should know: words that did not fit, names of special tokens in the prompt."""
    notes = []
    lost = str(tokenizer.decode(rest, skip_special_tokens=True)).strip() if rest else ""
    if lost:
        shown = textwrap.shorten(lost, width=60, placeholder=" ...")
        found = read + len(rest)
        notes.append(Note(f'the {reader} reads {read} tokens, the prompt has {found}: it ignores "{shown}"'))
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = ", ".join(sorted(name for name in special if name in prompt))
    if names:
        notes.append(Note(f"the {reader} reads {names} in the prompt as control tokens, not as text"))
    return tuple(notes)


@torch.no_grad()
def encode_texts(
    llama: "LlamaModel", prompts: Sequence[PromptTokens], device: torch.device | None = None, visit: Visit = at_hand
) -> list[Tensor]:
    """States [l,width] of each prompt's own tokens, in the weights' dtype, on `device` (None: where the table lies).

    All prompts pass layer i within `visit(i)`, each by itself, so that no bit depends on which others are asked for.
    The table of embeddings may lie elsewhere than the layers: only the prompts' rows travel. The layers are walked
    here, not by `llama(...)`: its mask code reads values, which meta tensors have not.
    """
    # Without a mask sdpa is causal, but transformers' eager attention would see every token.
    assert llama.config._attn_implementation == "sdpa"
    # The table is looked up as it is stored; outside of visits, too, a norm has the dtype of the layers' products.
    dtype = llama.layers[0].get_parameter("input_layernorm.weight").dtype
    states = [llama.embed_tokens(_id_tensor(tokens, llama.embed_tokens)).to(device, dtype) for tokens in prompts]
    rotary = [llama.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None]) for x in states]
    for index, layer in enumerate(llama.layers):
        with visit(index):
            for prompt, x in enumerate(states):
                states[prompt] = layer(x, position_embeddings=rotary[prompt])
                del x  # or it would be held beside the next one
    return [x[0, tokens.crop :].clone() for x, tokens in zip(states, prompts, strict=True)]


@torch.no_grad()
def encode_pooled(clip: "CLIPTextModel", tokens: PromptTokens) -> Tensor:
    """The final layer norm's output [P] at the first end token, not projected."""
    eos = clip.config.eos_token_id
    if eos != LEGACY_EOS and eos not in tokens.ids:
        raise WeightsError(
            f"the pooled text encoder needs end token {eos}, its tokenizer ends with {tokens.ids[-1:]}: "
            "they do not belong together. Use the tokenizer that came with the encoder."
        )
    ids = _id_tensor(tokens, clip.embeddings.token_embedding)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    pooled: Tensor = clip(input_ids=ids, position_ids=positions).pooler_output[0]
    return pooled


def _id_tensor(tokens: PromptTokens, embedding: nn.Embedding) -> Tensor:
    highest = max(tokens.ids)
    if highest >= embedding.num_embeddings:
        raise WeightsError(
            f"the tokenizer gives token {highest}, the encoder has {embedding.num_embeddings} tokens: "
            "they do not belong together. Use the tokenizer that came with the encoder."
        )
    return torch.tensor([tokens.ids], device=embedding.weight.device)


def encode_prompts(
    prompts: Sequence[str], encoders: TextEncoders, template: TextTemplate, visit: Visit = at_hand
) -> list[PromptStates]:
    """The states of each prompt; every layer is visited once for all of them."""
    assert not isinstance(prompts, str)
    different = list(dict.fromkeys(prompts))
    positions = encoders.clip.config.max_position_embeddings
    text = [text_tokens(encoders.llama_tokenizer, prompt, template) for prompt in different]
    pooled = [pooled_tokens(encoders.clip_tokenizer, prompt, positions) for prompt in different]
    states = dict(zip(different, encode_tokens(text, pooled, encoders, visit), strict=True))
    return [states[prompt] for prompt in prompts]


def encode_tokens(
    text: Sequence[PromptTokens], pooled: Sequence[PromptTokens], encoders: Encoders, visit: Visit = at_hand
) -> list[PromptStates]:
    """The states of prompts that are tokens already, first the pooled ones."""
    vectors = [encode_pooled(encoders.clip, tokens) for tokens in pooled]
    states = encode_texts(encoders.llama, text, encoders.device, visit)
    return [
        PromptStates(text=state, pooled=vector, notes=(*long.notes, *short.notes))
        for state, vector, long, short in zip(states, vectors, text, pooled, strict=True)
    ]


def longest_prompt(clip: "CLIPTextModel", template: TextTemplate) -> tuple[PromptTokens, PromptTokens]:
    """The longest prompt of the published tokenizers as both encoders read it, without any tokenizer."""
    text = PromptTokens(ids=(0,) * (template.published_crop + TEXT_TOKENS), crop=template.published_crop)
    eos = clip.config.eos_token_id
    assert isinstance(eos, int)
    return text, PromptTokens(ids=(0,) * (clip.config.max_position_embeddings - 1) + (eos,))
