"""Which TensorRT is installed, and which GPUs its builder makes engines for."""

import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

from qcompiler.errors import MissingDependencyError, TargetError
from qcompiler.lowering.tensorrt.legality import CAPABILITIES

__all__ = ["PACKAGES", "Api", "check_capability", "find_api", "how_to_build"]

PACKAGES = ("tensorrt", "tensorrt_rtx")
"""Modules with the Python interface of TensorRT 10 and 11, the first that can be imported being taken."""


@dataclass(frozen=True)
class Api:
    """A TensorRT that can be imported.

    Attributes:
        package: the module, one of `PACKAGES`.
        version: of it.
        capabilities: compute capabilities that its builder makes engines for wherever it runs, such as 89; None where
            it builds for the GPU at hand alone.
    """

    package: str
    version: str
    capabilities: tuple[int, ...] | None


def find_api(package: str | None = None, *, capability: int | None = None) -> Api:
    """The TensorRT that is installed: `tensorrt`, which needs a GPU to build, or else `tensorrt_rtx`, which does not.

    Args:
        package: the only module to take; by default the first of `PACKAGES`.
        capability: of the GPU that it must build for, as `check_capability`; by default any.

    Raises:
        MissingDependencyError: where none can be imported.
        TargetError: for another module, or where none that can be imported builds for this GPU.
    """
    if package is not None and package not in PACKAGES:
        raise TargetError("this is no TensorRT", got=package, expected=" or ".join(PACKAGES))
    reasons: list[str] = []
    refusals: list[TargetError] = []
    for name in (package,) if package else PACKAGES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
            found = Api(name, str(module.__version__), _capabilities(module))
            if capability is not None:
                check_capability(found, capability)
        except (ImportError, OSError, AttributeError) as error:  # the bindings without their libraries, too
            reasons.append(f"{name}: {str(error) or type(error).__name__}")
        except TargetError as refusal:
            refusals.append(refusal)
        else:
            return found
    if refusals:
        raise refusals[-1]
    raise MissingDependencyError(
        "engines are built by TensorRT, which is not installed",
        got="; ".join(reasons),
        remedy="pip install tensorrt-rtx (builds without a GPU), or, on a machine with an NVIDIA GPU, pip install "
        "tensorrt",
    )


def check_capability(api: Api, capability: int) -> None:
    """Refuses a GPU that no engine can be built for.

    Args:
        api: the TensorRT that is to build.
        capability: compute capability, ten times the major number and the minor, such as 89.

    Raises:
        TargetError: for one that the builder does not know, or that is not at hand where it builds for that alone.
    """
    if api.capabilities is not None:
        if capability not in api.capabilities:
            raise TargetError(
                "the builder does not know this compute capability",
                where=f"{api.package} {api.version}",
                got=f"SM {capability}",
                expected=", ".join(f"SM {known}" for known in api.capabilities),
                remedy=None if api.package == "tensorrt" else how_to_build(capability),
            )
        return
    found = _capability_at_hand()
    if found != capability:
        raise TargetError(
            "this TensorRT builds for the GPU at hand alone, and that is another",
            where=f"{api.package} {api.version}",
            got="no GPU" if found is None else f"SM {found}",
            expected=f"SM {capability}",
            remedy=how_to_build(capability),
        )


def how_to_build(capability: int) -> str:
    """What to install where, to get an engine for a GPU."""
    if capability in CAPABILITIES:
        return "pip install tensorrt-rtx, which builds it without a GPU, and convert again"
    return f"plain TensorRT may build it, on a GPU of SM {capability} alone: pip install tensorrt, and convert there"


def _capabilities(module: ModuleType) -> tuple[int, ...] | None:
    known = getattr(module, "ComputeCapability", None)
    if known is None:
        return None
    names = (name.removeprefix("SM") for name in dir(known) if name.startswith("SM"))
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def _capability_at_hand() -> int | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
