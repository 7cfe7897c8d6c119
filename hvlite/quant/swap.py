"""Which Linears are quantised, and the exchange itself, on a module built on the meta device.

A Linear is whatever has a 2-D `weight` and a `bias` (or None): ours and torch's alike. The table below says which are
left alone; modulation is not among them, as in the published fp8 and GGUF sets.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hvlite.quant.fp8 import E4M3, Fp8Linear, adopt_fp8, quantise_fp8
from hvlite.quant.int8 import DynamicInt8Linear, Int8Linear, quantise_int8
from hvlite.quant.linear import QuantisedLinear, Scratch
from hvlite.quant.nf4 import GROUP, DoubleNf4Linear, Nf4Linear, quantise_nf4, quantise_nf4_double
from hvlite.quant.plain import Bf16Linear, Fp16Linear, Fp32Linear

# Module name, with all that is below it, and why. The published fp8 set leaves the same ones in bf16 (spec 2.4).
LEFT_ALONE = {
    "img_in": "every video token comes in through it, and it is small",
    "time_in": "it conditions every block, and runs before the first one only",
    "vector_in": "it conditions every block, and runs before the first one only",
    "guidance_in": "it conditions every block, and runs before the first one only",
    "txt_in": "all text comes in through it, and it runs before the first block only",
    "final_mod": "nothing behind it evens out its error",
    "final_linear": "nothing behind it evens out its error",
    "embed_tokens": "it is looked up, not multiplied: only the prompt's rows travel",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A way to hold weights; `group` divides the input features of every weight that it can hold."""

    linear: type[QuantisedLinear]
    quantise: Callable[[Tensor], dict[str, Tensor]]
    group: int = 1


# int8-dynamic is int8 with another product: a store of the one serves the other.
FORMATS = {
    "int8": Format(linear=Int8Linear, quantise=quantise_int8),
    "int8-dynamic": Format(linear=DynamicInt8Linear, quantise=quantise_int8),
    "nf4": Format(linear=Nf4Linear, quantise=quantise_nf4, group=GROUP),
    "nf4-double": Format(linear=DoubleNf4Linear, quantise=quantise_nf4_double, group=GROUP),
    "fp8": Format(linear=Fp8Linear, quantise=quantise_fp8),
}


# Plain weights whose dtype is not the product's.
PLAIN: Mapping[str, type[QuantisedLinear]] = {"bf16": Bf16Linear, "fp16": Fp16Linear, "fp32": Fp32Linear}


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapPlan:
    """The modules that become Linears of `weights` (of FORMATS or PLAIN), and those that do not, with the reasons."""

    weights: str
    replaced: tuple[str, ...]
    left: Mapping[str, str]

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A full-precision tensor -> the tensors, by name, that the swapped module holds in its place."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self.replaced:
            yield name, tensor
            return
        for part, value in FORMATS[self.weights].quantise(tensor).items():
            yield f"{module}.{part}", value

    def adopts(self, name: str, weight: Tensor) -> bool:
        """Whether the swapped module holds this published fp8 tensor as it is; e5m2 it cannot."""
        module, _, leaf = name.rpartition(".")
        return self.weights == "fp8" and leaf == "weight" and module in self.replaced and weight.dtype == E4M3

    def adopted(self, name: str, weight: Tensor, scale: Tensor) -> Iterator[tuple[str, Tensor]]:
        """As `tensors`, for a weight that `adopts` is true of, and its scale [1]."""
        module = name.rpartition(".")[0]
        for part, value in adopt_fp8(weight, scale).items():
            yield f"{module}.{part}", value


def plan_swap(module: nn.Module, weights: str) -> SwapPlan:
    """Every module with a matrix of its own below `module`, sorted into replaced and left."""
    replaced: list[str] = []
    left: dict[str, str] = {}
    for name, child in module.named_modules():
        weight = child._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            continue
        reason = _reason_to_leave(name, child, weight, FORMATS[weights].group if weights in FORMATS else 1)
        if reason is None:
            replaced.append(name)
        else:
            left[name] = reason
    return SwapPlan(weights=weights, replaced=tuple(replaced), left=left)


def swap(module: nn.Module, weights: str, scratch: Scratch | None = None) -> SwapPlan:
    """Put empty quantised Linears in place, of the same device and dtype; they share `scratch` (None: a new one)."""
    plan = plan_swap(module, weights)
    assert "" not in plan.replaced, "a Linear cannot replace itself; give the module that holds it"
    scratch = Scratch() if scratch is None else scratch
    linear = FORMATS[weights].linear if weights in FORMATS else PLAIN[weights]
    for name in plan.replaced:
        parent, _, leaf = name.rpartition(".")
        old = module.get_submodule(name)
        weight = old.get_parameter("weight")
        out_features, in_features = weight.shape
        with weight.device:
            new = linear(in_features, out_features, bias=old.bias is not None, dtype=weight.dtype, scratch=scratch)
        setattr(module.get_submodule(parent), leaf, new.train(old.training))
    return plan


def _reason_to_leave(name: str, child: nn.Module, weight: nn.Parameter, group: int) -> str | None:
    for part, reason in LEFT_ALONE.items():
        if name == part or name.startswith(f"{part}."):
            return reason
    if not hasattr(child, "bias"):
        return f"{type(child).__name__} does not multiply by its weight"
    if weight.shape[1] % group:
        return f"its {weight.shape[1]} input features are no multiple of the group of {group}"
    return None
