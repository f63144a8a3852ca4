"""Where the weights of a model directory lie: one safetensors file, or the shards that an index names."""

import re
from contextlib import suppress
from pathlib import Path, PurePosixPath

from qcompiler.errors import InputError, WeightError
from qcompiler.storage.reading import read_named
from qcompiler.storage.safetensors_io import SafetensorsFile, parse_json_object
from qcompiler.storage.stored_tensor import StoredTensor, tensors_of

__all__ = ["no_directory", "open_checkpoint", "weight_files"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def no_directory(path: Path) -> InputError:
    """The error for a model directory that is not there; for what may be a name on the Hugging Face Hub, how to get it.

    Nothing is downloaded here.
    """
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) is not None and not path.parent.exists()
    return InputError(
        "no such model directory",
        where=path,
        got="a file" if path.is_file() else "nothing of that name on this machine, and nothing is downloaded",
        expected="a directory with config.json and safetensors",
        remedy=f"if this is a name on the Hugging Face Hub: hf download {path} --local-dir {path.name}, and give "
        f"{path.name}"
        if is_name
        else "give the path of a Hugging Face directory",
    )


def weight_files(stem: str) -> tuple[str, str]:
    """The name of the one file of weights, and of the index to several."""
    return f"{stem}.safetensors", f"{stem}.safetensors.index.json"


def open_checkpoint(root: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """The tensors of a directory; only headers are read. See `WeightStore.from_directory`."""
    single, index = weight_files(stem)
    if not root.is_dir():
        raise InputError("not a model directory", where=root, expected="a directory with safetensors weights")
    if (root / single).exists() or (root / single).is_symlink():
        return tensors_of(SafetensorsFile(_inside(root, single, root / single)))
    if (root / index).exists():
        return _tensors_of_index(root, root / index)
    raise _no_weights(root, f"{single} or {index}")


def _tensors_of_index(root: Path, index: Path) -> dict[str, StoredTensor]:
    """The tensors that an index names, each looked up in its shard, and whatever else these shards hold."""
    try:
        text = read_named(index)
    except OSError as error:
        raise WeightError("the index cannot be read", where=index, got=error.strerror) from error
    weight_map = parse_json_object(text, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise WeightError("damaged index", where=index, expected="weight_map: tensor name → file name")
    shards = {
        shard: tensors_of(SafetensorsFile(_inside(root, shard, index))) for shard in dict.fromkeys(weight_map.values())
    }
    tensors: dict[str, StoredTensor] = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise WeightError("the index names a tensor that is not in its shard", where=f"{root / shard}: {name}")
        tensors[name] = shards[shard][name]
    for members in shards.values():
        for name, entry in members.items():
            tensors.setdefault(name, entry)
    return tensors


def _inside(root: Path, name: str, where: Path) -> Path:
    """The path of a file of the directory.

    Raises:
        WeightError: if it would lie outside, by its name or by a symbolic link.
    """
    relative = PurePosixPath(name)
    path = root / relative
    allowed = [root.resolve()]
    if root.resolve().parent.name == "snapshots":  # a hub cache links its files to blobs/
        allowed.append(root.resolve().parent.parent / "blobs")
    target = path
    safe = bool(name) and not any(character in name for character in "\\\0")
    safe = safe and not relative.is_absolute() and ".." not in relative.parts
    if safe:
        with suppress(OSError, RuntimeError):  # a loop of links stays unresolved; opening it will fail
            target = path.resolve()
        safe = any(target.is_relative_to(directory) for directory in allowed)
    if not safe:
        raise WeightError(
            "a weight file outside the model directory",
            where=where,
            got=f"{name} -> {target}" if target != path else name,
            expected=f"a file inside {root}",
            remedy="put the file itself into the directory",
        )
    return path


def _no_weights(root: Path, expected: str) -> WeightError:
    pickles = sorted(path.name for pattern in _PICKLES for path in root.glob(pattern))
    shards = sorted(path.name for path in root.glob("*.safetensors"))
    if shards:
        return WeightError(
            "safetensors files, but no index to them",
            where=root,
            got=", ".join(shards[:4]),
            expected=expected,
            remedy="the copy is incomplete: add the index",
        )
    if pickles:
        return WeightError(
            "pickled weights are not read: loading them can run any code",
            where=root,
            got=", ".join(pickles[:4]),
            expected=expected,
            remedy="convert them where you trust them: AutoModelForCausalLM.from_pretrained(path)"
            ".save_pretrained(path, safe_serialization=True)",
        )
    return WeightError("no weights in the directory", where=root, expected=expected)
