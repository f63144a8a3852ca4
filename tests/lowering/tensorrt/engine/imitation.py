"""An imitation of TensorRT's runtime: what `run.py` calls of it, on ONNX Runtime and the CPU.

A plan is a JSON object: the ONNX file in base64 and, for each profile, the least and the largest shape of every input.
It stands for ``tensorrt_rtx``, beside a torch that believes to have a GPU.
"""

import base64
import ctypes
import enum
import json

import numpy as np
import onnxruntime

__version__ = "1.0"


class DataType(enum.Enum):
    FLOAT, HALF, INT64 = 4, 2, 8

    @property
    def itemsize(self):
        return self.value


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = 1, 2


class Logger:
    ERROR = 1

    def __init__(self, level):
        pass


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        try:
            return Engine(json.loads(plan))
        except ValueError:
            return None


class Engine:
    def __init__(self, plan):
        self.profiles = plan["profiles"]
        self.num_optimization_profiles = len(self.profiles)
        self.session = onnxruntime.InferenceSession(base64.b64decode(plan["model"]))
        self.inputs = {port.name: port for port in self.session.get_inputs()}
        self.ports = {**self.inputs, **{port.name: port for port in self.session.get_outputs()}}
        self.num_io_tensors = len(self.ports)

    def get_tensor_name(self, index):
        return list(self.ports)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        kinds = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
        return DataType[kinds[self.ports[name].type]]

    def get_tensor_profile_shape(self, name, profile):
        least, most = self.profiles[profile][name]
        return [tuple(least), tuple(most), tuple(most)]

    def create_execution_context(self):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}

    def set_optimization_profile_async(self, profile, stream):
        assert stream == 7
        self.profile = profile
        return True

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def get_tensor_shape(self, name):
        tokens, past = self.shapes["input_ids"][1], self.shapes["past_key_values.0.key"][2]
        return (1, 1, past + tokens, 1) if name == "present.0.key" else (1, tokens, 32)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream):
        kinds = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64}
        feeds = {}
        for name in self.engine.inputs:
            kind, shape = kinds[self.engine.get_tensor_dtype(name)], self.shapes[name]
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            feeds[name] = np.frombuffer(ctypes.string_at(self.addresses[name], size), kind).reshape(shape)
        names = [name for name in self.engine.ports if name not in self.engine.inputs]
        for name, array in zip(names, self.engine.session.run(names, feeds), strict=True):
            assert array.shape == self.get_tensor_shape(name)
            ctypes.memmove(self.addresses[name], array.tobytes(), array.nbytes)
        return True
