"""Hostile content: valid files with damaged bytes, and with well-formed lies in their places."""

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialise

from equipoise.records import FORMAT
from equipoise.store import METADATA_KEY, _checksum

DEEP = "@@nested {}@@"
"""Text that stands for lists nested so many times, which the JSON encoder could not write."""
DEPTHS = (40, 400, 900, 100_000)
SCALARS: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    10_000_000,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63),
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "0",
    "nan",
    "/",
    "../../../../etc/passwd",
    "/dev/zero",
    "hf:owner/name",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "<script>alert(1)</script>",
    "{}",
    "[",
    "a b\nc",
    "[" * 3000,
    "{a: " * 20,
    "9" * 5000,
    "!!python/name:os.system",
    "*x",
    "2001-01-01",
    "0x10",
    "1_000",
)
SIDES = (0, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
EXTREMES = tuple(side % 2**64 for side in (*SIDES, -1, -(2**31), 2**15, 255, 128))
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL")


def hostile(rng: random.Random, before: Any = None) -> Any:
    """A value that a reader may not expect where ``before`` stood."""
    choice = rng.randrange(10)
    if choice < 6:
        return rng.choice(SCALARS)
    if choice == 6:
        return DEEP.format(rng.choice(DEPTHS))
    if choice == 7:
        return rng.choice("xA\u00e9\u202e9 [") * rng.choice((100, 5000, 1_000_000))
    if choice == 8:
        inner = rng.choice((before, rng.choice(SCALARS)))
        lists = [[], {}, [inner], {"value": inner}, [inner] * 1000, [[inner]], {"x": {"y": inner}}]
        return rng.choice(lists)
    if isinstance(before, bool | str | None):
        return {"value": before, "standard_error": rng.choice(SCALARS), "n": rng.choice(SCALARS)}
    if isinstance(before, int | float) and abs(before) < 1e300:
        return rng.choice((-before, str(before), [before], float(before), before * 10, before + 1))
    if isinstance(before, dict | list):
        return rng.choice((list(before), dict.fromkeys(map(str, before), 1)))
    return str(before)


def lie(value: Any, rng: random.Random) -> Any:
    """Replace, remove or add something at one to three places in a JSON value."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _lie_once(value, rng)
    return value


def _lie_once(value: Any, rng: random.Random) -> Any:
    # Each way is as likely as another, so that what stands high in the tree is reached, too.
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return _alter_node(value, rng)

    if isinstance(value, dict):
        key = rng.choice(list(value))
        return {name: _lie_once(old, rng) if name == key else old for name, old in value.items()}
    index = rng.randrange(len(value))
    return [_lie_once(old, rng) if i == index else old for i, old in enumerate(value)]


def _alter_node(value: Any, rng: random.Random) -> Any:
    """Another value; for a dictionary or a list, mostly one of its entries added or lost."""
    if isinstance(value, dict) and rng.random() < 0.8:
        altered = dict(value)
        if altered and rng.random() < 0.5:
            key = rng.choice(list(altered))
            moved = altered.pop(key)
            if rng.random() < 0.3:
                altered[f"{key}_"] = moved
        else:
            keys = ("value", "n", "extra", "copied", "source", "format", "", "x" * 5000, "a\nb|c")
            altered[rng.choice(keys)] = hostile(rng)
        return altered

    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        lists = [value[:at], value[::-1], value + value, [*value, hostile(rng)], value * 500]
        return rng.choice(lists)
    return hostile(rng, value)


def to_json(value: Any, rng: random.Random) -> str:
    """Write a JSON value, with what stands for deep nesting expanded."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5 or "\\ud800" in json.dumps(value))
    for depth in DEPTHS:
        mark = json.dumps(DEEP.format(depth))
        text = text.replace(mark, rng.choice(("[" * depth + "]" * depth, _nested(depth))))
    return text


def _nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def lie_in_json(path: Path, rng: random.Random) -> None:
    """Replace a JSON file by a lie."""
    text = to_json(lie(json.loads(path.read_text()), rng), rng)
    path.write_text(text, "utf-8", errors="surrogatepass")


def lie_in_lines(path: Path, rng: random.Random) -> None:
    """Replace a line of a file that has a JSON value in each."""
    lines = path.read_text().splitlines()
    index = rng.randrange(len(lines))
    lines[index] = to_json(lie(json.loads(lines[index]), rng), rng)
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines)), rng.choice(("", "null", "[]", "{}", "\0")))
    path.write_text("\n".join(lines) + "\n", "utf-8", errors="surrogatepass")


def lie_in_tensors(path: Path, rng: random.Random) -> None:
    """Replace a file of tensors by a lie whose checksum is right."""
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = record["description"]

    if rng.random() < 0.65 or not tensors:
        text = to_json(lie(json.loads(text), rng), rng)
    if rng.random() < 0.4:
        _alter_tensors(tensors, rng)
    write_sealed(path, record["kind"], tensors, text)


def write_sealed(path: Path, kind: str, tensors: dict[str, Any], text: str) -> None:
    """Write a file of tensors with any text as its description, and the right checksum."""
    text = text.encode("utf-8", errors="replace").decode()
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    checksum = _checksum(kind, text, tensors)
    record = {"format": FORMAT, "kind": kind, "description": text, "sha256": checksum}
    path.write_bytes(serialise(tensors, {METADATA_KEY: json.dumps(record)}))


def _alter_tensors(tensors: dict[str, Any], rng: random.Random) -> None:
    """Give one or two tensors another shape, dtype, name or content."""
    for _ in range(rng.choice((1, 1, 2))):
        if not tensors:
            return
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        floats = tensor.to(torch.float64)
        extreme = rng.choice((float("nan"), float("inf"), -1e38, 1e38, 0.0, 1e-38, -1.0))
        at_random = floats.clone(memory_format=torch.contiguous_format)
        if at_random.numel():
            at_random.view(-1)[rng.randrange(at_random.numel())] = extreme

        ways: list[Callable[[], Any]] = [
            lambda tensor=tensor: tensor[None],
            lambda tensor=tensor: tensor.reshape(-1),
            lambda tensor=tensor: tensor.reshape(-1)[:-1],
            lambda tensor=tensor: tensor.reshape(-1)[:0],
            lambda tensor=tensor: torch.cat([tensor.reshape(-1)] * 2),
            lambda tensor=tensor: tensor.mT if tensor.ndim > 1 else tensor.sum(),
            lambda floats=floats: floats.nan_to_num().to(
                rng.choice((torch.int64, torch.bool, torch.float16, torch.uint8, torch.float64))
            ),
            lambda tensor=tensor, new=at_random, extreme=extreme: new.nan_to_num(
                nan=extreme, posinf=extreme, neginf=extreme
            ).to(tensor.dtype),
            lambda tensor=tensor, floats=floats: (floats.nan_to_num() * -1).to(tensor.dtype),
            lambda tensor=tensor, floats=floats: (floats.nan_to_num() * 1e30).to(tensor.dtype),
            lambda: torch.empty(0, 2**40),
        ]
        choice = rng.randrange(len(ways) + 3)
        if choice < len(ways):
            tensors[name] = ways[choice]()
        elif choice == len(ways):
            del tensors[name]
        elif choice == len(ways) + 1:
            tensors[rng.choice((f"{name}.x", "", "model", "a\nb", "x" * 3000))] = tensors.pop(name)
        else:
            tensors.update({f"extra.{i}": torch.zeros(1) for i in range(500)})


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Damage bytes: flips, splices, truncations, repeated and inserted chunks, extreme numbers."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        # Most damage goes to the beginning, where headers are.
        end = len(damaged) if rng.random() < 0.5 else min(len(damaged), 256)
        at = rng.randrange(end + 1)
        size = min(len(damaged) - at, rng.choice((1, 2, 4, 8, 16, 64, 256)))
        choice = rng.randrange(9)
        if choice == 0 and at < len(damaged):
            damaged[at] ^= 1 << rng.randrange(8)
        elif choice == 1 and at < len(damaged):
            damaged[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif choice == 2:
            del damaged[at : at + size]
        elif choice == 3:
            damaged[at:at] = damaged[at : at + size] * rng.choice((1, 2, 50))
        elif choice == 4:
            damaged[at:at] = rng.randbytes(size)
        elif choice == 5:
            other = rng.randrange(len(damaged) + 1)
            damaged[at : at + size] = damaged[other : other + size]
        elif choice == 6:
            form = rng.choice(("<H", "<I", "<Q", ">H", ">I", ">Q"))
            width = struct.calcsize(form)
            damaged[at : at + width] = struct.pack(form, rng.choice(EXTREMES) % 256**width)
        elif choice == 7:
            _replace_number(damaged, at, rng)
        elif rng.random() < 0.3:
            del damaged[at:]
    return bytes(damaged)


def _replace_number(damaged: bytearray, at: int, rng: random.Random) -> None:
    """Replace the digits that follow a place, where numbers are written as text."""
    start = next((i for i in range(at, len(damaged)) if chr(damaged[i]).isdigit()), None)
    if start is None:
        return
    end = start
    while end < len(damaged) and chr(damaged[end]) in "0123456789.":
        end += 1
    numbers = (*map(str, SIDES), "-1", "1e999", "NaN", "9" * 5000, "0x10", "1_0", "--1")
    damaged[start:end] = rng.choice(numbers).encode()


def lie_in_npy(path: Path, rng: random.Random) -> None:
    """Replace the header of an ``.npy`` file by a lie."""
    path.write_bytes(_npy(np.load(path), rng))


def _npy(array: Any, rng: random.Random) -> bytes:
    """An array as it is in a file whose header lies."""
    types = ("<f4", "<f8", ">f8", "|u1", "<i8", "|b1", "<c16", "|O", "<U5", "|S0", "<f2", "<M8[s]")
    header: dict[str, Any] = {
        "descr": np.lib.format.dtype_to_descr(array.dtype),
        "fortran_order": False,
        "shape": array.shape,
    }
    choice = rng.randrange(6)
    if choice == 0:
        header["shape"] = tuple(rng.choice((*SIDES, -1)) for _ in range(rng.randrange(6)))
    elif choice == 1:
        header["descr"] = rng.choice((*types, [("a", "<f4"), ("b", "|u1")], "(2,)<f4", "", "x" * 9))
    elif choice == 2:
        header["fortran_order"] = rng.choice((True, 1, None, "yes"))
    elif choice == 3:
        header[rng.choice(list(header))] = hostile(rng)
    elif choice == 4:
        header.pop(rng.choice(list(header)))
    text = repr(header) if choice < 5 else rng.choice(("(" * 10_000, "{", "1 +", "{'a': " * 3000))

    version = rng.choice((1, 1, 1, 2, 3))
    encoded = text.encode(errors="replace") + b"\n"
    length = rng.choice((len(encoded), len(encoded), len(encoded), rng.choice(EXTREMES)))
    form = "<H" if version == 1 else "<I"
    packed = struct.pack(form, length % 256 ** struct.calcsize(form))
    data = array.tobytes()
    if rng.random() < 0.3:
        data = rng.choice((b"", data[:-1], data * 2))
    return b"\x93NUMPY" + bytes([version, 0]) + packed + encoded + data


def lie_in_npz(path: Path, rng: random.Random) -> None:
    """Replace members of an ``.npz`` archive by lies, or their names."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    name = rng.choice(sorted(members))
    names = ("x.npy", "train.npy", "x_train.npy", "../x.npy", "", "a/b.npy", "x.txt", "x")
    choice = rng.randrange(6)
    if choice < 3:
        members[name] = _npy(np.load(io.BytesIO(members[name])), rng)
    elif choice == 3:
        members[rng.choice(names)] = members.pop(name)
    elif choice == 4:
        members = {} if rng.random() < 0.3 else {f"{i}.npy": members[name] for i in range(300)}
    else:
        # A bomb of zeros, a thousandth of its size in the archive.
        buffer = io.BytesIO()
        rows = rng.choice((1000, 3_000_000))
        np.lib.format.write_array(buffer, np.zeros((rows, 100), np.uint8))
        members[name] = buffer.getvalue()

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member or "x", content)


def lie_in_idx(path: Path, rng: random.Random) -> None:
    """Replace the header of an idx file by a lie, within its compression if it has one."""
    is_packed = path.suffix == ".gz"
    content = path.read_bytes()
    content = bytearray(gzip.decompress(content) if is_packed else content)

    choice = rng.randrange(4)
    if choice == 0 and is_packed:
        # A bomb: members of ten million zeros each, in ten thousand bytes.
        member = gzip.compress(bytes(10_000_000), 9)
        path.write_bytes(path.read_bytes() + member * rng.choice((1, 150)))
        return
    if choice == 1:
        content[:4] = struct.pack(">I", rng.choice((0, 0x0801, 0x0803, 0x0D03, 0x0804, 2**32 - 1)))
    else:
        for axis in range(rng.choice((1, 3))):
            side = rng.choice(SIDES) % 2**32
            content[4 + 4 * axis : 8 + 4 * axis] = struct.pack(">I", side)
        if rng.random() < 0.3:
            content = content[:16]
    path.write_bytes(gzip.compress(content, 1) if is_packed else content)


def lie_in_yaml(path: Path, rng: random.Random) -> None:
    """Replace a recipe by a lie, or by YAML that is hard to read."""
    import yaml

    texts = (
        "a: &a [1, 1]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(99)),
        "a: &a0 [x]\n"
        + "".join(f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)),
        "latent_dim: &x [*x]\n",
        "? [a, b]\n: 1\n",
        "latent_dim: !!python/object/apply:os.system ['true']\n",
        "latent_dim: 2001-99-99\n",
        "latent_dim: 2001-01-01\n",
        "latent_dim: !!binary AAAA=====\n",
        "latent_dim: !!set {a, b}\n",
        "latent_dim: 1:2:3:4\n",
        "seed: 0b" + "1" * 5000 + "\n",
        "seed: " + "9" * 5000 + "\n",
        "latent_dim: 1\nlatent_dim: 2\n",
        "<<: {latent_dim: 1}\n",
        "<<: 1\n",
        "a: " + "[" * 100_000,
        "- " * 3000 + "x",
        "{" * 3000,
        "? " * 3000,
        "a: !!float 'x'\n",
        "a: !!int ''\n",
        "a: !!timestamp x\n",
        "---\n---\n",
        "%YAML 9.9\n---\na: 1\n",
        "\ufeff\ufeff",
        "a: \x00",
        "null: 1\n1: 2\ntrue: 3\n",
    )
    if rng.random() < 0.3:
        path.write_text(rng.choice(texts), "utf-8")
        return
    values = lie(yaml.safe_load(path.read_text()), rng)
    if rng.random() < 0.5:
        path.write_text(to_json(values, rng), "utf-8", errors="surrogatepass")
    else:
        path.write_text(yaml.safe_dump(values), "utf-8", errors="replace")
