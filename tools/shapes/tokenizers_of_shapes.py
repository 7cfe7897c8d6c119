"""Two word-level tokenizers with the special tokens of Llama 3 and of CLIP; an unknown word is `<unk>`."""

import re
from pathlib import Path

from data import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hvlite.model.text import TEMPLATES

CAPTION_WORDS = (
    *("a", "an", "the", "one", "moving", "moves", "that", "going", "sliding", "on", "over", "background", "to", "of"),
    *("and", "in", ",", ".", "!", "video", "please", "nice", "simple", "flat"),
)
LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<pad>",
    "<unk>",
)
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<unk>")


def _words() -> list[str]:
    """Caption words and the words of the two prompt templates, each once, in a fixed order."""
    words = [*CAPTION_WORDS, *COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS]
    for template in TEMPLATES.values():
        bare = re.sub(r"<\|\w+\|>", " ", template.prefix)
        words += re.findall(r"\w+|[^\w\s]+", bare.lower())
    return list(dict.fromkeys(words))


def _build(special: tuple[str, ...], single: str) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate([*special, *_words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    used = [token for token in special if token in single]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, vocabulary[token]) for token in used]
    )
    return tokenizer


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Adds bos in front, as Llama 3's does."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_build(LLAMA_SPECIAL, "<|begin_of_text|> $A"),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=8192,
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Start and end of text around the caption, as CLIP's does."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_build(CLIP_SPECIAL, "<|startoftext|> $A <|endoftext|>"),
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=77,
    )


def save_tokenizers(folder: Path) -> None:
    """Write `tokenizer/` and `tokenizer_2/` under `folder`."""
    llama_tokenizer().save_pretrained(folder / "tokenizer")
    clip_tokenizer().save_pretrained(folder / "tokenizer_2")
