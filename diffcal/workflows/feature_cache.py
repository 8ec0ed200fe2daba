"""Image features of a run, computed once per image and encoder: ``RUN/features/KEY/``."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffcal.core.digests import hash_tensors
from diffcal.core.runs import claim_folder, fingerprint, write_atomic
from diffcal.core.tensors import require_finite
from diffcal.data.sources import ImageSource
from diffcal.errors import ArtifactError, DataError
from diffcal.models.encoders import FeatureEncoder

__all__ = ["FeatureCache", "FeatureDtype", "FeatureShards"]

FORMAT = "diffcal-features/1"
FeatureDtype = Literal["float32", "float16"]
REAL_SHARD = 2048
"""Real images in a shard of features."""


class FeatureShards:
    """Features and labels of real images, shard after shard, to be iterated over any number of times.

    Args:
        paths: Files in order.
        shares: Label distributions ``[n, k]`` by row of the source; these become the targets, in
            place of the labels.
    """

    def __init__(self, paths: Iterable[Path], shares: Tensor | None = None) -> None:
        self.paths, self.shares = tuple(paths), shares
        self._verified: set[Path] = set()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for path in self.paths:
            tensors = _read(path, verify=path not in self._verified)[1]
            self._verified.add(path)
            targets = tensors["labels"] if self.shares is None else self.shares[tensors["ids"]]
            yield tensors["features"].float(), targets

    def with_shares(self, shares: Tensor) -> "FeatureShards":
        """The same features with people's label shares as targets.

        Args:
            shares: ``[n, k]``, one row for each row of the source.

        Raises:
            DataError: rows of the source are missing in it.
        """
        last = max(int(_read(path, verify=False)[1]["ids"].max()) for path in self.paths)
        if last >= len(shares):
            raise DataError(
                f"human labels cover rows 0 to {len(shares) - 1}, but row {last} is held out"
            )
        return FeatureShards(self.paths, shares)


class FeatureCache:
    """Features of generated shards and of real images under one encoder.

    A file is written when all its images are encoded, and read instead of the images from then on.
    Several processes may share the folder; each writes its own shards.

    Args:
        run: Run folder.
        encoder: Its ``version`` decides the folder.
        dtype: Number format on disk; what comes back is float32 of it, so that a later annotation
            sees exactly what the first one saw.
        batch_size: Images per call of the encoder.
        main: True on the process that describes the folder.
    """

    def __init__(
        self,
        run: Path,
        encoder: FeatureEncoder,
        dtype: FeatureDtype,
        batch_size: int,
        *,
        main: bool,
    ) -> None:
        self.encoder, self.dtype, self.batch_size = encoder, getattr(torch, dtype), batch_size
        self.description = {"encoder": encoder.name, "version": encoder.version, "dtype": dtype}
        self.folder = run / "features" / fingerprint(self.description)[:16]
        self.encoded = 0
        """Images that this process had to encode."""
        if main:
            claim_folder(self.folder, {"format": FORMAT, **self.description}, name="encoder.json")

    def real(
        self, source: ImageSource, rows: range, *, index: int = 0, count: int = 1, bar: Any = None
    ) -> FeatureShards:
        """Features of ``rows`` of a source; this process (``index`` of ``count``) makes its share.

        Wait for the others before reading the result.

        Raises:
            DataError: an image cannot be read.
            NumericalError: features that are not finite, in the format on disk.
        """
        key = fingerprint([source.fingerprint, rows.start, rows.stop, REAL_SHARD])[:16]
        folder = self.folder / f"real-{key}"
        starts = range(rows.start, rows.stop, REAL_SHARD)
        paths = [folder / f"shard-{number:05d}.safetensors" for number in range(len(starts))]
        for number, (start, path) in enumerate(zip(starts, paths, strict=True)):
            part = range(start, min(start + REAL_SHARD, rows.stop))
            if number % count == index and not path.exists():
                features, labels = [], []
                for _, images, targets in source.batches(self.batch_size, part):
                    features.append(self._encode(images))
                    labels.append(torch.from_numpy(targets))
                self._write(path, features, torch.tensor(part), key, labels=torch.cat(labels))
            if bar is not None and number % count == index:
                bar.update(len(part))
        return FeatureShards(paths)

    def generated(self, name: str, key: str) -> tuple[Tensor, Tensor] | None:
        """Float32 features and int64 ids of a generated shard; None if they are yet to be computed.

        Args:
            name: Of the shard, without suffix.
            key: SHA-256 of the shard's file. Features of another file, which was there before, are
                none.

        Raises:
            ArtifactError: they are damaged.
        """
        path = self._generated_path(name)
        if not path.exists():
            return None
        about, tensors = _read(path, verify=True)
        return (tensors["features"].float(), tensors["ids"]) if about["key"] == key else None

    def encode_generated(
        self, name: str, key: str, ids: Tensor, batches: Iterable[ndarray]
    ) -> Tensor:
        """Encode a generated shard, keep the features and return them as float32.

        Raises:
            NumericalError: features that are not finite, in the format on disk.
        """
        features = [self._encode(images) for images in batches]
        return self._write(self._generated_path(name), features, ids, key).float()

    def _generated_path(self, name: str) -> Path:
        return self.folder / "generated" / f"{name}.safetensors"

    def _encode(self, images: ndarray) -> Tensor:
        self.encoded += len(images)
        features = self.encoder.encode(torch.from_numpy(np.ascontiguousarray(images)))
        return require_finite(features.to(self.dtype), f"features as {self.dtype}")

    def _write(
        self, path: Path, features: list[Tensor], ids: Tensor, key: str, **more: Tensor
    ) -> Tensor:
        stacked = torch.cat(features)
        tensors = {"features": stacked, "ids": ids.to(torch.int64), **more}
        # One entry, because the library writes several in an order that changes from run to run.
        about = {"format": FORMAT, "key": key, "sha256": _digest(tensors)}
        data = save(tensors, metadata={"diffcal": json.dumps(about)})
        write_atomic(path, lambda file: file.write(data))
        return stacked


def _read(path: Path, *, verify: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("diffcal", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ArtifactError(f"'{path}' is missing; run the command again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' is damaged ({error}); delete it and run again") from error
    if about.get("format") != FORMAT:
        raise ArtifactError(f"'{path}' does not hold {FORMAT}; delete it and run again")
    if verify and about.get("sha256") != _digest(tensors):
        raise ArtifactError(f"'{path}' is damaged (its hash is wrong); delete it and run again")
    return about, tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    hash_tensors(digest, sorted(tensors.items()))
    return digest.hexdigest()
