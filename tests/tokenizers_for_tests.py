"""Small tokenizers of the published kinds, written as folders: byte-level, so that any text can be encoded.

They are made by rule, not trained, and so are the same everywhere; `load_tokenizer` of hvlite loads them.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hvlite.model.text import TEMPLATES

LLAMA_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<pad>",
)
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
PROMPT = "a cat walks on the grass , realistic style . red circle moving left black background"

# Llama 3's: contractions, words, digits by threes, punctuation, line ends, spaces.
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_llama_tokenizer(folder: Path) -> int:
    """A `tokenizer.json` built like Llama 3's (bos in front, specials last); returns the vocabulary size."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = [template.prefix.replace("|>", " ") for template in TEMPLATES.values()]
    texts.append(PROMPT)
    words = [word for text in texts for word, _ in splitter.pre_tokenize_str(text)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = _fold([list(word) for word in words], alphabet)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in LLAMA_SPECIALS])
    bos = LLAMA_SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<|end_of_text|>", pad_token="<pad>"
    )
    wrapped.save_pretrained(str(folder))
    return int(tokenizer.get_vocab_size())


def write_clip_tokenizer(folder: Path) -> int:
    """CLIP's `vocab.json` and `merges.txt`; returns the vocabulary's size, its last id is the end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [[*word[:-1], word[-1] + "</w>"] for word in PROMPT.split()]
    vocabulary, merges = _fold(words, [*letters, *(letter + "</w>" for letter in letters)])
    vocabulary |= {name: len(vocabulary) + i for i, name in enumerate(CLIP_SPECIALS)}
    start, end = CLIP_SPECIALS
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(vocabulary)


def _fold(words: list[list[str]], alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that join each word's letters from left to right."""
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    merges = []
    for word in words:
        joined = word[0]
        for letter in word[1:]:
            if joined + letter not in vocabulary:
                vocabulary[joined + letter] = len(vocabulary)
                merges.append((joined, letter))
            joined += letter
    return vocabulary, merges
