"""What `hvlite models fetch` brings: of which repositories, at which commits, which files, and under which licences.

Tables only. The transformer comes from the diffusers conversion, whose shards are safetensors of 5 GB, or as the
official fp8 pair; everything else from the conversion either way. The licences' terms are told in our own words, as
a reader's aid: what holds is the text behind each address.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Variant = Literal["bf16", "fp8"]

CONVERSION = "hunyuanvideo-community/HunyuanVideo"
CONVERSION_COMMIT = "e8c2aaa66fe3742a32c11a6766aecbf07c56e773"
OFFICIAL = "tencent/HunyuanVideo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """Whoever fetches accepts it; `terms` are the points not to be missed."""

    name: str
    version: str
    url: str
    covers: str
    terms: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Files of one folder of a repository, which go to the model's folder `part`.

    `names` are patterns of fnmatch, each of which must find a file; the `optional` ones need not. A `revision` that is
    no commit becomes the commit that it stands for when the files are listed.
    """

    part: str
    repository: str
    revision: str
    folder: str
    names: tuple[str, ...]
    optional: tuple[str, ...] = ()


def _converted(part: str, *names: str, optional: tuple[str, ...] = ()) -> Wanted:
    return Wanted(
        part=part,
        repository=CONVERSION,
        revision=CONVERSION_COMMIT,
        folder=part,
        names=names,
        optional=optional,
    )


_WEIGHTS = ("config.json", "*.safetensors")
_INDEX = ("*.safetensors.index.json",)
_BESIDE_THE_TRANSFORMER = (
    _converted("vae", *_WEIGHTS),
    _converted("text_encoder", *_WEIGHTS, optional=_INDEX),
    _converted("text_encoder_2", *_WEIGHTS),
    _converted("tokenizer", "*.json"),
    _converted("tokenizer_2", "*.json", optional=("*.txt",)),
)
_OFFICIAL_FP8 = Wanted(
    part="transformer",
    repository=OFFICIAL,
    revision="main",
    folder="hunyuan-video-t2v-720p/transformers",
    names=("mp_rank_00_model_states_fp8.pt", "mp_rank_00_model_states_fp8_map.pt"),
)
VARIANTS: Mapping[Variant, tuple[Wanted, ...]] = {
    "bf16": (_converted("transformer", *_WEIGHTS, optional=_INDEX), *_BESIDE_THE_TRANSFORMER),
    "fp8": (_OFFICIAL_FP8, *_BESIDE_THE_TRANSFORMER),
}

LICENCES = (
    Licence(
        name="Tencent Hunyuan Community License Agreement",
        version="Tencent HunyuanVideo, released December 3, 2024",
        url="https://github.com/Tencent-Hunyuan/HunyuanVideo/blob/main/LICENSE.txt",
        covers="the transformer and the VAE",
        terms=(
            "NOT LICENSED IN THE EUROPEAN UNION, THE UNITED KINGDOM AND SOUTH KOREA: nobody may use, copy or pass on "
            "the model, or use or show what it renders, in these places.",
            "Elsewhere its use is free of charge within Tencent's acceptable use policy; whoever serves more than 100 "
            "million users a month needs a licence of their own from Tencent.",
            "Neither the model nor what it renders may be used to improve another AI model.",
            "Whoever passes the weights on, changed or not, passes on the agreement, its notice and these limits.",
        ),
    ),
    Licence(
        name="Meta Llama 3 Community License Agreement",
        version="Meta Llama 3, released April 18, 2024",
        url="https://www.llama.com/llama3/license/",
        covers="the text encoder, a LLaVA model built on Llama 3 8B",
        terms=(
            "Its use is free of charge within Meta's acceptable use policy; whoever serves more than 700 million users "
            "a month needs a licence of their own from Meta.",
            "Neither the model nor its output may be used to improve another large language model.",
            "Whoever passes it on, or offers a product that uses it, passes on the agreement and shows "
            '"Built with Meta Llama 3".',
        ),
    ),
    Licence(
        name="MIT License",
        version="OpenAI's CLIP repository, 2021",
        url="https://github.com/openai/CLIP/blob/main/LICENSE",
        covers="the second text encoder, CLIP ViT-L/14",
        terms=("The copyright notice stays with every copy.",),
    ),
)
