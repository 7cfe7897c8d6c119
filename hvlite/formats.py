"""The names of weight formats that a user can ask for."""

from typing import Literal

Weights = Literal["bf16", "fp32", "int8", "int8-dynamic", "nf4", "nf4-double", "fp8"]
TextWeights = Literal["fp16", "bf16", "fp32", "int8", "nf4", "nf4-double", "fp8"]
