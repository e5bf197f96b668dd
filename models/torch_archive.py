"""Read what torch.save or torch.jit.save wrote, without running anything of it.

Such a file is a zip with a pickle and the bytes of every storage; before torch 1.6 it was a row of pickles, and then the bytes. A
pickle may name any function of any module; here only the ones that rebuild tensors and plain containers are known. Everything else
becomes a `Foreign`, which does nothing: training arguments and metrics beside the weights are no obstacle, and a TorchScript module
is the tensors in its attributes.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

STORAGES = {
    **{"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16},
    **{"DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
    "UntypedStorage": torch.uint8,
}
PART = 1 << 20  # bytes read at once
HEADER = 30  # bytes of a zip's local header before the file's name
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what a file from before torch 1.6 begins with


class Foreign:
    """An object of a class that is not known, or the result of a function that was not called."""

    name = ""
    """Its class or function, with the module."""
    state: Any = None
    """Its attributes, where the pickle has any."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __new__(cls, *_: Any, **__: Any) -> Foreign:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Ignore an item of a list that is not known."""

    add = extend = append


class _Storage(NamedTuple):
    """The bytes of one storage, and the type of its numbers."""

    data: Tensor
    dtype: torch.dtype


def read_archive(path: Path) -> Any:
    """Return a torch archive's content: tensors, numbers, texts, containers, and a `Foreign` for everything else.

    Tensors are mapped into memory copy on write, not read. Raises ValueError, or what a reader raises for damaged bytes.
    """
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        place = next((name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        if place is None:
            raise ValueError("it has no data.pkl")
        home = place.removesuffix("data.pkl")
        inside = sum(one.file_size for name, one in records.items() if name.startswith(f"{home}data"))
        if inside > path.stat().st_size:  # torch compresses code only, so a larger content is a bomb
            raise ValueError(f"it claims {inside:,} bytes and is {path.stat().st_size:,} bytes long")
        if f"{home}byteorder" in records and archive.read(f"{home}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        data = archive.read(place)
    return _ArchiveReader(data, path, home, records).load()


def read_legacy(path: Path) -> Any:
    """Return the content of a file that torch before 1.6 wrote, as `read_archive` does. Tensors are read into memory.

    Raises ValueError, or what a reader raises for damaged bytes.
    """
    with path.open("rb") as file:
        if _Reader(file).load() != MAGIC or _Reader(file).load() != PROTOCOL:
            raise ValueError("it is no file of torch.save")
        system = _Reader(file).load()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("its numbers are big-endian")
        reader = _LegacyReader(file, path.stat().st_size)
        content, keys = reader.load(), _Reader(file).load()
        if not isinstance(keys, list) or set(map(str, keys)) != reader.storages.keys():
            raise ValueError("its list of storages is not that of its tensors")
        for key in keys:
            data, dtype = reader.storages[str(key)]
            size = int.from_bytes(file.read(8), "little")
            if size * dtype.itemsize != len(data) or file.readinto(data.numpy()) != len(data):
                raise ValueError(f"storage {key} holds fewer bytes than it claims")
    return content


# The C implementation takes memory for whatever number of a memo entry the file names.
class _Reader(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        return type("Foreign", (Foreign,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError(f"it refers to {pid!r:.100}, which is nowhere")


class _LegacyReader(_Reader):
    """Makes storages of the size that tensors claim; their bytes come behind the pickles."""

    def __init__(self, file: Any, limit: int) -> None:
        super().__init__(file)
        self._left = limit
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, *about = pid
        if kind == "module":  # a class, with its source
            return about[0]
        dtype, key, _, size, view = about
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(size, int) or view is not None:
            raise ValueError(f"it refers to {pid!r:.100}, which is no storage")
        if str(key) not in self.storages:
            self._left -= size * dtype.itemsize
            if size < 0 or self._left < 0:
                raise ValueError(f"storage {key} claims {size:,} numbers, and the file holds fewer")
            self.storages[str(key)] = _Storage(torch.empty(size * dtype.itemsize, dtype=torch.uint8), dtype)
        return self.storages[str(key)]


class _ArchiveReader(_Reader):
    def __init__(self, data: bytes, path: Path, home: str, records: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(io.BytesIO(data))
        self._path, self._home, self._records = path, home, records
        self._bytes: dict[str, Tensor] = {}

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(size, int):
            raise ValueError(f"it refers to {pid!r:.100}, which is no storage")
        name = f"{self._home}data/{key}"
        if name not in self._bytes:
            self._bytes[name] = self._mapped(name)
        data = self._bytes[name]
        if size * dtype.itemsize > len(data):
            raise ValueError(f"storage {key} claims {size:,} numbers, and the file holds fewer")
        return _Storage(data, dtype)

    def _mapped(self, name: str) -> Tensor:
        record = self._records[name]
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        if not record.file_size:
            return torch.zeros(0, dtype=torch.uint8)
        with self._path.open("rb") as file:  # the header there may be longer than the directory says
            file.seek(record.header_offset)
            header = file.read(HEADER)
        start = record.header_offset + HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        if _checksum(self._path, start, record.file_size) != record.CRC:
            raise ValueError(f"{name} does not have its checksum")
        return torch.from_numpy(np.memmap(self._path, np.uint8, mode="c", offset=start, shape=(record.file_size,)))


def _checksum(path: Path, start: int, size: int) -> int:
    """Return the CRC-32 of a part of a file. Reading it leaves nothing in memory, as mapping all of it would."""
    found = 0
    with path.open("rb") as file:
        file.seek(start)
        while size and (part := file.read(min(size, PART))):
            found, size = zlib.crc32(part, found), size - len(part)
    return found


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Take the place of torch._utils._rebuild_tensor_v2."""
    return _strided(storage, storage.dtype, offset, size, stride)


def _typed_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], _: Any, __: Any, dtype: Any, *___: Any
) -> Tensor:
    """Take the place of torch._utils._rebuild_tensor_v3."""
    return _strided(storage, dtype, offset, size, stride)


def _strided(storage: Any, dtype: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no storage")
    if len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
        raise ValueError(f"a tensor claims shape {list(size)} with strides {list(stride)}")
    held = len(storage.data) // dtype.itemsize
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if 0 not in size and last >= held:
        raise ValueError(f"a tensor claims shape {list(size)}, and the file holds fewer numbers")
    data = storage.data[: held * dtype.itemsize]
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return torch.as_strided(data.view(dtype), size, stride, offset)


def _first(data: Any, *_: Any) -> Any:
    """Take the place of torch._utils._rebuild_parameter."""
    return data


KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
    **{("builtins", kind.__name__): kind for kind in (set, frozenset)},
    **{("__builtin__", kind.__name__): kind for kind in (set, frozenset)},
}
