"""Write the trained parts as an ordinary HunyuanVideo model folder, fp16: what `--model shapes` loads.

    python tools/shapes/export.py [--work tools/shapes/work] [--to hvlite/assets/shapes]

The latents' statistics are folded exactly into quant_conv, post_quant_conv and the scaling factor.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import save_file
from tokenizers_of_shapes import save_tokenizers
from torch import Tensor
from train_dit import ShapesModel
from train_vae import build_vae

DEFAULTS = {"size": [64, 64], "frames": 17, "steps": 16, "guidance": 6.0, "flow_shift": 7.0}


@torch.no_grad()
def fold_statistics(vae: AutoencoderKLHunyuanVideo, mean: Tensor, deviation: Tensor) -> None:
    """Make the encoder emit, and the decoder take, (z - mean) / deviation; both moments follow."""
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= deviation.view(-1, 1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2 * deviation.log()
    post.bias += post.weight[:, :, 0, 0, 0] @ mean
    post.weight *= deviation.view(1, -1, 1, 1, 1)


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp16, each tensor in memory of its own."""
    return {name: value.detach().half().contiguous().clone() for name, value in state.items()}


def export_vae(work: Path, folder: Path, numbers: dict[str, Tensor]) -> None:
    """The VAE after phase 2, with the statistics inside."""
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae_phase2.pt", weights_only=True))
    fold_statistics(vae, numbers["mean"], numbers["deviation"])
    vae.register_to_config(scaling_factor=float(numbers["scaling_factor"]))
    vae.half().to(memory_format=torch.contiguous_format).save_pretrained(folder)


def export_text(model: ShapesModel, folder: Path) -> None:
    """Both text encoders under the published keys, whatever transformers calls its modules."""
    for name, module, prefix in (("text_encoder", model.llama, ""), ("text_encoder_2", model.clip, "text_model.")):
        target = folder / name
        target.mkdir(parents=True)
        module.config.save_pretrained(target)
        state = {prefix + key.removeprefix("text_model."): value for key, value in module.state_dict().items()}
        state = {key: value for key, value in state.items() if value.is_floating_point()}
        save_file(half(state), target / "model.safetensors", metadata={"format": "pt"})


def export(work: Path, folder: Path) -> None:
    """All five parts."""
    trained = torch.load(work / "dit.pt", weights_only=True)
    model = ShapesModel()
    model.load_state_dict(trained["model"])
    shutil.rmtree(folder, ignore_errors=True)
    export_text(model, folder)
    model.dit.half().save_pretrained(folder / "transformer")
    export_vae(work, folder / "vae", trained)
    save_tokenizers(folder)
    settings = {"name": "shapes", "defaults": DEFAULTS}
    (folder / "hvlite.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("tools/shapes/work"))
    parser.add_argument("--to", type=Path, default=Path("hvlite/assets/shapes"))
    arguments = parser.parse_args()
    export(arguments.work, arguments.to)


if __name__ == "__main__":
    main()
