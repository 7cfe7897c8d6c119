"""Text conditioning against transformers' full models and diffusers' pipeline, with tiny random weights."""

import hashlib
import json
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from hvlite.dims import HUNYUANVIDEO, ClipDims, LlamaDims
from hvlite.errors import RequestError, WeightsError
from hvlite.model.text import (
    TEMPLATES,
    Encoders,
    PromptTokens,
    TextEncoders,
    TextTemplate,
    build_clip,
    build_llama,
    encode_pooled,
    encode_prompts,
    encode_texts,
    encode_tokens,
    load_tokenizer,
    longest_prompt,
    pooled_tokens,
    text_template,
    text_tokens,
)
from tests.tokenizers_for_tests import write_clip_tokenizer, write_llama_tokenizer

PROMPT = "A cat walks on the grass, realistic style."
PROMPTS = (PROMPT, "", "  a red circle \n", "un chat \u00e9l\u00e9gant \U0001f408 \u732b", "grass, " * 200)
VIDEO, IMAGE = TEMPLATES["video"], TEMPLATES["image"]


@dataclass(frozen=True)
class Pair:
    """Our encoders, and transformers' whole ones with the same weights."""

    ours: TextEncoders
    llama: LlamaModel
    clip: CLIPTextModel
    llama_dims: LlamaDims
    clip_dims: ClipDims


def fill(module: nn.Module, source: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    weights = source.state_dict()
    module.load_state_dict({name: weights[name].to(dtype) for name in module.state_dict()}, strict=True, assign=True)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for rounding: masks and padding make attention and matrix products take other kernels."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


def random_llama(dims: LlamaDims) -> LlamaModel:
    """transformers' model with all layers and its final norm."""
    config = LlamaConfig(
        vocab_size=dims.vocabulary,
        hidden_size=dims.hidden,
        intermediate_size=dims.mlp_hidden,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads,
        rms_norm_eps=dims.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": dims.rope_theta},
        max_position_embeddings=dims.max_positions,
        initializer_range=0.2,
    )
    return LlamaModel(config)


def random_clip(dims: ClipDims) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=dims.vocabulary,
        hidden_size=dims.hidden,
        intermediate_size=dims.mlp_hidden,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        max_position_embeddings=dims.positions,
        eos_token_id=dims.eos_token,
        initializer_factor=5.0,
    )
    return CLIPTextModel(config)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("tokenizers")
    llama_dims = LlamaDims(
        vocabulary=write_llama_tokenizer(folder / "llama"),
        hidden=32,
        mlp_hidden=48,
        layers=4,
        heads=4,
        kv_heads=2,
        rms_eps=1e-5,
        rope_theta=500000.0,
        max_positions=8192,
    )
    vocabulary = write_clip_tokenizer(folder / "clip")
    clip_dims = ClipDims(
        vocabulary=vocabulary,
        hidden=32,
        mlp_hidden=48,
        layers=2,
        heads=4,
        positions=77,
        eos_token=vocabulary - 1,
    )
    torch.manual_seed(0)
    llama, clip = random_llama(llama_dims), random_clip(clip_dims)
    ours = TextEncoders(
        llama=build_llama(llama_dims),
        llama_tokenizer=load_tokenizer(folder / "llama"),
        clip=build_clip(clip_dims),
        clip_tokenizer=load_tokenizer(folder / "clip"),
    )
    fill(ours.llama, llama)
    fill(ours.clip, clip)
    return Pair(ours, llama, clip, llama_dims, clip_dims)


def padded_llama(pair: Pair, prompt: str, template: TextTemplate, crop: int) -> tuple[Tensor, Tensor]:
    """The published way: pad to 256 + crop, mask, all layers, `hidden_states[-3]`, crop. States and mask."""
    tokenizer = pair.ours.llama_tokenizer
    batch = tokenizer(
        template.prefix + prompt.strip() + template.suffix,
        max_length=256 + crop,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        states = pair.llama(**batch, output_hidden_states=True).hidden_states[-3]
    return states[0, crop:], batch["attention_mask"][0, crop:]


class TestTemplates:
    def test_video_is_the_published_text(self) -> None:
        assert VIDEO.prefix + "{}" + VIDEO.suffix == DEFAULT_PROMPT_TEMPLATE["template"]
        assert VIDEO.published_crop == DEFAULT_PROMPT_TEMPLATE["crop_start"]

    def test_image_is_the_published_text(self) -> None:
        digest = hashlib.sha256((IMAGE.prefix + "{}" + IMAGE.suffix).encode()).hexdigest()
        assert digest == "e6794c248e31c8efee73f33028bbb095324ec79e0b05dfae78b373b0abd4fb98"

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        assert text_template("image") is IMAGE
        with pytest.raises(RequestError, match='must be video or image; got "clip"'):
            text_template("clip")


class TestBuild:
    def test_names_are_ours(self, pair: Pair) -> None:
        llama = dict(pair.ours.llama.named_parameters())
        layer = {name.removeprefix("layers.1.") for name in llama if name.startswith("layers.1.")}
        assert layer == {
            *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
            *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        }
        assert {name for name in llama if not name.startswith("layers.")} == {"embed_tokens.weight"}
        assert {name.split(".")[1] for name in llama if name.startswith("layers.")} == {"0", "1"}
        assert {name for name, _ in pair.ours.clip.named_parameters() if "encoder.layers." not in name} == {
            "embeddings.token_embedding.weight",
            "embeddings.position_embedding.weight",
            "final_layer_norm.weight",
            "final_layer_norm.bias",
        }

    def test_the_published_sizes_cost_no_memory(self) -> None:
        llama, clip = build_llama(HUNYUANVIDEO.llama, torch.bfloat16), build_clip(HUNYUANVIDEO.clip)
        assert sum(p.numel() for p in llama.parameters()) == 7_068_958_720
        assert sum(p.numel() for p in clip.parameters()) == 123_060_480
        assert {p.device.type for m in (llama, clip) for p in m.parameters()} == {"meta"}
        assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in llama.parameters())

    def test_buffers_are_real_whatever_the_dtype(self, pair: Pair) -> None:
        llama = build_llama(pair.llama_dims, torch.float16)
        clip = build_clip(pair.clip_dims, torch.float16)
        assert torch.equal(llama.rotary_emb.inv_freq, pair.llama.rotary_emb.inv_freq)
        assert torch.equal(clip.embeddings.position_ids, pair.clip.embeddings.position_ids)


class TestText:
    @pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
    @pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
    def test_equals_the_padded_masked_full_model(self, pair: Pair, prompt: str, template: TextTemplate) -> None:
        tokens = text_tokens(pair.ours.llama_tokenizer, prompt, template)
        states = encode_texts(pair.ours.llama, [tokens])[0]
        expected, mask = padded_llama(pair, prompt, template, tokens.crop)
        assert states.shape == (int(mask.sum()), 32)
        assert_same(states, expected[: len(states)])

    def test_bit_equal_without_padding(self, pair: Pair) -> None:
        tokens = text_tokens(pair.ours.llama_tokenizer, PROMPT, VIDEO)
        with torch.no_grad():
            hidden = pair.llama(torch.tensor([tokens.ids]), output_hidden_states=True).hidden_states
            ours = pair.ours.llama(torch.tensor([tokens.ids])).last_hidden_state
        assert len(hidden) == pair.llama_dims.layers + 1
        assert torch.equal(encode_texts(pair.ours.llama, [tokens])[0], hidden[-3][0, tokens.crop :])
        assert torch.equal(ours, hidden[-3])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, pair: Pair, dtype: torch.dtype) -> None:
        llama, clip = build_llama(pair.llama_dims, dtype), build_clip(pair.clip_dims, dtype)
        fill(llama, pair.llama, dtype)
        fill(clip, pair.clip, dtype)
        half = encode_prompts([PROMPT], replace(pair.ours, llama=llama, clip=clip), VIDEO)[0]
        whole = encode_prompts([PROMPT], pair.ours, VIDEO)[0]
        for ours, exact in ((half.text, whole.text), (half.pooled, whole.pooled)):
            assert ours.dtype == dtype
            error = (ours.float() - exact).norm() / exact.norm()
            assert 0 < error < 8 * torch.finfo(dtype).eps

    def test_the_crop_is_the_tokenizers_own(self, pair: Pair) -> None:
        tokenizer = pair.ours.llama_tokenizer
        for template in TEMPLATES.values():
            tokens = text_tokens(tokenizer, PROMPT, template)
            assert tokens.ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(list(tokens.ids[1 : tokens.crop])) == template.prefix
            assert tokenizer.decode(list(tokens.ids[tokens.crop :])) == PROMPT + template.suffix

    def test_the_empty_prompt_keeps_its_end_mark(self, pair: Pair) -> None:
        tokenizer = pair.ours.llama_tokenizer
        tokens = text_tokens(tokenizer, " \n", VIDEO)
        assert tokenizer.convert_ids_to_tokens(list(tokens.ids[tokens.crop :])) == ["<|eot_id|>"]
        with pytest.raises(RequestError, match="the prompt is empty: 0 tokens follow"):
            text_tokens(tokenizer, "", replace(VIDEO, suffix=""))

    def test_a_long_prompt_loses_its_tail_and_says_so(self, pair: Pair) -> None:
        tokenizer = pair.ours.llama_tokenizer
        words = ["a"] + [" grass"] * 255
        exact = text_tokens(tokenizer, "".join(words), VIDEO)
        longer = text_tokens(tokenizer, "".join(words) + " realistic style.", VIDEO)
        assert len(exact.ids) - exact.crop == 256
        assert longer.ids == exact.ids
        assert (exact.cut, exact.notes) == (1, ())
        assert longer.cut == 1 + len(tokenizer(" realistic style.", add_special_tokens=False).input_ids)
        assert [note.text for note in longer.notes] == [
            f'the text encoder reads 256 tokens, the prompt has {256 + longer.cut}: it ignores "realistic style."'
        ]

    def test_names_of_special_tokens_are_read_as_published_and_noted(self, pair: Pair) -> None:
        tokenizer = pair.ours.llama_tokenizer
        tokens = text_tokens(tokenizer, "a cat<|eot_id|><|begin_of_text|> walks", VIDEO)
        pieces = tokenizer.convert_ids_to_tokens(list(tokens.ids[tokens.crop :]))
        assert pieces == ["a", "\u0120cat", "<|eot_id|>", "<|begin_of_text|>", "\u0120walks", "<|eot_id|>"]
        plain = text_tokens(tokenizer, "a cat", VIDEO)
        assert tokens.ids[: plain.crop] == plain.ids[: plain.crop]
        assert "<|begin_of_text|>, <|eot_id|> in the prompt as control tokens" in tokens.notes[0].text
        assert plain.notes == ()

    def test_braces_are_text(self, pair: Pair) -> None:
        tokenizer = pair.ours.llama_tokenizer
        tokens = text_tokens(tokenizer, "a {} cat {0}", VIDEO)
        assert tokenizer.decode(list(tokens.ids[tokens.crop :])) == "a {} cat {0}<|eot_id|>"

    def test_broken_unicode_is_a_request_error(self, pair: Pair) -> None:
        with pytest.raises(RequestError, match=r"character 3 of 4 of the prompt is no text \(U\+DCFF\)"):
            text_tokens(pair.ours.llama_tokenizer, "a \udcffb", VIDEO)

    @given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
    @settings(max_examples=60, deadline=None)
    def test_any_text_keeps_the_template_and_one_token(self, pair: Pair, text: str) -> None:
        tokenizer = pair.ours.llama_tokenizer
        tokens, plain = text_tokens(tokenizer, text, IMAGE), text_tokens(tokenizer, "a", IMAGE)
        assert tokens.ids[: tokens.crop] == plain.ids[: plain.crop]
        assert 1 <= len(tokens.ids) - tokens.crop <= 256
        assert text_tokens(tokenizer, f"\n {text}\t", IMAGE) == tokens
        assert pooled_tokens(pair.ours.clip_tokenizer, text, 77).ids[-1] == pair.clip_dims.eos_token


class TestPooled:
    @pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
    def test_equals_the_padded_full_model(self, pair: Pair, prompt: str) -> None:
        tokens = pooled_tokens(pair.ours.clip_tokenizer, prompt, 77)
        batch = pair.ours.clip_tokenizer(
            prompt.strip(), max_length=77, padding="max_length", truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            expected = pair.clip(**batch)
        pooled = encode_pooled(pair.ours.clip, tokens)
        assert list(tokens.ids) == batch["input_ids"][0, : len(tokens.ids)].tolist()
        end = tokens.ids.index(pair.clip_dims.eos_token)
        assert_same(pooled, expected.pooler_output[0])
        assert_same(pooled, expected.last_hidden_state[0, end])

    def test_a_long_prompt_keeps_the_end_token(self, pair: Pair) -> None:
        tokens = pooled_tokens(pair.ours.clip_tokenizer, "cat " * 75 + "walks", 77)
        assert len(tokens.ids) == 77
        assert tokens.ids[-1] == pair.clip_dims.eos_token
        assert tokens.cut == 1
        assert tokens.notes[0].text.endswith('reads 77 tokens, the prompt has 78: it ignores "walks"')
        assert pooled_tokens(pair.ours.clip_tokenizer, "cat " * 75, 77).cut == 0

    def test_the_first_end_token_counts(self, pair: Pair) -> None:
        tokenizer = pair.ours.clip_tokenizer
        ended = pooled_tokens(tokenizer, "a cat<|endoftext|> walks", 77)
        plain = pooled_tokens(tokenizer, "a cat", 77)
        assert_same(encode_pooled(pair.ours.clip, ended), encode_pooled(pair.ours.clip, plain))
        assert "<|endoftext|> in the prompt as control tokens" in ended.notes[0].text

    def test_a_config_from_before_2023(self, pair: Pair) -> None:
        clip = build_clip(replace(pair.clip_dims, eos_token=2))
        fill(clip, pair.clip)
        tokens = pooled_tokens(pair.ours.clip_tokenizer, PROMPT, 77)
        assert torch.equal(encode_pooled(clip, tokens), encode_pooled(pair.ours.clip, tokens))


class TestPrompts:
    def test_each_prompt_is_encoded_alone(self, pair: Pair) -> None:
        many = encode_prompts([PROMPT, "a red circle", PROMPT], pair.ours, VIDEO)
        alone = encode_prompts(["a red circle"], pair.ours, VIDEO)[0]
        assert torch.equal(many[1].text, alone.text)
        assert torch.equal(many[1].pooled, alone.pooled)
        assert torch.equal(many[0].text, many[2].text)
        assert many[0].text.shape != many[1].text.shape
        assert encode_prompts([], pair.ours, VIDEO) == []

    def test_notes_of_both_encoders_and_no_gradient(self, pair: Pair) -> None:
        fresh = replace(pair.ours, llama=pair.ours.llama.requires_grad_(True))
        states = encode_prompts(["cat " * 300], fresh, VIDEO)[0]
        pair.ours.llama.requires_grad_(False)
        assert [note.text.split(" reads")[0] for note in states.notes] == [
            "the text encoder",
            "the pooled text encoder",
        ]
        assert not states.text.requires_grad
        assert torch.is_grad_enabled()
        assert not states.text.is_inference()

    @pytest.mark.parametrize("prompt", [PROMPT, "a red circle", "grass, " * 200, "a<|eot_id|>b<|endoftext|>c"])
    def test_equals_diffusers(self, pair: Pair, prompt: str) -> None:
        parts: dict[str, Any] = dict.fromkeys(("transformer", "vae", "scheduler"))
        pipe: Any = HunyuanVideoPipeline(
            text_encoder=pair.llama,
            tokenizer=pair.ours.llama_tokenizer,
            text_encoder_2=pair.clip,
            tokenizer_2=pair.ours.clip_tokenizer,
            **parts,
        )
        ours = encode_prompts([prompt], pair.ours, VIDEO)[0]
        crop = text_tokens(pair.ours.llama_tokenizer, prompt, VIDEO).crop
        # diffusers does not strip, so the prompt is given stripped.
        with torch.no_grad():
            text, pooled, mask = pipe.encode_prompt(
                prompt.strip(),
                prompt_template={**DEFAULT_PROMPT_TEMPLATE, "crop_start": crop},
                device=torch.device("cpu"),
            )
        assert_same(ours.text, text[mask.bool()])
        assert_same(ours.pooled, pooled[0])

    def test_meta_takes_the_longest_text_and_no_tokenizer(self) -> None:
        llama = build_llama(HUNYUANVIDEO.llama, torch.bfloat16)
        clip = build_clip(HUNYUANVIDEO.clip, torch.bfloat16)
        for template in TEMPLATES.values():
            text, pooled = longest_prompt(clip, template)
            encoders = Encoders(llama=llama, clip=clip, device=torch.device("meta"))
            (states,) = encode_tokens([text], [pooled], encoders)
            assert (states.text.shape, states.pooled.shape) == ((256, 4096), (768,))
            assert {states.text.device.type, states.pooled.device.type} == {"meta"}
            assert {states.text.dtype, states.pooled.dtype} == {torch.bfloat16}


class TestTokenizerFiles:
    def test_a_folder_without_tokenizer(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "absent"):
            with pytest.raises(WeightsError, match=r"holds no tokenizer: found neither tokenizer\.json"):
                load_tokenizer(folder)

    @pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}'])
    def test_a_broken_file_is_one_line(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(WeightsError, match=r"cannot be read: ") as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)

    def test_settings_left_in_the_files_change_nothing(self, pair: Pair, tmp_path: Path) -> None:
        write_llama_tokenizer(tmp_path)
        clean = text_tokens(pair.ours.llama_tokenizer, PROMPT, VIDEO)
        file = tmp_path / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["truncation"] = {
            "direction": "Left",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        content["padding"] = {
            "strategy": {"Fixed": 512},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": clean.ids[0],
            "pad_type_id": 0,
            "pad_token": "<|begin_of_text|>",
        }
        file.write_text(json.dumps(content), encoding="utf-8")
        assert text_tokens(load_tokenizer(tmp_path), PROMPT, VIDEO) == clean

    def test_a_bos_only_the_config_asks_for_is_added(self, pair: Pair, tmp_path: Path) -> None:
        write_llama_tokenizer(tmp_path)
        file = tmp_path / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8")) | {"post_processor": None}
        file.write_text(json.dumps(content), encoding="utf-8")
        clean = text_tokens(pair.ours.llama_tokenizer, PROMPT, VIDEO)
        assert text_tokens(load_tokenizer(tmp_path), PROMPT, VIDEO) == clean

    def test_code_named_by_a_folder_is_not_run(self, tmp_path: Path) -> None:
        write_clip_tokenizer(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "evil.py").write_text("raise SystemExit('run')")
        assert type(load_tokenizer(tmp_path)).__name__ == "CLIPTokenizer"

    def test_a_large_vocabulary_asks_nobody(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Above 100,000 tokens transformers asks the Hub who made a tokenizer, unless told not to."""
        asked = []
        monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **_: asked.append(names))
        monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
        vocabulary = {str(i): i for i in range(100_001)}
        Tokenizer(models.WordLevel(vocabulary, unk_token="0")).save(str(tmp_path / "tokenizer.json"))
        assert len(load_tokenizer(tmp_path)) == 100_001
        assert asked == []

    def test_a_tokenizer_that_merges_template_and_prompt(self, tmp_path: Path) -> None:
        vocabulary = {"?": 0, "a": 1, "b": 2, "ab": 3}
        bpe = models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="?")
        Tokenizer(bpe).save(str(tmp_path / "tokenizer.json"))
        template = TextTemplate(name="video", prefix="aa", suffix="", published_crop=2)
        with pytest.raises(WeightsError, match="template alone is 2 tokens, only 1 of them open the whole"):
            text_tokens(load_tokenizer(tmp_path), "b", template)

    def test_encoder_and_tokenizer_that_do_not_belong_together(self, pair: Pair) -> None:
        llama = build_llama(replace(pair.llama_dims, vocabulary=8))
        with pytest.raises(WeightsError, match=r"gives token 8, the encoder has 8 tokens"):
            encode_texts(llama, [PromptTokens(ids=(1, 8), crop=1)])
        with pytest.raises(WeightsError, match=r"needs end token \d+, its tokenizer ends with \(2,\)"):
            encode_pooled(pair.ours.clip, PromptTokens(ids=(1, 2)))
