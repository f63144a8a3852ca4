"""An imitation of the builder of TensorRT 10: what the child calls of it, and what it refuses, as NVIDIA documents it.

Imported as ``tensorrt``. The plan it builds says what it was asked for.
"""

import json
import os

__version__ = "10.16"

ONELINE = (
    "Layers:\nName: fc, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,8], Format/Datatype: Half }], "
    "Outputs: [ { Name: y, Dimensions: [1,8], Format/Datatype: Half }], TacticName: t\n"
)


class Names:
    """An enum of numbers."""

    def __init__(self, *names):
        for number, name in enumerate(names):
            setattr(self, name, number)


class Severity:
    def __init__(self, name):
        self.name = name


class ILogger:
    class Severity:
        INTERNAL_ERROR, ERROR, WARNING, VERBOSE = map(Severity, ("INTERNAL_ERROR", "ERROR", "WARNING", "VERBOSE"))


class IProgressMonitor:
    pass


NetworkDefinitionCreationFlag = Names("EXPLICIT_BATCH", "STRONGLY_TYPED")
ProfilingVerbosity = Names("NONE", "DETAILED")
MemoryPoolType = Names("WORKSPACE")
BuilderFlag = Names("FP16")  # an old one, that streams nothing
LayerInformationFormat = Names("ONELINE", "JSON")


class Builder:
    def __init__(self, logger):
        if os.environ.get("NO_DRIVER"):
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        raise AssertionError("no input varies")

    def build_serialized_network(self, network, config):
        assert config.profiling_verbosity == ProfilingVerbosity.DETAILED
        config.progress_monitor.phase_start("Timing", None, 3)
        assert config.progress_monitor.step_complete("Timing", 0)
        config.progress_monitor.phase_finish("Timing")
        return memoryview(json.dumps({"workspace": config.workspace, "cached": config.known.decode()}).encode())


class Network:
    num_inputs = 0

    def get_input(self, index):
        raise IndexError


class OnnxParser:
    def __init__(self, network, logger):
        pass

    def parse_from_file(self, path):
        return True


class Cache:
    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data + b"+timed"


class Config:
    workspace, known = None, b""

    def set_memory_pool_limit(self, pool, size):
        assert pool == MemoryPoolType.WORKSPACE
        self.workspace = size

    def create_timing_cache(self, data):
        return Cache(data)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache.data == b"of another GPU":
            return False
        self.cache, self.known = cache, cache.data
        return True

    def get_timing_cache(self):
        return self.cache


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        return self

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, kind):
        assert kind == LayerInformationFormat.ONELINE
        return ONELINE
