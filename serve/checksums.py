"""MD5 checksums of a repository's files, for Triton's repository agent `checksum` and for md5sum.

    <repository>/MD5SUMS    of every model's files, of all versions, as they were written: md5sum --check MD5SUMS

The agent reads the files that a configuration lists before the model is loaded, and refuses it if one is missing or changed. A
configuration lists the served version's only: damage to another version must not keep the server from starting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipress.errors import ArtifactError
from clipress.serve.triton_config import config_from, config_text
from clipress.serve.triton_files import Files
from clipress.storage import hash_of_file

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

SUMS = "MD5SUMS"
AGENT = "checksum"
LIBRARY = f"libtritonrepoagent_{AGENT}.so"
KEY = "MD5:"  # what the agent's parameters begin with, before a path below the model's folder


def sums_of(repository: Path, kept: Iterable[str], written: Files) -> dict[str, str]:
    """Return the MD5 of every file by its path: those in MD5SUMS for files that are kept, new ones for those written.

    A kept file that MD5SUMS lacks, since the repository had no checksums, is read as it is. Raises ArtifactError if
    MD5SUMS is damaged.
    """
    known = _read_sums(repository)
    sums = {name: known.get(name) or _md5(repository / name) for name in kept if name not in written}
    return sums | {name: _md5(content) for name, content in written.items()}


def sums_text(sums: Mapping[str, str]) -> bytes:
    """Print checksums the way md5sum does."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def list_checksums(config: ModelConfig, sums: Mapping[str, str], version: int) -> None:
    """Let the agent check the files of a version of a model, and those of its warm-up."""
    agent = config.model_repository_agents.agents.add(name=AGENT)
    for name, digest in sums.items():
        model, below = name.split("/", 1)
        if model == config.name and below.split("/")[0] in (str(version), "warmup"):
            agent.parameters[KEY + below] = digest


def update_checksums(repository: Path, written: Files) -> Files:
    """Return MD5SUMS and the configurations as they must be when `written` replaces files; none without checksums."""
    sums = {name: _md5(content) for name, content in written.items()}
    updated: Files = {}
    if known := _read_sums(repository):
        updated[SUMS] = sums_text(known | sums)
    for path in repository.glob("*/config.pbtxt"):
        config = config_from(path.read_text(encoding="utf-8"))
        for agent in config.model_repository_agents.agents:
            for key in list(agent.parameters):
                if digest := sums.get(f"{config.name}/{key.removeprefix(KEY)}"):
                    agent.parameters[key] = digest
            updated[path.relative_to(repository).as_posix()] = config_text(config).encode()
    return updated


def _read_sums(repository: Path) -> dict[str, str]:
    path = repository / SUMS
    if not path.is_file():
        return {}
    try:
        lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: digest for digest, name in lines}
    except ValueError:
        raise ArtifactError(
            f"{path} is damaged: expected lines of a checksum and a path, as md5sum prints them. "
            f"Move {repository} away and do: clipress serve RUN"
        ) from None


def _md5(content: bytes | Path) -> str:
    new = partial(hashlib.md5, usedforsecurity=False)
    return new(content).hexdigest() if isinstance(content, bytes) else hash_of_file(content, new)
