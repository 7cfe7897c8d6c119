"""hvlite: HunyuanVideo in a memory budget that you name.

    from hvlite import Request, generate, load_profile, open_model

    with open_model("shapes", load_profile("cpu")) as model:
        for event in generate(Request("a red circle moving left on a black background"), model):
            print(event)

Everything is imported when it is first used, so that `import hvlite` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvlite.line import encode_prompts as encode_prompts
    from hvlite.line import generate as generate
    from hvlite.opened import open_model as open_model
    from hvlite.profile import Profile as Profile
    from hvlite.profile import load_profile as load_profile
    from hvlite.request import Request as Request
    from hvlite.run import Outputs as Outputs

_HOME = {
    "Outputs": "run",
    "Profile": "profile",
    "Request": "request",
    "encode_prompts": "line",
    "generate": "line",
    "load_profile": "profile",
    "open_model": "opened",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value
