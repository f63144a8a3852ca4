"""What the target says of schemes and caches before anything is compiled."""

import pytest

from qcompiler.errors import TargetError
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.lowering.kernels.target import KernelsTarget
from qcompiler.numerics.scheme import Scheme

SUPPORT = {
    # scheme: (cuda, cpu)
    "w8a16": ("fused", "fused"),
    "w4a16": ("fused", "fused"),
    "w4a16-g32-asym": ("fused", "fused"),
    "w4a16-g48": ("runs", "runs"),
    "w3a16-channel": ("fused", "fused"),
    "w2a16-g64": ("fused", "fused"),
    "w3a16-lut": ("fused", "runs"),
    "w8a8": ("fused", "fused"),
    "w8a8-dynamic": ("fused", "fused"),
    "w4a8-dynamic": ("fused", "runs"),
    "fp8": ("fused", "runs"),
    "fp8-dynamic": ("fused", "runs"),
    "fp8-block": ("fused", "runs"),
    "nvfp4": ("runs", "runs"),
    "mxfp4a16": ("runs", "runs"),
}


@pytest.mark.parametrize("scheme", SUPPORT)
def test_schemes(scheme):
    for device, status in zip(("cuda", "cpu"), SUPPORT[scheme], strict=True):
        support = KernelsTarget(device).supports(Scheme.parse(scheme), 4096)
        assert support.status == status, device
        assert support.status == "fused" or support.reason


def test_on_a_cpu_fused_promises_no_speed():
    scheme = Scheme.parse("w4a16")
    assert "faster as ONNX" in KernelsTarget("cpu").supports(scheme, 4096).reason
    assert KernelsTarget("cuda").supports(scheme, 4096).reason == ""
    assert "faster as ONNX" in KernelsTarget("cpu").supports_cache(CacheFormat("int8")).reason


def test_layers_in_float():
    activation = Scheme.parse("w8a8").activation
    for device in ("cuda", "cpu"):
        assert KernelsTarget(device).supports(Scheme(), 64).status == "fused"
        assert KernelsTarget(device).supports(Scheme(None, activation), 64).status == "runs"


@pytest.mark.parametrize(
    "spec",
    [
        CacheFormat("int8"),
        CacheFormat("int4", group_size=32, symmetric=False),
        CacheFormat("float8_e4m3fn"),
        CacheFormat("int8", "static", symmetric=False),
    ],
    ids=str,
)
def test_caches(spec):
    for device in ("cuda", "cpu"):
        assert KernelsTarget(device).supports_cache(spec).status == "fused"


def test_a_group_that_splits_a_byte_has_no_kernel():
    support = KernelsTarget().supports_cache(CacheFormat("int4", group_size=1))
    assert support.status == "runs"
    assert "byte" in support.reason


def test_devices():
    assert KernelsTarget("cpu").name == "kernels"
    with pytest.raises(TargetError, match="no kernels"):
        KernelsTarget("tpu")
